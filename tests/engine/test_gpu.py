"""What a GPU computes is what a CPU computes, and fp16 is resumed with the scale of its gradients.
`make test-gpu` runs these on a machine with one."""

import copy

import pytest
import torch
from conftest import make_cfg, make_input
from detectron2.modeling import build_model

from atss import Anchors, GroundTruth, HeadOutput
from atss.assigners import (
    ATSS,
    DDOD,
    NWD,
    OTA,
    PAA,
    TAL,
    MaxIoU,
    SimD,
    SimOTA,
    SoftLabel,
    SpatialScale,
)
from atss.engine import Trainer
from atss.structures import Predictions

pytestmark = pytest.mark.gpu

RULES = {
    "ATSS": ATSS(),
    "ATSS, k locations": ATSS(count="locations"),
    "MaxIoU": MaxIoU(),
    "MaxIoU, in the box": MaxIoU(in_box=True),
    "SpatialScale": SpatialScale(),
    "SpatialScale, radius": SpatialScale(radius=1.5),
    **{rule.__name__: rule() for rule in (DDOD, PAA, OTA, SimOTA, SoftLabel, TAL)},
    "MaxIoU by NWD": MaxIoU(similarity=NWD()),
    "TAL by SimD": TAL(similarity=SimD()),
}
EXAMPLES = [
    make_input([[20, 20, 90, 80], [5, 60, 30, 90]], [1, 2]),
    make_input([[0, 40, 120, 90]], [0], seed=1),
]


def objects(count, images, size):
    """Boxes of 4 pixels to the whole image, half of them on whole pixels, where distances tie."""
    generator = torch.Generator().manual_seed(count)
    low = torch.rand(count, 2, generator=generator) * size * 0.9
    side = 4 * (size / 4) ** torch.rand(count, 2, generator=generator)
    boxes = torch.cat([low, low + side], dim=1)
    boxes[::2] = boxes[::2].round()
    index = torch.randint(images, (count,), generator=generator)
    return GroundTruth(boxes, torch.zeros(count, dtype=torch.long), index, images)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("count", [0, 1, 40, 3000])
def test_every_anchor_is_assigned_alike(rule, count):
    """Of predictions, too; where the last bits of logarithms or of sums decide, nearly alike."""
    gt = objects(count, 3, 640)
    there = torch.device("cuda")
    anchors = Anchors.grid((640, 640))
    generator = torch.Generator().manual_seed(count)
    boxes = anchors.boxes + 8 * torch.randn(3, *anchors.boxes.shape, generator=generator)
    logits = torch.randn(3, len(anchors.boxes), 4, generator=generator) - 3
    seen = [
        Predictions(HeadOutput(x, b, None), b)
        for x, b in ((logits, boxes), (logits.to(there), boxes.to(there)))
    ]
    on_cpu = rule(anchors, gt, seen[0]).gt_index
    on_gpu = rule(Anchors.grid((640, 640), device=there), gt.to(there), seen[1]).gt_index
    differ = (on_gpu.cpu() != on_cpu).sum()
    few = 1e-3 * (on_cpu >= 0).sum() if getattr(rule, "looks_at_predictions", False) else 0
    assert differ <= few


@pytest.mark.parametrize(
    "config",
    [
        *("ATSS_R_18_FPN_small.yaml", "ATSS_dcnv2_R_50_FPN_1x.yaml", "tables/retinanet_A9.yaml"),
        *(f"successors/{name}_R_50_FPN_1x.yaml" for name in ("GFLv2", "PAA", "VFL")),
    ],
)
def test_losses_gradients_and_detections_are_alike(config):
    """In float64, which no GPU shortens."""
    torch.manual_seed(0)
    cfg = make_cfg("MODEL.ATSS.SCORE_THRESH_TEST", 0.0, config=config)
    cfg.MODEL.RESNETS.NORM = "GN" if config.startswith("ATSS_R_18") else cfg.MODEL.RESNETS.NORM
    models = [build_model(cfg).double()]
    models.append(copy.deepcopy(models[0]).cuda())
    losses, gradients, found = [], [], []
    for model in models:
        losses.append({k: x.cpu() for k, x in model.train()(EXAMPLES).items()})
        sum(model(EXAMPLES).values()).backward()
        gradients.append(
            {k: x.grad.cpu() for k, x in model.named_parameters() if x.grad is not None}
        )
        with torch.no_grad():
            found.append([x["instances"].to("cpu") for x in model.eval()(EXAMPLES)])
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=1e-5, atol=1e-7)
    for name, gradient in gradients[0].items():
        off = (gradients[1][name] - gradient).norm()
        assert off <= 1e-4 * gradient.norm() + 1e-9, name
    for one, other in zip(*found, strict=True):
        assert len(one) == len(other) > 0
        torch.testing.assert_close(other.scores, one.scores, rtol=1e-5, atol=1e-7)
        boxes = [x.pred_boxes.tensor for x in (other, one)]
        torch.testing.assert_close(*boxes, rtol=1e-5, atol=1e-3)
        assert torch.equal(other.pred_classes, one.pred_classes)


def test_the_scale_of_the_gradients_is_resumed(tmp_path):
    class OneBatch(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return Endless()

    class Endless(list):
        def __iter__(self):
            while True:
                yield [x | {"file_name": "x.png"} for x in EXAMPLES]

        def skip(self, batches, seed, origin):
            self.skipped = batches

    options = ("MODEL.DEVICE", "cuda", "MODEL.ATSS.PRECISION", "fp16", "OUTPUT_DIR", str(tmp_path))
    options += ("SOLVER.CHECKPOINT_PERIOD", 100)
    first = OneBatch(make_cfg(*options, "SOLVER.MAX_ITER", 3))
    first._trainer.grad_scaler = torch.amp.GradScaler("cuda", init_scale=512.0)
    first.train()
    second = OneBatch(make_cfg(*options, "SOLVER.MAX_ITER", 4))
    fresh = second._trainer.grad_scaler.get_scale()
    second.resume_or_load(resume=True)
    assert second.start_iter == 3
    assert second._trainer.grad_scaler.state_dict() == first._trainer.grad_scaler.state_dict()
    assert second._trainer.grad_scaler.get_scale() == 512 != fresh
