"""An exported file beside the detector that it was made of."""

import json
import shutil
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported import THRESHOLDS, build, export_once

import atss_runner
from atss import Predictor
from atss.errors import UserError
from atss.export import convert_precision, export_onnx, export_openvino, files, parts

SLOW_FORMS = ("in_openvino", "class_agnostic", "class_agnostic_in_openvino")
FORMS = ["exported", "with_nms", *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW_FORMS)]
AGNOSTIC = ("MODEL.ATSS.CLASS_AGNOSTIC_NMS", True, "TEST.DETECTIONS_PER_IMAGE", 300)


def with_predictor(folder, name="model.onnx"):
    """Return the file, and a Predictor of the same weights."""
    return folder / name, Predictor(folder)


def export(folder, export_file, name, opts=(), **options):
    """Return the file, and a Predictor of the same weights."""
    cfg, model = build(*opts)
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    export_file(model, cfg, folder / name, **options)
    return folder / name, Predictor(cfg, folder / "model.pth")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return with_predictor(export_once(tmp_path_factory))


@pytest.fixture(scope="module")
def with_nms(tmp_path_factory):
    return with_predictor(export_once(tmp_path_factory, nms=True))


@pytest.fixture(scope="module")
def in_openvino(tmp_path_factory):
    pytest.importorskip("openvino")
    folder = tmp_path_factory.mktemp("openvino")
    shutil.copytree(export_once(tmp_path_factory), folder, dirs_exist_ok=True)
    cfg, model = build()
    export_openvino(model, cfg, folder / "model.xml", nms=True)
    return with_predictor(folder, "model.xml")


@pytest.fixture(scope="module")
def class_agnostic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("class_agnostic")
    return export(folder, export_onnx, "model.onnx", AGNOSTIC, nms=True)


@pytest.fixture(scope="module")
def class_agnostic_in_openvino(tmp_path_factory):
    pytest.importorskip("openvino")
    folder = tmp_path_factory.mktemp("class_agnostic_in_openvino")
    return export(folder, export_openvino, "model.xml", AGNOSTIC, nms=True)


def assert_equal(found, expected):
    assert len(found.boxes) == len(expected.boxes) > 0
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    for box, k in zip(expected.boxes, expected.classes, strict=True):
        same = (found.classes == k) & (np.abs(found.boxes - box).max(axis=1) < 1e-2)
        assert same.any()


@pytest.mark.parametrize("form", FORMS)
def test_detections_are_those_of_the_predictor(form, squares, request):
    file, predictor = request.getfixturevalue(form)
    images = sorted(map(str, (squares / "images").iterdir()))
    detector = atss_runner.load(file)
    for found, expected in zip(detector(images), predictor(images), strict=True):
        assert_equal(found, expected)
    assert detector.names == predictor.names
    assert_equal(detector(images[0]), predictor(images[0]))


def test_thresholds_are_in_the_metadata(exported):
    """The tool passes those of a report; calls return all detections."""
    detector = atss_runner.load(exported[0])
    assert detector.thresholds == THRESHOLDS
    found = detector(np.random.default_rng(0).integers(0, 255, (90, 80, 3), np.uint8))
    assert (found.scores[found.classes == 2] < THRESHOLDS[2]).any()


@pytest.mark.parametrize("form", FORMS)
def test_file_names_no_local_path(form, request):
    file, _ = request.getfixturevalue(form)
    for part in parts(file):
        content = part.read_bytes()
        assert b".py" not in content
        assert str(file.parent).encode() not in content


def test_file_with_nms_takes_any_batch_and_its_sizes(with_nms):
    session = onnxruntime.InferenceSession(str(with_nms[0]))
    assert [x.name for x in session.get_inputs()] == ["image", "sizes"]
    assert [x.name for x in session.get_outputs()] == ["boxes", "scores", "classes", "count"]
    pixels = np.random.default_rng(0).uniform(0, 255, (3, 3, 128, 160)).astype(np.float32)
    sizes = np.array([[128, 160], [90, 160], [128, 70]])
    boxes, scores, classes, count = session.run(None, {"image": pixels, "sizes": sizes})
    assert boxes.shape == (3, 100, 4)
    assert set(np.unique(classes)) == {0, 1, 2}
    for i, (height, width) in enumerate(sizes):
        assert count[i] == 100
        assert (boxes[i].max(axis=0) <= [width, height] * 2).all()
        alone = {"image": pixels[i : i + 1], "sizes": sizes[i : i + 1]}
        np.testing.assert_allclose(session.run(None, alone)[1][0], scores[i], atol=1e-5)
    small = {"image": pixels[:1, :, :8, :8], "sizes": np.array([[8, 8]])}
    boxes, scores, classes, (count,) = session.run(None, small)
    assert 0 < count < 100
    assert not boxes[0, count:].any()
    assert not scores[0, count:].any()
    assert (classes[0, count:] == -1).all()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda file: file.write_text("no model"), "cannot load"),
        (lambda file: file.write_bytes(file.read_bytes()[:9999]), "cannot load"),
        (lambda file: change(file, None), "no exported detector: it has no metadata"),
        (lambda file: change(file, {"schema": 3}), "schema 3, this runner reads up to 2"),
        (lambda file: file.unlink(), "does not exist"),
    ],
)
def test_other_files_are_refused(exported, tmp_path, spoil, sentence):
    file = tmp_path / "model.onnx"
    file.write_bytes(exported[0].read_bytes())
    spoil(file)
    with pytest.raises(atss_runner.FileError, match=f"model.onnx .*{sentence}|{sentence}.*onnx"):
        atss_runner.load(file)


