"""The host never waits for a GPU in training.

Forward passes run on a simulated GPU (tools/benchmarks/operators.py), on which torch raises an
error if the host reads a value. Backward passes run on tensors of the device "meta", which have no
values.
"""

import pytest
import torch
from benchmarks.operators import SimulatedGPU, registered_rules
from conftest import CONFIGS, THIN, make_cfg, make_input
from detectron2.modeling import build_model

from atss import Anchors, GroundTruth, HeadOutput, Predictions
from atss.assigners import ATSS, use_engine
from atss.modeling.box_coding import BoxDeltas
from atss.modeling.criterion import Criterion

EXAMPLES = [
    make_input([[20, 20, 90, 80], [5, 60, 30, 90]], [1, 2]),
    make_input([[0, 40, 120, 90]], [0], seed=1),
]
# Several heads and kinds of criterion; all configs take a minute. tests/system/test_operators.py
# counts the steps of ATSS.
QUICK = [
    *(f"successors/{name}_R_50_FPN_1x" for name in ("GFLv2", "TAL_dual", "TOOD", "VFNet")),
    "tables/retinanet_A9",
]
OTHERS = [x for x in CONFIGS if x not in QUICK]
SLOW = [pytest.param(x, marks=pytest.mark.slow) for x in OTHERS]


@pytest.mark.parametrize("config", [*QUICK, *SLOW])
def test_forward_passes_do_not_wait(config):
    """PAA and POTO copy their costs to the host once."""
    thin = [x for item in THIN.items() for x in item]
    small = ["MODEL.ATSS.NUM_CONVS", 1, "MODEL.FPN.OUT_CHANNELS", 64]
    cfg = make_cfg(*thin, *small, config=f"{config}.yaml")
    model = build_model(cfg).train()
    model.iteration = cfg.SOLVER.MAX_ITER - 1  # in the last phase
    with SimulatedGPU(may_wait=False) as gpu:
        model.to("cuda")
        gpu.lap("weights to the GPU")
        model(EXAMPLES)
    copies = int("PAA" in config or "POTO" in config)
    assert (gpu.now.waits, gpu.now.to_host) == (copies, copies)


def inputs(device, objects=5):
    """Anchors, ground truth and outputs for two images, the second without an object."""
    anchors = Anchors.grid((96, 128), device=device)
    boxes = torch.tensor([20.0, 20, 90, 80], device=device).expand(objects, 4).contiguous()
    zeros = torch.zeros(objects, dtype=torch.long, device=device)
    shape = (2, len(anchors.boxes))
    shapes = ((*shape, 3), (*shape, 4), shape)
    output = (torch.zeros(x, requires_grad=True, device=device) for x in shapes)
    return anchors, GroundTruth(boxes, zeros, zeros, 2), HeadOutput(*output)


def train(rule, anchors, gt, output):
    boxes = BoxDeltas().decode(output.box_regression, anchors.boxes, anchors.stride)
    predictions = Predictions(output.map(torch.Tensor.detach), boxes.detach())
    losses = Criterion()(output, boxes, anchors, gt, rule(anchors, gt, predictions))
    sum(losses.values()).backward()


@pytest.mark.parametrize("objects", [5, 0])
def test_backward_passes_do_not_wait(objects):
    with use_engine("tables"):
        train(ATSS(), *inputs("meta", objects))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [x for x, _ in registered_rules() if x not in ("PAA", "POTO")])
def test_the_host_does_not_wait_for_the_gpu(name):
    rule, arguments = dict(registered_rules())[name], inputs("cuda")
    train(rule, *arguments)  # initialises CUDA and caches
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(rule, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
