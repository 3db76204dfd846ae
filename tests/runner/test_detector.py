"""Images into the network of an exported file, its outputs into detections; the network is faked.

Its input is compared with Detectron2's own reading and resizing.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import cv2
import detectron2.data.transforms as T
import numpy as np
import onnx
import onnxruntime
import pytest
from detectron2.data.detection_utils import read_image
from exported import MEAN, SETTINGS
from onnx import TensorProto, helper
from PIL import Image

import atss_runner
from atss_runner import FileError, load
from atss_runner import detector as module


@pytest.fixture
def make(monkeypatch):
    """Return detectors with a network of one's own and settings that differ from the above."""

    def make(network=None, batch=4, tiles=None, stored=(), **changed):
        changed |= {"tiles": stored} if tiles is not None else {}
        properties = {"atss": json.dumps(SETTINGS | changed)}
        monkeypatch.setattr(module, "_open", lambda path, threads: (network, properties))
        return load("model.onnx", batch=batch, tiles=tiles)

    return make


def photo(height, width, channels=3):
    """Smooth noise, on which each filter gives other pixels."""
    noise = np.random.default_rng(0).integers(0, 255, (height // 6, width // 6, channels), np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC).reshape(
        height, width, channels
    )


@pytest.fixture
def files(tmp_path):
    """Files of several kinds: {kind: path}."""
    rgb = Image.fromarray(photo(200, 333))
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"turned.jpg": {"exif": exif}}
    images = {
        "small.png": Image.fromarray(photo(54, 60)),  # 96 x 107, on 96 x 128
        "wide.png": Image.fromarray(photo(60, 400)),
        "turned.jpg": rgb,
        "grey.png": rgb.convert("L"),
        "palette.png": rgb.convert("P"),
        "alpha.png": Image.fromarray(photo(200, 333, 4)),
        "cmyk.jpg": rgb.convert("CMYK"),
    }
    for name, image in images.items():
        image.save(tmp_path / name, **options.get(name, {}))
    return {name: tmp_path / name for name in images}