def change(file, values):
    model = onnx.load(str(file))
    (entry,) = model.metadata_props
    if values is None:
        del model.metadata_props[:]
    else:
        entry.value = json.dumps(json.loads(entry.value) | values)
    onnx.save(model, str(file))


@pytest.mark.slow
def test_damaged_openvino_files_are_refused(in_openvino, tmp_path):
    content = in_openvino[0].read_bytes()
    weights = in_openvino[0].with_suffix(".bin").read_bytes()
    file = tmp_path / "model.xml"
    for xml, binary, sentence in (
        (content[:9999], weights, "cannot load"),
        (content, weights[:9999], "cannot load"),
        (content, None, "cannot load"),
        (content.replace(b"<atss", b"<other"), weights, "no exported detector|cannot load"),
    ):
        file.write_bytes(xml)
        file.with_suffix(".bin").unlink(missing_ok=True)
        if binary is not None:
            file.with_suffix(".bin").write_bytes(binary)
        with pytest.raises(atss_runner.FileError, match=sentence):
            atss_runner.load(file)


def test_sides_must_be_multiples_of_the_divisor(exported):
    detector = atss_runner.load(exported[0])
    with pytest.raises(atss_runner.FileError, match=r"multiples of \d+, got 100 x 128"):
        detector.outputs(np.zeros((1, 3, 100, 128), np.float32), np.array([[100, 128]]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "precision"),
    [("exported", "fp16"), ("with_nms", "fp16"), ("with_nms", "int8"), ("in_openvino", "fp16")],
)
def test_smaller_files_detect_alike(form, precision, request, squares, tmp_path):
    file, predictor = request.getfixturevalue(form)
    smaller = tmp_path / file.name
    for part in parts(file):
        (tmp_path / part.name).write_bytes(part.read_bytes())
    convert_precision(smaller, precision, str(squares / "images"))
    assert sorted(tmp_path.iterdir()) == sorted(parts(smaller))
    assert parts(smaller)[-1].stat().st_size < 0.6 * parts(file)[-1].stat().st_size
    detector = atss_runner.load(smaller)
    assert detector.settings == atss_runner.load(file).settings
    image = min((squares / "images").iterdir())
    scores, expected = detector(image).scores, predictor(str(image)).scores
    np.testing.assert_allclose(scores[:10], expected[:10], rtol=0.05)


def test_int8_leaves_two_convolutions_and_all_else_in_float(exported, squares, tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(exported[0].read_bytes())
    convert_precision(file, "int8", str(squares / "images"))
    nodes = onnx.load(str(file)).graph.node
    makers = {name: node.op_type for node in nodes for name in node.output}
    quantised = [makers.get(x.input[1]) == "DequantizeLinear" for x in nodes if x.op_type == "Conv"]
    assert quantised == [False, False] + [True] * (len(quantised) - 2)
    readers = {x.op_type for x in nodes if "DequantizeLinear" in map(makers.get, x.input)}
    assert "Sigmoid" not in readers
    image = str(min((squares / "images").iterdir()))
    scores, expected = (x(image).scores for x in (atss_runner.load(file), exported[1]))
    np.testing.assert_allclose(scores[:10], expected[:10], rtol=0.05)


def test_int8_needs_images(exported, tmp_path):
    with pytest.raises(UserError, match=r"--calibrate .* contains no image"):
        convert_precision(exported[0], "int8", str(tmp_path))


def test_missing_package_is_named(monkeypatch, tmp_path):
    """The command works beside a wheel, too."""
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    cfg, model = build()
    sentence = r"needs onnxscript: pip install 'atss-detectron2\[export\]'"
    with pytest.raises(UserError, match=sentence):
        export_onnx(model, cfg, tmp_path / "model.onnx")


def test_config_without_class_names_is_refused(tmp_path):
    cfg, model = build()
    cfg.MODEL.ATSS.CLASS_NAMES = []
    with pytest.raises(UserError, match="no class names"):
        export_onnx(model, cfg, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_file_that_differs_is_removed(exported, tmp_path, monkeypatch):
    cfg, model = build()
    raw = model.raw

    def differing(pixels):
        boxes, *others = raw(pixels)
        return boxes + 1, *others

    def copy(*_):
        return lambda path, settings: shutil.copy(exported[0], path)

    monkeypatch.setattr(model, "raw", differing)
    monkeypatch.setattr(files, "to_onnx", copy)
    monkeypatch.setattr(files, "export_program", lambda *_: None)
    with pytest.raises(UserError, match="the exported file differs from the detector: boxes by 1"):
        export_onnx(model, cfg, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("export_file", "name", "opts"),
    [
        (export_onnx, "model.onnx", ("MODEL.ATSS.SUPPRESSION", "none")),
        (export_onnx, "model.onnx", ("MODEL.ATSS.RANK_ANCHORS", True)),
        (export_openvino, "model.xml", ("MODEL.ATSS.SUPPRESSION", "none")),
    ],
)
def test_forms_of_selection_export(export_file, name, opts, tmp_path):
    cfg, model = build(*opts)
    for parity in export_file(model, cfg, tmp_path / name, nms=True):
        assert parity.detections[0] > 0
