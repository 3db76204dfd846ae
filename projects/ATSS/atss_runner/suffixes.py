"""Suffixes of image files."""

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
