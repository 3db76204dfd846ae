"""Facts about image files: suffixes, modes, and the size after resizing. No imports."""

# Images among the files of a folder: raster formats that Pillow reads, and further ones, so that a
# file that Pillow cannot read is an error instead of ignored.
# fmt: off
SUFFIXES = {
    ".apng", ".avif", ".bmp", ".dds", ".dib", ".gif", ".icns", ".ico", ".j2c", ".j2k", ".jfif",
    ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pcx", ".pfm",
    ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi", ".ras", ".sgi", ".tga", ".tif", ".tiff",
    ".webp", ".xbm", ".xpm",
    ".cr2", ".dng", ".heic", ".heif", ".jxl", ".nef",  # need plugins of Pillow
}
# fmt: on
# Modes of Pillow with more than 8 bits per channel, which conversion would cut off at 255.
HIGH_DEPTH = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")

# (shorter side, longest side) to which an image is resized; (height, width, True) if stretched.
Size = tuple[int, int] | tuple[int, int, bool]


def resized(
    height: int, width: int, short: int, longest: int, stretch: bool = False
) -> tuple[int, int]:
    """Return (height, width) after Detectron2's ResizeShortestEdge.

    Args:
        short: the shorter side, if the longer one stays below ``longest``; 0: not resized.
        stretch: ``short`` is the height and ``longest`` the width, whatever the aspect ratio.
    """
    if stretch:
        return short, longest
    if not short:
        return height, width
    scale = short / min(height, width)
    sides: list[float] = [short, scale * width] if height < width else [scale * height, short]
    if max(sides) > longest:
        scale = longest / max(sides)
        sides = [side * scale for side in sides]
    return int(sides[0] + 0.5), int(sides[1] + 0.5)


def too_thin(height: int, width: int, short: int, longest: int, stretch: bool = False) -> str:
    """Return the end of a message about an image with a side of 0 after resizing; else ""."""
    if min(resized(height, width, short, longest, stretch)):
        return ""
    return f"is {width} x {height} pixels, too thin to be resized to {longest} at most"
