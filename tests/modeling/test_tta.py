import numpy as np
import pytest
import torch
from conftest import GOLDEN, make_cfg, make_input
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from atss.config import build_tta
from atss.config.build import build_postprocess
from atss.data.datasets import register
from atss.engine import Trainer
from atss.errors import UserError
from atss.modeling.suppression import NMS, SoftVote, Vote

REFERENCE = np.load(GOLDEN / "tta_merge.npz")
# Their boxes hold their last pixel.
LAST_PIXEL = torch.tensor([0.0, 0, 1, 1])


@pytest.mark.parametrize("prefix", ["", "edge_"])
@pytest.mark.parametrize("name", ["vote", "soft_vote", "nms"])
def test_merges_equal_the_authors_code(name, prefix):
    boxes, scores, classes = (
        torch.from_numpy(REFERENCE[f"{prefix}{part}"]) for part in ("boxes", "scores", "labels")
    )
    vote, soft = float(REFERENCE["vote_th"]), float(REFERENCE["soft_min_score"])
    merge = {
        "vote": Vote(vote),
        "soft_vote": SoftVote(vote, soft),
        "nms": NMS(float(REFERENCE["nms_th"])),
    }[name]
    found = merge(boxes + LAST_PIXEL, scores, classes, 1000)
    expected = [torch.from_numpy(REFERENCE[f"{prefix}{name}_{x}"]) for x in ("boxes", "scores")]
    labels = torch.from_numpy(REFERENCE[f"{prefix}{name}_labels"])
    assert len(found[0]) == len(labels)
    assert (found[1].diff() <= 0).all()
    free = torch.ones(len(labels), dtype=torch.bool)
    for box, score, k in zip(*expected, labels, strict=True):
        near = ((found[0] - LAST_PIXEL - box).abs().amax(dim=1) <= 2e-4) & free & (found[2] == k)
        match = (near & ((found[1] - score).abs() <= 1e-5)).nonzero()
        assert len(match), (box, score, k)
        free[match[0]] = False


def test_merging_without_boxes():
    empty = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long)
    assert [len(x) for x in SoftVote()(*empty, 10)] == [0, 0, 0]


def test_a_group_with_zero_scores_becomes_its_mean():
    boxes, nothing = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10]]), torch.zeros(2)
    found, scores, _ = Vote()(boxes, nothing, torch.zeros(2, dtype=torch.long), 10)
    assert found.tolist() == [[0.5, 0, 10.5, 10]]
    assert scores.tolist() == [0]


@pytest.mark.parametrize("make", [Vote, SoftVote])
def test_votes_at_equality(make):
    """An IoU of 1 / 2 is of the group where the threshold is 1 / 2; of a score of 1 / 2 it leaves
    1 / 4, which stays where the least is 1 / 4."""
    boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 4]])
    scores, classes = torch.tensor([1.0, 0.5]), torch.zeros(2, dtype=torch.long)
    arguments = {"min_score": 0.25} if make is SoftVote else {}
    found = make(0.5, **arguments)(boxes, scores, classes, 9)
    mean = [0, 0, 8, (8 + 0.5 * 4) / 1.5]
    assert found.boxes[0].tolist() == pytest.approx(mean)
    assert found.scores.tolist() == [1.0, 0.25][: len(found.scores)]
    assert len(found.scores) == 1 + (make is SoftVote)


@pytest.mark.parametrize("make", [Vote, SoftVote])
@pytest.mark.parametrize("bad", [[5.0, 5, 5, 9], [5.0, 9, 8, 5], [torch.nan] * 4])
def test_a_box_without_overlap_is_a_group(make, bad):
    """Not even itself, where it has no area: it is not looked at for ever."""
    groups = []

    class Counting(make):
        def _merge(self, *group):
            groups.append(group)
            assert len(groups) <= 3, "it goes on and on"
            return super()._merge(*group)

    boxes = torch.tensor([bad, [0.0, 0, 8, 8], [20, 0, 28, 8]])
    scores, classes = torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3, dtype=torch.long)
    found = Counting()(boxes, scores, classes, 9)
    assert torch.equal(found.scores, scores)
    torch.testing.assert_close(found.boxes, boxes, equal_nan=True)


