"""Mosaics: pictures and boxes move together, partners follow from the position."""

import numpy as np
import pytest
import torch
from conftest import make_cfg, make_input

from atss.data.datasets import register
from atss.data.loader import seeded
from atss.data.mosaic import Mosaic, put_together
from atss.engine import Trainer


def marked(value: int, hw=(96, 128), at=(40, 30)) -> dict:
    """A dark picture with a square, whose box is its object; its brightness is its class."""
    x, y = at
    piece = make_input([[x, y, x + 32, y + 32]], [value], hw=hw)
    piece["image"] = torch.full((3, *hw), 10, dtype=torch.uint8)
    piece["image"][:, y : y + 32, x : x + 32] = value
    return piece


@pytest.mark.parametrize("part", range(4))
def test_boxes_lie_on_their_objects(part):
    """In the part with the only bright square, the box contains exactly the bright pixels."""
    x, y = torch.meshgrid(torch.arange(128) + 0.5, torch.arange(96) + 0.5, indexing="xy")
    for seed in range(10):
        with seeded(seed):
            made = put_together([marked(210 if i == part else 10) for i in range(4)])
        image, objects = made["image"], made["instances"]
        assert image.shape == (3, 96, 128)
        assert image.dtype == torch.uint8
        assert objects.image_size == (96, 128)
        (box,) = objects.gt_boxes.tensor[objects.gt_classes == 210]
        bright = image[0] > 110
        inside = (x > box[0] - 1) & (y > box[1] - 1) & (x < box[2] + 1) & (y < box[3] + 1)
        assert not (bright & ~inside).any()
        assert bright.sum() == pytest.approx(float((box[2:] - box[:2]).prod()), rel=0.12)
        assert box[0] >= 44 if part % 2 else box[2] <= 84
        assert box[1] >= 33 if part >= 2 else box[3] <= 63


def test_nearly_cropped_objects_are_dropped():
    made = 0
    for seed in range(50):
        with seeded(seed):
            objects = put_together([marked(200, at=(0, 0)) for _ in range(4)])["instances"]
        made += len(objects)
        # Each side of an object is at least a third of its side in the image.
        assert (objects.gt_boxes.area() >= 0.1 * 11**2).all()
    assert 100 < made < 195


def test_pieces_without_objects_and_of_other_sizes():
    with seeded(1):
        made = put_together([make_input(hw=(64, 64)), marked(200, (200, 90)), *[marked(90)] * 2])
    assert made["image"].shape == (3, 64, 64)
    assert set(made["instances"].gt_classes.tolist()) <= {200, 90}


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_probability(probability):
    records = list(range(10))
    mapped = []
    mosaic = Mosaic(lambda r: mapped.append(r) or marked(100 + r), records, probability)
    for seed in range(200):
        with seeded(seed):
            mosaic(3)
    assert (len(mapped) - 200) / 600 == pytest.approx(probability, abs=0.1)
    if probability == 1.0:
        partners = [r for i, r in enumerate(mapped) if i % 4]
        assert (np.bincount(partners) > 30).all()


def test_batches_follow_from_the_position(squares):
    """A resumed run has the same mosaics; the last tenth has none."""
    register(f"mosaics={squares}/annotations.json:{squares}/images")
    cfg = make_cfg("DATASETS.TRAIN", ("mosaics",), "INPUT.MOSAIC", 1.0, "SEED", 5)
    opts = ("DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 10)
    cfg.merge_from_list([*opts, "INPUT.AUGMENT_UNTIL", 0.9, "INPUT.MIN_SIZE_TRAIN", (96,)])

    def batches(skip=0):
        loader = Trainer.build_train_loader(cfg)
        loader.skip(skip, 5)
        stream = iter(loader)
        return [next(stream) for _ in range(10 - skip)]

    whole, rest = batches(), batches(6)
    for a, b in zip(whole[6:], rest, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x["image"], y["image"])
            assert torch.equal(x["instances"].gt_boxes.tensor, y["instances"].gt_boxes.tensor)
    # A picture of the set has at most three squares.
    counts = [max(len(x["instances"]) for x in batch) for batch in whole]
    assert max(counts[:9]) > 3
    assert counts[9] <= 3
