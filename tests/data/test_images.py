"""Images: opened once, also at addresses."""

import json
import traceback
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from conftest import make_cfg
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from PIL import Image

from atss.data import Mapper, datasets
from atss.data.images import read_image
from atss.data.loader import WatchedLoader, build_train_loader, seeded
from atss.errors import UserError
from atss.labels.headers import ORIENTATION

SIZE = (60, 40)


@pytest.fixture
def opened(monkeypatch):
    """Names of the opened files, in order."""
    names, original = [], PathManager.open
    monkeypatch.setattr(PathManager, "open", lambda x, *y: names.append(str(x)) or original(x, *y))
    return names


def save(path, mode="RGB", orientation=1):
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).convert(mode).save(path, exif=exif)
    return str(path)


@pytest.mark.parametrize(
    ("name", "mode", "orientation"),
    [("a.png", "RGB", 1), ("a.jpg", "RGB", 1), ("a.jpg", "L", 6), ("a.png", "P", 1)],
)
@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("image_format", ["BGR", "L", "YUV-BT.601"])
def test_mapper_equals_detectron2s(
    name, mode, orientation, is_train, image_format, tmp_path, opened
):
    """And opens the file once."""
    file = save(tmp_path / name, mode, orientation)
    width, height = SIZE[::-1] if orientation == 6 else SIZE
    objects = [{"bbox": [5, 6, 20, 9], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}]
    record = {"file_name": file, "image_id": 3, "width": width, "height": height}
    record["annotations"] = [{**x, "iscrowd": 0} for x in objects]
    cfg = make_cfg("INPUT.FORMAT", image_format, "INPUT.CROP.ENABLED", True)
    if image_format == "L":
        cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [0.0], [1.0]
    mapper = Mapper(cfg, is_train)
    opened.clear()
    with seeded(1):
        own = mapper(record)
    assert opened == [file]
    with seeded(1):
        theirs = DatasetMapper(cfg, is_train)(record)
    assert own.keys() == theirs.keys()
    assert torch.equal(own["image"], theirs["image"].to(own["image"].dtype))
    if is_train:
        fields = [x.pop("instances").get_fields() for x in (own, theirs)]
        assert torch.equal(fields[0]["gt_boxes"].tensor, fields[1]["gt_boxes"].tensor)
        assert torch.equal(fields[0]["gt_classes"], fields[1]["gt_classes"])
    del own["image"], theirs["image"]
    assert own == theirs


def test_mapper_reads_classes_of_pixels(tmp_path, opened):
    """For semantic segmentation, as Detectron2's mapper does."""
    files = [save(tmp_path / "a.jpg"), save(tmp_path / "b.png", "L")]
    record = {"file_name": files[0], "sem_seg_file_name": files[1]}
    cfg = make_cfg("INPUT.MIN_SIZE_TRAIN", (30,))
    opened.clear()
    with seeded(1):
        own = Mapper(cfg, is_train=True)(record)
    assert opened == files
    with seeded(1):
        theirs = DatasetMapper(cfg, is_train=True)(record)
    assert own.keys() == theirs.keys()
    assert torch.equal(own["sem_seg"], theirs["sem_seg"])


def test_prediction_opens_a_file_once(tmp_path, opened):
    file = save(tmp_path / "a.png")
    assert read_image(file).shape == (*SIZE[::-1], 3)
    assert opened == [file]


class Failing(T.Augmentation):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def get_transform(self, image):
        raise self.error


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("record", "error", "kind", "message"),
    [
        ({"file_name": "{}/no.png"}, None, OSError, "cannot read the image {}/no.png: "),
        ({"width": 9, "height": 9}, None, UserError, "the image {}/a.png is 60 x 40 pixels, but"),
        (
            {"sem_seg_file_name": "{}/no.png"},
            None,
            OSError,
            "cannot read the image {}/no.png: ",
        ),
        ({}, UserError("no box"), UserError, "the image {}/a.png cannot be mapped: no box"),
        ({}, OSError("no disk"), OSError, "the image {}/a.png cannot be mapped: no disk"),
        ({}, ValueError("a bug"), ValueError, "in mapping {}/a.png"),
    ],
)
def test_errors_name_the_file(record, error, kind, message, workers, tmp_path, monkeypatch):
    """In the last line, also from a loading process."""
    values = {"file_name": save(tmp_path / "a.png")} | record
    record = {k: x.format(tmp_path) if isinstance(x, str) else x for k, x in values.items()}
    mapper = Mapper(make_cfg(), is_train=True)
    if error:
        monkeypatch.setattr(mapper, "augmentations", T.AugmentationList([Failing(error)]))
    loader = WatchedLoader([record], num_workers=workers, collate_fn=lambda x: mapper(x[0]))
    with pytest.raises(kind) as caught:
        next(iter(loader))
    last = "".join(traceback.format_exception(caught.value)).strip().splitlines()[-1]
    assert message.format(tmp_path) in last


@pytest.mark.parametrize("workers", [0, 1])
def test_images_at_addresses(workers, tmp_path, opened):
    """In a file system of fsspec that Detectron2 has not."""
    system = fsspec.filesystem("memory")
    for i in range(2):
        system.pipe(f"/pictures/{i}.png", Path(save(tmp_path / f"{i}.png")).read_bytes())
    size = {"width": SIZE[0], "height": SIZE[1]}
    images = [{"id": i, "file_name": f"{i}.png", **size} for i in range(2)]
    annotations = [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 2, 9, 9]} for i in (0, 1)]
    content = {"images": images, "annotations": annotations}
    (tmp_path / "a.json").write_text(
        json.dumps({**content, "categories": [{"id": 1, "name": "x"}]})
    )
    batches = []
    for name, folder in (("local", tmp_path), ("remote", "memory://pictures")):
        datasets.register(f"{name}={tmp_path}/a.json:{folder}")
        datasets.refuse_missing_images([name])
        opts = ("DATASETS.TRAIN", (name,), "DATALOADER.NUM_WORKERS", workers, "SEED", 1)
        cfg = make_cfg(*opts, "SOLVER.IMS_PER_BATCH", 2)
        loader = build_train_loader(cfg, Mapper(cfg, is_train=True))
        batches.append(next(iter(loader)))
    assert DatasetCatalog.get("remote")[1]["file_name"] == "memory://pictures/1.png"
    for local, remote in zip(*batches, strict=True):
        assert local["image_id"] == remote["image_id"]
        assert torch.equal(local["image"], remote["image"])
    system.rm("/pictures/0.png")
    with pytest.raises(ValueError, match=r"remote: 2 of 2 images do not exist, such as memory://p"):
        datasets.refuse_missing_images(["remote"])