class Bright(nn.Module):
    """Finds the bright rectangle of each view, exactly, and remembers the views."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, batched_inputs):
        (example,) = batched_inputs
        image = example["image"].float().mean(dim=0)
        self.seen.append(tuple(image.shape))
        self.channels = example["image"].float().mean(dim=(1, 2)).tolist()
        rows, columns = (image > 128).any(dim=1).nonzero(), (image > 128).any(dim=0).nonzero()
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        height, width = example["height"], example["width"]
        zoom = [width / image.shape[1], height / image.shape[0]] * 2
        found = Instances((height, width))
        found.pred_boxes = Boxes(torch.tensor([box]) * torch.tensor(zoom))
        found.scores, found.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.long)
        return [{"instances": found}]


def tta(model, *opts):
    return build_tta(
        make_cfg(
            *("INPUT.MIN_SIZE_TEST", 100, "INPUT.MAX_SIZE_TEST", 400),
            *("TEST.AUG.MIN_SIZES", (50, 200), "TEST.AUG.MAX_SIZE", 300),
            *("MODEL.ATSS.TTA.SIZE_RANGES", [[0, 10000], [0, 10000]], *opts),
        ),
        model,
    )


def example():
    """100 x 200 pixels, bright from (20, 30) to (80, 70)."""
    image = torch.zeros(3, 100, 200, dtype=torch.uint8)
    image[:, 30:70, 20:80] = 255
    return {"image": image, "height": 200, "width": 400}


def test_views_are_mapped_back_to_the_image():
    model = Bright()
    found = tta(model)([example()])[0]["instances"]
    # Each twice, the second time mirrored; the last capped at its long side.
    assert model.seen == [(100, 200)] * 2 + [(50, 100)] * 2 + [(150, 300)] * 2
    assert len(found) == 1
    expected = torch.tensor([[40.0, 60, 160, 140]])
    torch.testing.assert_close(found.pred_boxes.tensor, expected, atol=2.0, rtol=0)


def test_a_mirrored_view_is_mapped_back_exactly():
    image = example()["image"].permute(1, 2, 0).numpy()
    wrapped = tta(Bright())
    for flip in (False, True):
        boxes, _, _ = wrapped._detect(image, *wrapped.views[0], flip)
        assert boxes.tolist() == [[20, 30, 80, 70]]


@pytest.mark.parametrize("other", [100, 200])
def test_small_views_have_the_cap_of_the_plain_view(other):
    """Ten times as wide as high: the cap decides. The others have TEST.AUG.MAX_SIZE, one of the
    plain one's size, too (the authors' code: "if scale < 800")."""
    model, long = Bright(), torch.zeros(3, 20, 200, dtype=torch.uint8)
    long[:, 5:15, 50:150] = 255
    tta(model, "TEST.AUG.FLIP", False, "TEST.AUG.MIN_SIZES", (50, other))([{"image": long}])
    assert model.seen == [(40, 400), (40, 400), (30, 300)]


@pytest.mark.parametrize(("least", "greatest", "counts"), [(40, 99, 0), (1, 40, 0), (39, 41, 1)])
def test_size_ranges_exclude_both_ends(least, greatest, counts):
    """A square of 40 pixels on the plain view's size."""
    image = np.zeros((100, 100, 3), np.uint8)
    image[30:70, 30:70] = 255
    boxes, _, _ = tta(Bright())._detect(image, 100, 400, least, greatest, False)
    assert len(boxes) == counts


@pytest.mark.parametrize(
    ("least", "greatest", "counts"), [(7.5, 8, 1), (6.9, 7.3, 0), (8.2, 8.7, 0)]
)
def test_size_ranges_use_both_sides(least, greatest, counts):
    """5 x 100 pixels become 3 x 50: a box of 5 x 40 is one of 3 x 20, whose root is 7.75."""
    image = np.zeros((5, 100, 3), np.uint8)
    image[:, 20:60] = 255
    boxes, _, _ = tta(Bright())._detect(image, 100, 50, least, greatest, False)
    assert len(boxes) == counts


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_files_are_read_in_the_model_channel_order(tmp_path, order):
    """A file that is red alone."""
    Image.fromarray(np.full((50, 50, 3), (255, 140, 0), np.uint8)).save(tmp_path / "a.png")
    model = Bright()
    tta(model, "INPUT.FORMAT", order)([example() | {"file_name": str(tmp_path / "a.png")}])
    assert model.channels == ([0, 140, 255] if order == "BGR" else [255, 140, 0])


