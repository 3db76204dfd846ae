"""Training, detection and export with all planes of images."""

import json
import shlex

import check_dataset
import cv2
import numpy as np
import pytest
import torch
from conftest import TINY, make_cfg
from detectron2.modeling import build_model
from PIL import Image

import atss_runner
from atss import Predictor
from atss.data.datasets import register
from atss.data.mapper import Mapper
from atss.engine import Trainer
from atss.errors import UserError
from atss.export import export_onnx
from atss.weights import widen_first
from atss_runner.media import FileError
from atss_runner.planes import Planes, resize_planes

FOUR = (
    *("INPUT.FORMAT", "planes", "INPUT.HIGHEST", 65535, "INPUT.SHOWN_PLANES", [3, 1, 0]),
    *("MODEL.PIXEL_MEAN", [100.0] * 4, "MODEL.PIXEL_STD", [50.0] * 4),
)


@pytest.fixture(scope="module")
def planes(squares, tmp_path_factory):
    """The squares in 16 bits, with a fourth plane."""
    folder = tmp_path_factory.mktemp("planes")
    content = json.loads((squares / "annotations.json").read_text())
    for image in content["images"]:
        pixels = np.asarray(Image.open(squares / "images" / image["file_name"]).convert("RGB"))
        wide = np.dstack([pixels[:, :, ::-1], pixels.max(axis=2)]).astype(np.uint16) * 257
        image["file_name"] = f"{image['id']}.png"
        cv2.imwrite(str(folder / image["file_name"]), wide)
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


def test_three_bytes_equal_the_rgb_path(squares):
    """Bit for bit, with resizing, jitter and flips."""
    file_name = str(next((squares / "images").iterdir()))
    record = {"file_name": file_name, "image_id": 0, "annotations": []}
    shared = ("INPUT.SCALE_JITTER", [0.5, 2.0], "INPUT.SCALE_JITTER_SIZE", 64)
    mapped = []
    for name in ("RGB", "planes"):
        mapper = Mapper(make_cfg("INPUT.FORMAT", name, *shared), is_train=True)
        np.random.seed(3)
        mapped.append(mapper(record)["image"])
    assert mapped[0].dtype == mapped[1].dtype == torch.uint8
    assert torch.equal(*mapped)


@pytest.mark.parametrize("opts", [(), ("INPUT.FULL_SIZE_CROP", 1e-9)])
def test_sixteen_bits_are_resized_as_in_detection(planes, opts):
    file = next(planes.glob("*.png"))
    sizes = ("INPUT.MIN_SIZE_TRAIN", (48,), "INPUT.MIN_SIZE_TEST", 48, "INPUT.RANDOM_FLIP", "none")
    mapper = Mapper(make_cfg(*FOUR, *sizes, *opts), is_train=bool(opts))
    found = mapper({"file_name": str(file), "image_id": 0, "annotations": []})["image"]
    pixels = Planes(4, 65535, (0, 1, 2)).scale(Planes.read(file.read_bytes()))
    assert found.shape[1] == 48 < len(pixels)
    expected = resize_planes(pixels, *found.shape[1:])
    np.testing.assert_array_equal(found.permute(1, 2, 0), expected)


