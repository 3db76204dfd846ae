"""Crops at full resolution: windows, boxes, objects that are cut, images that are not cropped."""

import numpy as np
import pytest
import torch
from conftest import make_cfg
from detectron2.structures import BoxMode
from PIL import Image

from atss.data.crops import share_inside
from atss.data.loader import seeded
from atss.data.mapper import Mapper

HEIGHT, WIDTH = 240, 320


def record(folder, *boxes, size=(HEIGHT, WIDTH)):
    """A dark image with bright boxes (x, y, width, height), whose brightness is 255."""
    pixels = np.full((*size, 3), 10, dtype=np.uint8)
    for x, y, width, height in boxes:
        pixels[y : y + height, x : x + width] = 255
    file = folder / "image.png"
    Image.fromarray(pixels).save(file)
    objects = [
        {"bbox": list(box), "bbox_mode": BoxMode.XYWH_ABS, "category_id": i}
        for i, box in enumerate(boxes)
    ]
    known = {"file_name": str(file), "height": size[0], "width": size[1]}
    return known | {"annotations": objects}


def mapped(example, *opts, times=40):
    values = {
        "INPUT.MIN_SIZE_TRAIN": (60,),
        "INPUT.MAX_SIZE_TRAIN": 80,
        "INPUT.FULL_SIZE_CROP": 1.0,
    }
    mapper = Mapper(make_cfg(*(x for item in values.items() for x in item), *opts))
    results = []
    for seed in range(times):
        with seeded(seed):
            results.append(mapper(example))
    return results


def sides(result):
    boxes = result["instances"].gt_boxes.tensor
    return (boxes[:, 2:] - boxes[:, :2]).tolist()


@pytest.mark.parametrize("resize", ["shortest", "stretch"])
def test_crops_have_the_size_of_resized_images_and_keep_objects(tmp_path, resize):
    """Boxes lie on their objects, at the image's own resolution; cut objects keep a tenth."""
    example = record(tmp_path, (100, 100, 30, 20))
    cut = 0
    for result in mapped(example, "INPUT.RESIZE", resize):
        assert result["image"].shape == (3, 60, 80)
        (box,) = result["instances"].gt_boxes.tensor.tolist()
        x, y = torch.meshgrid(torch.arange(80) + 0.5, torch.arange(60) + 0.5, indexing="xy")
        inside = (x > box[0]) & (y > box[1]) & (x < box[2]) & (y < box[3])
        assert torch.equal(inside, result["image"][0] > 128)
        assert inside.sum() >= 0.1 * 30 * 20
        cut += bool(inside.sum() < 30 * 20)
    assert 0 < cut < 40


def test_objects_with_less_than_the_share_are_dropped(tmp_path):
    example = record(tmp_path, (100, 100, 30, 20), (130, 90, 40, 40))
    found = mapped(example, "INPUT.FULL_SIZE_CROP_MIN_AREA", 1.0)
    assert all(sides(x) in ([[30, 20]], [[40, 40]], [[30, 20], [40, 40]]) for x in found)
    assert len({len(x["instances"]) for x in found}) == 2
    crowd = record(tmp_path, (100, 100, 30, 20), (250, 30, 30, 30))
    crowd["annotations"][1]["iscrowd"] = 1
    assert all(sides(x) == [[30, 20]] for x in mapped(crowd, "INPUT.FULL_SIZE_CROP_MIN_AREA", 1.0))


@pytest.mark.parametrize(
    ("boxes", "size", "opts"),
    [
        ([(10, 10, 300, 220)], (HEIGHT, WIDTH), ("INPUT.FULL_SIZE_CROP_MIN_AREA", 0.5)),
        ([(10, 10, 20, 20)], (60, 80), ()),
        ([(10, 10, 20, 20)], (30, 40), ()),
        ([(10, 10, 20, 20)], (HEIGHT, WIDTH), ("INPUT.FULL_SIZE_CROP", 0.0)),
    ],
    ids=["object larger than every crop", "image of the size", "small image", "off"],
)
def test_other_images_are_whole(tmp_path, boxes, size, opts):
    example = record(tmp_path, *boxes, size=size)
    scale = 60 / size[0]
    for result in mapped(example, *opts, times=5):
        assert result["image"].shape == (3, 60, 80)
        assert np.allclose(sides(result), [[boxes[0][2] * scale, boxes[0][3] * scale]])


def test_share_of_crops_and_images_without_objects(tmp_path):
    """A crop of an image without objects is any window."""
    example = record(tmp_path)
    example["annotations"] = []
    left = np.linspace(0, 255, WIDTH).astype(np.uint8)
    Image.fromarray(np.tile(left[None, :, None], (HEIGHT, 1, 3))).save(example["file_name"])
    spans = [int(x["image"][0, 0, -1]) - int(x["image"][0, 0, 0]) for x in mapped(example)]
    assert all(span < 80 for span in spans)
    mixed = mapped(example, "INPUT.FULL_SIZE_CROP", 0.5)
    whole = sum(int(x["image"][0, 0, -1]) - int(x["image"][0, 0, 0]) > 240 for x in mixed)
    assert 8 < whole < 32


def test_share_inside_of_boxes_without_area_is_zero():
    boxes = np.array([[0, 0, 10, 10], [5, 5, 5, 9], [-10, 0, 10, 10]], dtype=float)
    assert share_inside(boxes, (0, 0, 5, 20)).tolist() == [0.5, 0, 0.25]