def test_boxes_out_of_a_view_range_are_dropped():
    """The rectangle measures sqrt(60 * 40) = 49 px on the plain view, 24 and 73 on the others."""
    ranges = ("MODEL.ATSS.TTA.SIZE_RANGES", [[30, 10000], [0, 70]], "MODEL.ATSS.TTA.MERGE", "nms")
    wrapped = tta(Bright(), *ranges, "MODEL.ATSS.NMS_THRESH_TEST", 0.9999)
    image = example()["image"].permute(1, 2, 0).numpy()
    views = [wrapped._detect(image, *view, False) for view in wrapped.views]
    assert [len(boxes) for boxes, _, _ in views] == [1, 0, 0]


def test_reads_file_name_if_given(tmp_path):
    given = example()
    Image.fromarray(given["image"].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    small = {"image": given["image"][:, ::2, ::2], "file_name": str(tmp_path / "a.png")}
    model = Bright()
    tta(model)([small])
    assert model.seen[0] == (100, 200)


def test_images_of_the_loader_are_not_read_again(squares, tmp_path, monkeypatch):
    cfg = make_cfg("OUTPUT_DIR", str(tmp_path), "DATALOADER.NUM_WORKERS", 0)
    register(f"squares={squares}/annotations.json:{squares}/images")
    monkeypatch.setattr("atss.modeling.tta.read_image", None)
    model = Bright()

    def test(cfg, tta):
        batch = next(iter(Trainer.build_test_loader(cfg, "squares")))
        return {"bbox": tta(batch)[0]["instances"]}

    monkeypatch.setattr(Trainer, "test", test)
    found = Trainer.test_with_tta(cfg, model)["bbox_TTA"]
    assert found.image_size == (96, 128)
    assert len(model.seen) == 2 * (1 + len(cfg.TEST.AUG.MIN_SIZES))


def test_progress_within_an_image_is_logged(monkeypatch):
    lines = []
    log = "atss.modeling.tta.log_every_n_seconds"
    monkeypatch.setattr(log, lambda level, line, n: lines.append(line))
    tta(Bright())([example()])
    assert lines == [f"View {i} of 6 of the image of the input" for i in range(1, 7)]


def test_an_image_too_thin_for_a_view_is_refused():
    thin = {"image": torch.zeros(3, 1, 900, dtype=torch.uint8), "file_name": "a.png"}
    with pytest.raises(UserError, match=r"the image a\.png is 900 x 1 pixels, too thin"):
        tta(Bright())([thin | {"height": 1, "width": 900}])


@pytest.mark.parametrize(("limit", "most", "candidates"), [(100, 1000, 1000), (3000, 3000, 9000)])
def test_limit_raises_that_of_merged_views_and_candidates(limit, most, candidates):
    opts = ("TEST.DETECTIONS_PER_IMAGE", limit)
    assert tta(Bright(), *opts).max_detections == most
    post = build_postprocess(make_cfg(*opts))
    assert (post.max_detections, post.topk_candidates) == (limit, candidates)


def test_one_plain_view_equals_the_detector():
    torch.manual_seed(0)
    cfg = make_cfg(
        *("INPUT.MIN_SIZE_TEST", 96, "TEST.AUG.MIN_SIZES", (), "TEST.AUG.FLIP", False),
        *("MODEL.ATSS.TTA.SIZE_RANGES", [], "MODEL.ATSS.TTA.MERGE", "nms"),
        *("MODEL.ATSS.SCORE_THRESH_TEST", 0.0, "MODEL.FPN.OUT_CHANNELS", 64),
    )
    model = build_model(cfg).eval()
    image = make_input()
    image["image"] = image["image"].byte()
    alone = model([image])[0]["instances"]
    wrapped = build_tta(cfg, model)([image])[0]["instances"]
    torch.testing.assert_close(wrapped.scores, alone.scores)
    torch.testing.assert_close(wrapped.pred_boxes.tensor, alone.pred_boxes.tensor)


@pytest.mark.parametrize(
    ("opts", "sentence"),
    [
        (("MODEL.ATSS.TTA.SIZE_RANGES", [[0, 1]]), "has 1 ranges for the 2 sizes"),
        (("MODEL.ATSS.TTA.MERGE", "mean"), "unknown MODEL.ATSS.TTA.MERGE 'mean': choose from"),
    ],
)
def test_invalid_tta_configs_are_refused(opts, sentence):
    with pytest.raises(ValueError, match=sentence):
        tta(Bright(), *opts)