def train_and_detect(planes, tmp_path):
    register(f"planes={planes}/annotations.json:{planes}")
    opts = (*(x for item in TINY.items() for x in item), *FOUR, "VIS_PERIOD", 1)
    names = ("MODEL.ATSS.NUM_CLASSES", 2, "MODEL.ATSS.CLASS_NAMES", ["a", "b"])
    solver = ("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 1, "DATALOADER.NUM_WORKERS", 0)
    names += ("MODEL.ATSS.SCORE_THRESH_TEST", 0.0)
    sizes = ("INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64, "INPUT.COLOR_JITTER", 0.2)
    cfg = make_cfg(*opts, *names, *solver, *sizes, "DATASETS.TRAIN", ("planes",))
    cfg.OUTPUT_DIR = str(tmp_path)
    trainer = Trainer(cfg)
    trainer.train()
    file = sorted(planes.glob("*.png"))[0]
    predictor = Predictor(cfg, tmp_path / "model_final.pth")
    expected = predictor(str(file))
    record = {"file_name": str(file), "image_id": 0}
    with torch.no_grad():
        (found,) = trainer.model.eval()([Mapper(cfg, is_train=False)(record)])
    np.testing.assert_allclose(found["instances"].scores, expected.scores, atol=1e-6)
    assert predictor.show(str(file)).size[0] >= 640
    with pytest.raises(UserError, match="the image cannot be used: it has 3 planes"):
        predictor(predictor.read(str(file))[:, :, :3])
    return cfg, file, predictor, expected


def test_trains_and_detects(planes, tmp_path, monkeypatch):
    """On tiles, too, whose planes are scaled one by one."""
    cfg, file, _, expected = train_and_detect(planes, tmp_path)
    shapes, scale = [], Planes.scale
    monkeypatch.setattr(
        Planes, "scale", lambda self, x: shapes.append(x.shape[:2]) or scale(self, x)
    )
    weights, tiles = tmp_path / "model_final.pth", ("TEST.TILES.ENABLED", True, "TEST.TILES.SIZE")
    found = Predictor(cfg, weights, [*tiles, 128])(str(file))
    assert all(map(np.array_equal, found, expected))
    shapes.clear()
    opts = [*tiles, 64, "TEST.TILES.WHOLE", False]
    assert len(Predictor(cfg, weights, opts)(str(file)).boxes)
    assert set(shapes) == {(64, 64)}


@pytest.mark.slow
def test_exported_file_reads_planes(planes, tmp_path):
    cfg, file, predictor, expected = train_and_detect(planes, tmp_path)
    model = build_model(cfg).eval()
    model.load_state_dict(torch.load(tmp_path / "model_final.pth")["model"])
    export_onnx(model, cfg, tmp_path / "model.onnx")
    detector = atss_runner.load(tmp_path / "model.onnx")
    found = detector(str(file))
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-2)
    array = detector.read(str(file))
    np.testing.assert_array_equal(detector(array).boxes, found.boxes)
    np.testing.assert_array_equal(detector.picture(array), predictor.picture(array))
    with pytest.raises(FileError, match=r"it has 8 bits, but INPUT\.HIGHEST is"):
        detector(np.zeros((9, 9, 4), np.uint8))


def test_shown_planes_must_exist():
    with pytest.raises(UserError, match=r"SHOWN_PLANES is \[0, 1, 4\]: three planes of 0 to 3"):
        Mapper(make_cfg(*FOUR, "INPUT.SHOWN_PLANES", [0, 1, 4]), is_train=True)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_first_convolution_is_widened_as_timm_does(channels):
    adapt = pytest.importorskip("timm.models").adapt_input_conv
    narrow, other = torch.rand(8, 3, 3, 3), torch.rand(8, 8, 3, 3)
    model = torch.nn.Sequential(torch.nn.Conv2d(channels, 8, 3), torch.nn.Conv2d(8, 8, 3))
    widened = widen_first({"a": narrow, "b": other}, model, channels)
    assert torch.equal(widened["a"], adapt(channels, narrow))
    assert widened["b"] is other


def test_only_the_first_convolution_is_widened():
    """Nor another of three channels, and versions of modules stay. A level of the pyramid may have
    as many channels as the image has planes."""
    first, grouped = torch.nn.Conv2d(8, 6, 3), torch.nn.Conv2d(9, 6, 3, groups=3)
    model = torch.nn.ModuleDict({"fpn": torch.nn.Conv2d(8, 4, 1), "a": first, "b": grouped})
    weights = model.state_dict() | {"a.weight": torch.rand(6, 3, 3, 3)}
    weights._metadata = model.state_dict()._metadata
    widened = widen_first(weights, model, 8)
    model.load_state_dict(widened)
    assert torch.equal(first.weight[:, 6:], weights["a.weight"][:, :2] * 3 / 8)
    assert widened._metadata is weights._metadata
    assert widen_first(weights, model, 3) is weights


def test_pretrained_timm_backbone_takes_four_planes(tmp_path):
    timm = pytest.importorskip("timm")
    weights = timm.create_model("resnet18").state_dict()
    torch.save(weights, tmp_path / "resnet18.pth")
    cfg = make_cfg(*FOUR, config="ATSS_lite0_FPN_fine_tune.yaml")
    cfg.merge_from_list(["MODEL.TIMM.NAME", "resnet18", "MODEL.TIMM.PIXELS", False])
    cfg.merge_from_list(["MODEL.TIMM.WEIGHTS", str(tmp_path / "resnet18.pth")])
    first = build_model(cfg).backbone.bottom_up.net.conv1.weight
    expected = weights["conv1.weight"].repeat(1, 2, 1, 1)[:, :4] * 0.75
    assert torch.equal(first, expected)


def test_check_prints_keys_of_the_planes(planes, capsys):
    """Whose means and deviations are those of the pixels."""
    arguments = [f"{planes}/annotations.json:{planes}", "--config-file", "ATSS_R_18_FPN_small"]
    assert check_dataset.main([*arguments, "--planes"]) == 0
    printed = shlex.split(capsys.readouterr().out)
    values = dict(zip(printed[::2], printed[1::2], strict=True))
    assert values["INPUT.HIGHEST"] == "65535"
    stack = [cv2.imread(str(x), cv2.IMREAD_UNCHANGED) for x in planes.glob("*.png")]
    pixels = np.concatenate([x[:, :, [2, 1, 0, 3]].reshape(-1, 4) / 257 for x in stack])
    np.testing.assert_allclose(json.loads(values["MODEL.PIXEL_MEAN"]), pixels.mean(0), atol=1e-3)
    np.testing.assert_allclose(json.loads(values["MODEL.PIXEL_STD"]), pixels.std(0), atol=1e-3)
    assert check_dataset.main([*arguments, *printed]) == 0
    wrong = [*arguments, *printed, "INPUT.HIGHEST", "255"]
    assert check_dataset.main(wrong) == 1
    assert "above INPUT.HIGHEST 255" in capsys.readouterr().out
