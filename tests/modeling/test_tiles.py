"""Tiles in the detector, the Predictor, evaluations and the config."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY, make_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from atss import load_config
from atss.config import build_tiled, build_tiles, build_tta, check_model, complete_tiles
from atss.data.datasets import register
from atss.engine.trainer import Trainer
from atss.errors import UserError
from atss.export.files import metadata
from atss.labels.check import check, format_report
from atss.labels.formats import read_labels
from atss.predictor import Predictor
from atss_runner.media import FileError
from atss_runner.tiles import choose_tiles

SMALL = [x for item in TINY.items() for x in item]
ON = ("TEST.TILES.ENABLED", True)
# fmt: off
OPTS = (
    *SMALL, "INPUT.MIN_SIZE_TEST", 64, "MODEL.ATSS.SCORE_THRESH_TEST", 0.0,
    "MODEL.ATSS.TOPK_CANDIDATES_TEST", 20, "TEST.DETECTIONS_PER_IMAGE", 30,
)
# fmt: on
PIXELS = np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)  # BGR


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("tiles") / "model.pth"
    torch.save({"model": build_model(make_cfg(*OPTS)).state_dict()}, file)
    return file


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_image_of_one_tile_has_the_detections_without_tiles(weights, image_format):
    opts = *OPTS, "INPUT.FORMAT", image_format
    expected = Predictor(make_cfg(*opts), weights)(PIXELS)
    found = Predictor(make_cfg(*opts, *ON, "TEST.TILES.SIZE", 128), weights)(PIXELS)
    assert all(map(np.array_equal, found, expected))
    assert len(found.boxes)


def test_tile_is_an_image_of_its_own(weights):
    predictor = Predictor(make_cfg(*OPTS), weights)
    tiled = Predictor(
        make_cfg(*OPTS, *ON, "TEST.TILES.SIZE", 64, "TEST.TILES.WHOLE", False), weights
    )
    tile = predictor(PIXELS[:64, :64])
    blank = np.zeros_like(PIXELS)
    blank[:64, :64] = PIXELS[:64, :64]
    found = tiled([blank])[0]
    inside = tile.boxes[(tile.boxes < 60).all(axis=1)]
    matches = [(np.abs(found.boxes - x).max(axis=1) < 1e-3).any() for x in inside]
    assert matches
    assert np.mean(matches) > 0.5  # others are suppressed by detections of neighbours
    assert found.boxes.max() > 64
    predicted = tiled.at_anchors(PIXELS)
    assert torch.equal(predicted.boxes, predictor.at_anchors(PIXELS).boxes)


def test_augmented_views_of_a_tile_are_those_of_an_image():
    cfg = make_cfg(*OPTS, *ON, "TEST.TILES.SIZE", 128, "TEST.AUG.MIN_SIZES", (96,))
    cfg.MODEL.ATSS.TTA.SIZE_RANGES = [[0, 10000]]
    augmented = build_tta(cfg, build_model(cfg)).eval()
    cfg.INPUT.MIN_SIZE_TEST = 0  # as for the loader
    image = {"image": torch.as_tensor(PIXELS.transpose(2, 0, 1).copy())}
    (expected,), (found,) = augmented([image]), build_tiled(cfg, augmented)([image])
    assert torch.equal(found["instances"].scores, expected["instances"].scores)
    assert len(found["instances"])


def test_exported_file_has_the_tiles_of_the_config():
    cfg = make_cfg(*OPTS, "TEST.TILES.SIZE_OF_DATA", 96, "TEST.TILES.MERGE", "ios")
    cfg.MODEL.ATSS.CLASS_NAMES, cfg.MODEL.ATSS.CLASS_AGNOSTIC_NMS = ["a", "b", "c"], True
    assert build_tiles(cfg).class_agnostic
    settings = json.loads(json.dumps(metadata(build_model(cfg).eval(), cfg)))
    assert choose_tiles(settings["tiles"], 0) == build_tiles(cfg)
    assert choose_tiles(settings["tiles"], 64).size == 64
    cfg.TEST.TILES.SIZE_OF_DATA = 0  # the rules of merging are known, the size is not
    settings = metadata(build_model(cfg).eval(), cfg)
    with pytest.raises(FileError, match="no size of tiles"):
        choose_tiles(settings["tiles"], 0)
    cfg.TEST.TILES.SIZE = 64
    assert choose_tiles(settings["tiles"], 64) == build_tiles(cfg)


def test_evaluation_is_that_of_the_predictor(squares, weights, tmp_path):
    register(f"test={squares / 'annotations.json'}:{squares / 'images'}")
    cfg = make_cfg(*OPTS, *ON, "TEST.TILES.SIZE", 64, "OUTPUT_DIR", str(tmp_path))
    cfg.MODEL.ATSS.NUM_CLASSES, cfg.DATASETS.TEST = 2, ("test",)
    cfg.DATALOADER.NUM_WORKERS = 0
    model = build_model(cfg).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    Trainer.test(cfg, model)
    assert not model.training
    results = json.loads(
        (tmp_path / "inference" / "test" / "coco_instances_results.json").read_text()
    )
    predictor = Predictor(cfg, tmp_path / "model.pth")
    for record in DatasetCatalog.get("test"):
        scores = sorted(x["score"] for x in results if x["image_id"] == record["image_id"])
        assert scores == sorted(predictor(record["file_name"]).scores.tolist())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("SIZE", 0, "TEST.TILES.SIZE is 0"),
        ("SIZE", -1, "TEST.TILES.SIZE must be >= 32, got -1"),
        ("SIZE", 31, "TEST.TILES.SIZE must be >= 32, got 31"),
        ("OVERLAP", 1.0, "TEST.TILES.OVERLAP must be between 0 and 0.9, got 1.0"),
        ("OVERLAP", -0.1, "TEST.TILES.OVERLAP must be between 0 and 0.9, got -0.1"),
        ("OVERLAP", float("nan"), "TEST.TILES.OVERLAP must be between 0 and 0.9, got nan"),
        ("BATCH", 0, "TEST.TILES.BATCH must be >= 1, got 0"),
        ("MERGE", "giou", "TEST.TILES.MERGE is 'giou': choose from"),
    ],
)
def test_wrong_value_names_its_key(key, value, message):
    cfg = make_cfg(*OPTS, *ON, "TEST.TILES.SIZE", 64)
    cfg.TEST.TILES[key] = value
    with pytest.raises(UserError, match=f"^{message}"):
        check_model(cfg, training=False)


def test_size_of_tiles_follows_the_training_data(squares, tmp_path):
    """Data sets of the user's code have no known areas."""
    source = str(squares / "annotations.json"), str(squares / "images")
    register(f"train={':'.join(source)}")
    DatasetCatalog.register("own", list)
    content = json.loads((squares / "annotations.json").read_text())
    areas = [x["area"] for x in content["annotations"]]
    size = round((np.mean(areas) / 0.03) ** 0.5 / 32) * 32
    cfg = make_cfg(*OPTS, *ON)
    cfg.DATASETS.TRAIN = ("train", "own")
    complete_tiles(cfg)
    assert cfg.TEST.TILES.SIZE_OF_DATA == size > 32
    assert build_tiled(cfg, torch.nn.Identity()).tiles.size == size
    report = check(read_labels(*source), [(96, 128)], filter_empty=True)
    assert report.to_dict()["tile_size"] == size
    assert f"images are much larger: {size} pixels" in format_report(report)
    for x in content["annotations"][1:]:
        x["iscrowd"] = 1
    content["annotations"][0]["bbox"] = [0, 0, 128, 96]
    (tmp_path / "large.json").write_text(json.dumps(content))
    register(f"large={tmp_path / 'large.json'}:{squares / 'images'}")
    mean = (sum(areas) + 128 * 96) / (len(areas) + 1)
    cfg.DATASETS.TRAIN = ("train", "large")
    complete_tiles(cfg)
    assert cfg.TEST.TILES.SIZE_OF_DATA == round((mean / 0.03) ** 0.5 / 32) * 32 > size
    cfg.DATASETS.TRAIN = ("own",)
    complete_tiles(cfg)
    assert cfg.TEST.TILES.SIZE_OF_DATA == 0


def test_two_stages_merge_by_the_threshold_of_their_detections():
    cfg = make_cfg("TEST.TILES.SIZE", 300, "MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.3)
    of_one_stage = build_tiles(cfg)
    assert of_one_stage.threshold == cfg.MODEL.ATSS.NMS_THRESH_TEST
    opts = ["TEST.TILES.SIZE", 300, "MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.3]
    two = load_config("two_stage/Faster_R_50_FPN_1x_ATSS_RPN", opts=opts)
    assert build_tiles(two).threshold == 0.3