def as_in_training(image, resize=T.ResizeShortestEdge([96, 96], 160)):  # noqa: B008
    """Resize as Detectron2, and pad as the detector."""
    image = resize.get_transform(image).apply_image(image)
    height, width = image.shape[:2]
    canvas = np.empty((-(-height // 32) * 32, -(-width // 32) * 32, 3), np.float32)
    canvas[:] = MEAN
    canvas[:height, :width] = image
    return canvas.transpose(2, 0, 1)[None]


@pytest.mark.parametrize("channels", ["BGR", "RGB"])
def test_files_become_the_input_of_training(make, files, channels):
    detector = make(input_format=channels)
    for name, path in files.items():
        expected = as_in_training(read_image(path, channels))
        np.testing.assert_array_equal(detector.pixels(path), expected, name)
        with Image.open(path) as opened:
            np.testing.assert_array_equal(detector.pixels(opened), expected, name)


def test_stretched_images_become_the_input_of_training(make, files):
    detector = make(resize="stretch")
    assert detector.size == (96, 160, True)
    expected = as_in_training(read_image(files["wide.png"], "BGR"), T.Resize((96, 160)))
    np.testing.assert_array_equal(detector.pixels(files["wide.png"]), expected)
    detector.pixels(np.zeros((1, 5000, 3), np.uint8))  # no image is too thin


def test_arrays_become_the_input_of_training(make):
    """BGR, BGRA, and grey with and without an axis of channels."""
    detector = make()
    bgr = photo(200, 333)
    grey = bgr[:, :, 0]
    bgra = np.dstack([bgr, grey])
    for image, same in ((bgr, bgr), (bgra, bgr), (grey, None), (grey[:, :, None], None)):
        same = cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR) if same is None else same
        np.testing.assert_array_equal(detector.pixels(image), as_in_training(same))


class Network:
    """A network that finds one box in each image: its class and corner are the first pixel's."""

    def __init__(self):
        self.shapes = []

    def __call__(self, pixels):
        self.shapes.append(pixels.shape)
        num_anchors = pixels.shape[2] * pixels.shape[3] // 32**2
        boxes = np.zeros((len(pixels), num_anchors, 4), np.float32)
        boxes[:, :, :2] = pixels[:, :1, 0, 0, None]
        boxes[:, :, 2:] = boxes[:, :, :2] + 20
        probabilities = np.zeros((len(pixels), num_anchors, 2), np.float32)
        probabilities[:, 0, 1] = 0.64
        quality = np.full((len(pixels), num_anchors), 0.25, np.float32)
        return boxes, probabilities, quality


def shades(*sizes):
    """Plain images; the shade is the index."""
    return [np.full((*size, 3), i, np.uint8) for i, size in enumerate(sizes)]


WIDE, HIGH = (96, 128), (128, 96)


def test_images_of_one_canvas_run_together(make):
    network = Network()
    detector = make(network, batch=5)
    found = detector(shades(WIDE, HIGH, WIDE, WIDE, HIGH, WIDE, HIGH))
    assert network.shapes == [
        (3, 3, 96, 128),
        (2, 3, 128, 96),
        (1, 3, 96, 128),
        (1, 3, 128, 96),
    ]
    assert [x.boxes.tolist() for x in found] == [[[i, i, i + 20, i + 20]] for i in range(7)]
    assert {(*x.classes, *x.scores.round(4)) for x in found} == {(1, np.float32(0.4))}


def test_one_image_gives_one_result_a_list_a_list(make):
    detector = make(Network())
    (image,) = shades(WIDE)
    boxes, scores, classes = detector(image)
    assert (boxes.shape, scores.shape, classes.shape) == ((1, 4), (1,), (1,))
    assert (boxes.dtype, scores.dtype, classes.dtype) == (np.float32, np.float32, np.int64)
    assert [len(x.boxes) for x in detector([image])] == [1]
    assert detector([]) == []


def test_few_images_are_in_memory_at_a_time(make):
    """An iterator is read as its images are needed."""
    network = Network()
    read = []

    def images():
        for i, image in enumerate(shades(*[WIDE] * 10)):
            assert i - sum(x[0] for x in network.shapes) < 3
            read.append(i)
            yield image

    assert len(make(network, batch=3)(images())) == len(read) == 10
    assert [x[0] for x in network.shapes] == [3, 3, 3, 1]


def test_threads_may_share_a_detector(make):
    detector = make(Network(), batch=2)
    images = shades(*[WIDE, HIGH] * 40)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(detector, images))
    assert [x.boxes[0, 0] for x in found] == list(range(80))


def test_boxes_are_in_pixels_of_the_image(make):
    """Resized by 1/2 in both directions, then clipped to the image, not to the canvas."""
    detector = make(Network())
    image = np.full((192, 240, 3), 110, np.uint8)  # on a canvas of 96 x 128
    assert detector(image).boxes.tolist() == []  # below the image
    image[:] = 90
    assert detector(image).boxes.tolist() == [[180, 180, 220, 192]]


def test_detections_of_a_file_with_nms_are_cut_and_scaled(make):
    sizes = []

    def network(pixels, size):
        sizes.extend(size.tolist())
        boxes = np.float32([[90, 90, 110, 110], [5, 5, 9, 9], [1, 1, 2, 2]])
        one = boxes, np.float32([0.9, 0.5, 0]), np.array([1, 0, -1]), np.array(2)
        return tuple(np.stack([x] * len(pixels)) for x in one)

    form = {"inputs": ["image", "sizes"], "outputs": ["boxes", "scores", "classes", "count"]}
    images = [np.zeros((192, width, 3), np.uint8) for width in (240, 210)]
    found, narrow = make(network, nms_inside=True, **form)(images)
    assert sizes == [[96, 120], [96, 105]]
    assert found.boxes.tolist() == [[180, 180, 220, 192], [10, 10, 18, 18]]
    assert narrow.boxes.tolist() == [[180, 180, 210, 192], [10, 10, 18, 18]]
    assert (found.scores.tolist(), found.classes.tolist()) == ([np.float32(0.9), 0.5], [1, 0])


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        ("nowhere.png", "cannot read the image nowhere.png: No such file or directory"),
        (np.zeros((3, 4, 5), np.uint8), r"expected a path, .* got ndarray \(3, 4, 5\) uint8"),
        (np.zeros((3, 4, 3), np.float32), r"expected a path, .* got ndarray \(3, 4, 3\) float32"),
        (np.zeros((0, 4, 3), np.uint8), r"the image is empty: \(0, 4, 3\)"),
        (None, "expected a path, a PIL image or a uint8 array .* got NoneType"),
        (b"x", "expected a path, a PIL image or a uint8 array .* got bytes"),
        (Image.new("I", (9, 9)), r"the image has more than 8 bits per channel \(mode I\)"),
        (np.zeros((1, 5000, 3), np.uint8), "the image is 5000 x 1 pixels, too thin"),
    ],
)
def test_bad_images_are_refused_in_a_sentence(make, image, sentence):
    detector = make(Network())
    for images in (image, [image]):
        with pytest.raises(FileError, match=f"^{sentence}"):
            detector(images)


