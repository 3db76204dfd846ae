"""Image files with any number of planes."""

import cv2
import numpy as np
import pytest
from PIL import Image

from atss_runner.planes import Planes, as_planes, resize_planes

WIDE = np.random.default_rng(0).integers(0, 65536, (6, 9, 5), np.uint16)


def save(path, planes, **options):
    if path.suffix == ".tif":
        pytest.importorskip("tifffile").imwrite(path, planes, **options)
    elif planes.dtype == np.uint16:
        order = [2, 1, 0, 3][: planes.shape[2]] if planes.ndim > 2 else ...
        cv2.imwrite(str(path), planes[:, :, order] if planes.ndim > 2 else planes)
    else:
        Image.fromarray(planes).save(path, **options)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("name", "planes", "options"),
    [
        ("rgb16.png", WIDE[:, :, :3], {}),
        ("rgba16.png", WIDE[:, :, :4], {}),
        ("grey16.png", WIDE[:, :, 0], {}),
        ("rgb8.png", WIDE[:, :, :3].astype(np.uint8), {}),
        ("rgba8.png", WIDE[:, :, :4].astype(np.uint8), {}),
        ("five.tif", WIDE, {"photometric": "minisblack", "planarconfig": "contig"}),
        ("float.tif", WIDE[:, :, 0].astype(np.float32), {}),
        ("big.tif", WIDE, {"planarconfig": "contig", "bigtiff": True, "photometric": "minisblack"}),
    ],
)
def test_planes_are_those_of_the_file(name, planes, options, tmp_path):
    np.testing.assert_array_equal(Planes.read(save(tmp_path / name, planes, **options)), planes)


@pytest.mark.parametrize(("mode", "expected"), [("P", "RGB"), ("1", "L")])
def test_palettes_and_single_bits_become_bytes(mode, expected, tmp_path):
    image = Image.fromarray(WIDE[:, :, :3].astype(np.uint8)).convert(mode)
    image.save(tmp_path / "a.png")
    planes = Planes.read((tmp_path / "a.png").read_bytes())
    np.testing.assert_array_equal(planes, np.asarray(image.convert(expected)))


def test_planes_of_separate_pages(tmp_path):
    pages = np.ascontiguousarray(WIDE.transpose(2, 0, 1))
    content = save(tmp_path / "a.tif", pages, photometric="minisblack")
    np.testing.assert_array_equal(Planes.read(content), WIDE)


def test_tiff_of_several_images_is_refused(tmp_path):
    with pytest.importorskip("tifffile").TiffWriter(tmp_path / "a.tif") as file:
        for side in (5, 6):
            file.write(WIDE[:side, :, 0])
    with pytest.raises(ValueError, match="it is a TIFF with 2 images of axes YX, not one"):
        Planes.read((tmp_path / "a.tif").read_bytes())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_by_pillow(orientation, tmp_path):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    content = save(tmp_path / "a.png", WIDE[:, :, :3].astype(np.uint8), exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
        np.testing.assert_array_equal(as_planes(image), expected)
    np.testing.assert_array_equal(Planes.read(content), expected)


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_damaged_file_is_a_value_or_os_error(name, tmp_path):
    content = save(tmp_path / name, WIDE[:, :, 0])
    for end in range(4, len(content), 9):
        with pytest.raises((ValueError, OSError)):
            Planes.read(content[:end])


def test_palette_becomes_colours():
    image = Image.fromarray(WIDE[:, :, :3].astype(np.uint8)).quantize(8)
    np.testing.assert_array_equal(as_planes(image), np.asarray(image.convert("RGB")))


def test_orientation_of_a_tiff_is_applied(tmp_path):
    content = save(tmp_path / "a.tif", WIDE[:, :, 0], extratags=[(0x0112, "H", 1, 6, True)])
    np.testing.assert_array_equal(Planes.read(content), np.rot90(WIDE[:, :, 0], 3))


def test_highest_value_becomes_255():
    pixels = Planes(5, 65535, (0, 1, 2)).scale(WIDE)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, WIDE / 257, rtol=1e-6)
    assert Planes(1, 4095, (0, 0, 0)).scale(np.array([[4095, 0]], np.uint16)).max() == 255


def test_bytes_stay_as_they_are():
    planes = WIDE.astype(np.uint8)
    pixels = Planes(5, 255, (0, 1, 2)).scale(planes)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, planes)


@pytest.mark.parametrize(
    ("planes", "highest", "message"),
    [
        (WIDE[:, :, :3], 65535, "it has 3 planes, but MODEL.PIXEL_MEAN is of 5"),
        (WIDE.astype(np.uint8), 65535, "it has 8 bits, but INPUT.HIGHEST is 65535"),
        (WIDE, 4095, r"it has the value \d+, above INPUT.HIGHEST 4095"),
        (np.full((2, 2, 5), np.nan, np.float32), 255, "it has the value nan, above"),
        (np.full((2, 2, 5), -np.inf, np.float32), 255, "it has the value -inf"),
        (WIDE.astype(complex), 65535, "dtype complex128"),
        (WIDE[None], 65535, r"it has shape \(1, 6, 9, 5\)"),
    ],
)
def test_unsuitable_planes_are_refused(planes, highest, message):
    with pytest.raises(ValueError, match=message):
        Planes(5, highest, (0, 1, 2)).scale(planes)


def test_pictures_show_chosen_planes():
    picture = Planes(5, 65535, (4, 0, 2)).picture(WIDE)
    np.testing.assert_array_equal(picture, (WIDE[:, :, [2, 0, 4]] / 257).astype(np.uint8))


def test_resizing_is_pillows_of_rgb():
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    expected = Image.fromarray(image).resize((33, 17), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resize_planes(image, 17, 33), np.asarray(expected))
    close = resize_planes(image.astype(np.float32), 17, 33)
    assert np.abs(close - np.asarray(expected)).max() <= 1
