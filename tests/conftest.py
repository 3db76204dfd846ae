"""Fixtures and configs of several tests: real data, a tiny data set, a tiny model."""

import json
import os
import socket
import sys
from collections.abc import Iterator
from functools import reduce, wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import defaults
from detectron2.structures import Boxes, Instances
from detectron2.utils.env import seed_all_rng
from PIL import Image, ImageFilter
from processes import reset_signals

from atss import GroundTruth, add_atss_config
from atss.assigners import Matching, MaxIoU, use_engine
from atss.assigners.engine import table_limit
from atss.config import config_names

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).with_name("golden")
# Files of configs/ that are only a part of a config.
PARTS = ("Base-ATSS", "small", "ablation", "digits", "fine_tune", "fine_tune_coco")
CONFIGS = [name for name in config_names() if name not in PARTS]
# A thin ResNet-50, which takes a quarter of the time of a ResNet-18.
THIN = {
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
}
# A network of 0.06 million weights, for tests of the training around it.
TINY = THIN | {
    "MODEL.RESNETS.OUT_FEATURES": ["res2"],
    "MODEL.FPN.IN_FEATURES": ["res2"],
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.ATSS.IN_FEATURES": ["p2", "p3", "p4"],
    "MODEL.ATSS.NUM_CONVS": 1,
}
NARROW = ("MODEL.FPN.OUT_CHANNELS", 32, *(x for item in THIN.items() for x in item))
# TINY with 5 million weights, for tests that depend on the size of checkpoints.
LARGER = {
    "MODEL.RESNETS.WIDTH_PER_GROUP": 64,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 128,
    "MODEL.RESNETS.OUT_FEATURES": ["res4"],
    "MODEL.FPN.IN_FEATURES": ["res4"],
    "MODEL.ATSS.IN_FEATURES": ["p4", "p5", "p6"],
}
# TINY with GroupNorm: of 32 channels, each group would hold one, and its bias had no gradient.
WIDE_FOR_GN = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 64,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.FPN.OUT_CHANNELS": 64,
}


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all tests but those of `make test-gpu`."""
    reset_signals()
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise pytest.UsageError("-m gpu needs a GPU, and torch finds none")


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Each test, with its fixtures, draws the same numbers whatever ran before it.
    seed_all_rng(0)
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU: make test-gpu")


def make_cfg(*opts: object, config: str = "") -> CfgNode:
    """Return a config for the CPU, without data sets and weights.

    Args:
        opts: keys and values over it.
        config: a file in configs/; if empty, the small config with a thin backbone.
    """
    cfg = get_cfg()
    add_atss_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / (config or "ATSS_R_18_FPN_small.yaml")))
    if not config:
        cfg.merge_from_list([x for item in THIN.items() for x in item])
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    cfg.MODEL.ATSS.NUM_CLASSES = 3
    cfg.MODEL.ATSS.PRECISION = "fp32"
    cfg.merge_from_list(list(opts))
    return cfg


def make_gt(boxes, image_index=None, num_images=1, classes=None) -> GroundTruth:
    """Return a GroundTruth of lists."""
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    zeros = torch.zeros(len(boxes), dtype=torch.long)
    image_index = zeros if image_index is None else torch.as_tensor(image_index)
    classes = zeros if classes is None else torch.as_tensor(classes)
    return GroundTruth(boxes, classes, image_index, num_images)


def make_input(boxes=(), classes=(), hw=(96, 128), seed=0) -> dict:
    """Return one training image in Detectron2's format."""
    generator = torch.Generator().manual_seed(seed)
    instances = Instances(hw)
    instances.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.as_tensor(classes, dtype=torch.long)
    image = torch.rand(3, *hw, generator=generator) * 255
    return {"image": image, "instances": instances, "height": hw[0], "width": hw[1]}


@pytest.fixture
def both_engines(monkeypatch) -> None:
    """Run each call of a rule on lists and on tables, and compare the assignments."""

    def compared(call):
        @wraps(call)
        def on_both(rule, anchors, gt, predictions=None):
            with use_engine("lists"):
                expected = call(rule, anchors, gt, predictions)
            with use_engine("tables", table_limit()):
                other = call(rule, anchors, gt, predictions)
            assert torch.equal(other.gt_index, expected.gt_index)
            assert (other.score is None) == (expected.score is None)
            assert other.score is None or torch.equal(other.score, expected.score)
            return expected

        return on_both

    for rule in (Matching, MaxIoU):
        monkeypatch.setattr(rule, "__call__", compared(rule.__call__))


@pytest.fixture
def new_setuptools(monkeypatch):
    """Hide pkg_resources, which setuptools 82 and newer do not have."""
    monkeypatch.setitem(sys.modules, "pkg_resources", None)
    for name in [x for x in sys.modules if x.startswith("detectron2.model_zoo")]:
        monkeypatch.delitem(sys.modules, name)


def photograph(seed, size=(120, 90)):
    """Return smooth noise: for each seed another image, as different as photographs."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (90, 120, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(3))
    return image.resize(size)


@pytest.fixture(scope="session", autouse=True)
def quick_setup() -> Iterator[None]:
    """Look up keys directly: Detectron2's setup writes and parses the whole config for each key,
    which takes a third of a short training."""

    def look_up(cfg: CfgNode, *keys: str, default: object = None) -> object:
        for key in keys:
            try:
                return reduce(CfgNode.__getitem__, key.split("."), cfg)
            except KeyError:
                continue
        return default

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(defaults, "_try_get_key", look_up)
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_end_of_loaders() -> Iterator[None]:
    """Shorten torch's wait for the workers of a loader that garbage collection ends: 5 s, as they
    miss the message to end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images; skips the test if it does not exist."""
    path = Path(os.environ.get("ATSS_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real images at {path}: set ATSS_TEST_DATA to their folder")
    return path


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory) -> Iterator[None]:
    """Cache labels in a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FVCORE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def own_catalogs() -> Iterator[None]:
    """Remove data sets that a test registers."""
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


@pytest.fixture(scope="session")
def squares(tmp_path_factory) -> Path:
    """A data set in COCO's format: squares on noise in 8 images, 2 classes, one image empty."""
    root = tmp_path_factory.mktemp("squares")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(8):
        pixels = rng.integers(0, 60, (96, 128, 3), dtype=np.uint8)
        images.append({"id": i, "file_name": f"{i}.png", "width": 128, "height": 96})
        for _ in range(0 if i == 7 else 3):
            side = int(rng.integers(16, 48))
            x, y = int(rng.integers(0, 128 - side)), int(rng.integers(0, 96 - side))
            category = int(rng.integers(2))
            pixels[y : y + side, x : x + side] = (255, 80, 0) if category else (0, 200, 255)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": 5 + category,
                    "bbox": [x, y, side, side],
                    "area": side * side,
                    "iscrowd": 0,
                }
            )
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
    categories = [{"id": 5, "name": "blue"}, {"id": 6, "name": "orange"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def free_port() -> int:
    """A port of this machine that is not in use."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