def test_damaged_image_is_refused(make, files):
    content = files["turned.jpg"].read_bytes()
    files["turned.jpg"].write_bytes(content[: len(content) // 2])
    with pytest.raises(FileError, match=r"cannot read the image .*turned.jpg: "):
        make(Network())(files["turned.jpg"])


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path):
    """An ONNX file of another project."""
    shape = [1, 3, 32, 32]
    values = [helper.make_tensor_value_info(x, TensorProto.FLOAT, shape) for x in ("x", "y")]
    node = helper.make_node("Relu", ["x"], ["y"])
    weights = helper.make_tensor("w", TensorProto.FLOAT, [500], np.zeros(500))
    graph = helper.make_graph([node], "net", [values[0]], [values[1]], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(tmp_path / "model.onnx"))
    return tmp_path / "model.onnx"


def test_file_of_another_project_is_refused(foreign):
    with pytest.raises(FileError, match=r"model.onnx is no exported detector: it has no metadata"):
        load(foreign)


@pytest.mark.parametrize("content", [b"", b"no model", b"\0" * 5000, b"\x89PNG\r\n\x1a\n"])
def test_other_files_are_refused(foreign, content):
    foreign.write_bytes(content)
    with pytest.raises(FileError, match=r"model.onnx .*|cannot load .*model.onnx: .+") as caught:
        load(foreign)
    assert "\n" not in str(caught.value)


def test_truncated_files_are_refused(foreign):
    content = foreign.read_bytes()
    for length in (1, 10, 100, 1000, len(content) - 1):
        foreign.write_bytes(content[:length])
        with pytest.raises(FileError, match=r"model\.onnx"):
            load(foreign)


def test_folders_and_missing_files_are_refused(tmp_path):
    with pytest.raises(FileError, match=r"is no file$"):
        load(tmp_path)
    with pytest.raises(FileError, match=r"nowhere.onnx does not exist$"):
        load(tmp_path / "nowhere.onnx")


def test_sides_must_be_multiples_of_the_divisor(make):
    for shape, got in (((1, 3, 64, 100), "64 x 100"), ((1, 3, 0, 64), "0 x 64")):
        with pytest.raises(FileError, match=f"sides must be multiples of 32, got {got}"):
            make(Network()).outputs(np.zeros(shape, np.float32), np.zeros((1, 2), np.int64))


def test_threads_reach_the_engine(foreign, monkeypatch):
    threads = []
    session = onnxruntime.InferenceSession

    def spy(path, options, **others):
        threads.append(options.intra_op_num_threads)
        return session(path, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    for count in ((), (3,)):
        with pytest.raises(FileError, match="no exported detector"):
            load(foreign, *count)
    assert threads == [0, 3]


def test_version_is_that_of_atss():
    import atss

    assert atss_runner.__version__ == atss.__version__


def test_tiles_are_images_of_their_own(make):
    """A tile of 96 pixels is not resized: a network that detects its brightest pixel finds that of
    each tile, in pixels of the image."""
    sizes = []

    def network(pixels, _):
        sizes.append(pixels.shape)
        y, x = (pixels[0].sum(axis=0) > 600).nonzero()
        box = [x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [0, 0, 0, 0]
        found = np.array([[box]], np.float32), np.full((1, 1), 0.9, np.float32)
        return *found, np.zeros((1, 1), np.int64), np.array([int(len(x) > 0)])

    image = np.zeros((200, 300, 3), np.uint8)
    image[100:110, 150:160] = 255
    inside = {"nms_inside": True, "inputs": ["image", "sizes"]}
    inside["outputs"] = ["boxes", "scores", "classes", "count"]
    detector = make(network, batch=1, tiles=0, **inside, stored={"size": 96, "whole": False})
    found = detector(image)
    assert found.boxes.tolist() == [[150, 100, 160, 110]]
    assert set(sizes) == {(1, 3, 96, 96)}
    assert len(sizes) == len(detector.tiles.boxes(200, 300)) == 12


@pytest.mark.parametrize(
    ("stored", "size", "message"),
    [
        ({}, 0, "the file has no size of tiles for its training data"),
        ({"size": 96}, 31, "the size of tiles must be >= 32 pixels, got 31"),
        ({}, -1, "the size of tiles must be >= 32 pixels, got -1"),
        ([], 0, "has damaged metadata 'atss': tiles is"),
    ],
)
def test_wrong_size_of_tiles_is_an_error(make, stored, size, message):
    with pytest.raises(FileError, match=message):
        make(tiles=size, stored=stored)
