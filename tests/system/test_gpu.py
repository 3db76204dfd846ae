"""On a GPU: the results of a CPU, half precision close to them, and no waits of the host.

make test-gpu                      # on a machine with a GPU
pytest tests/system/test_gpu.py    # on a CPU: the cases that need no GPU, small
"""

import copy
import json
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from benchmarks.model import Case, random_batch
from benchmarks.peers import DTYPES, NUM_CLASSES
from conftest import CONFIGS, ROOT, make_cfg, make_input
from detectron2.modeling import build_model
from processes import Script
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from atss import Anchors, GroundTruth, HeadOutput
from atss.analysis.digits import FEW, make_digits
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
# docs/performance.md states these.
LOSS_TOLERANCE = 0.02
TRAINING_TOLERANCE = 0.05
# Factors of the loss in fp16, from the largest on until gradients are finite, as AMP's scaler does.
# Random weights of a network without norms need a smaller one than trained weights.
SCALES = (2.0**10, 2.0**5, 1.0, 2.0**-5, 2.0**-10)
# AMP's scaler waits: it reads whether gradients are infinite.
ALLOWED_WAITS = {"fp16": "amp/grad_scaler.py"}
SLOW_ON_CPU = pytest.param("cpu", marks=pytest.mark.slow)
# Iterations of a training that neither begin it nor write a log.
ORDINARY = range(4, 16)


def on_gpu(*values):
    return pytest.param("cuda", *values, marks=pytest.mark.gpu)


def random_objects(count, images, size):
    """Boxes of 4 pixels to the whole image, half of them on whole pixels, where distances tie."""
    generator = torch.Generator().manual_seed(count)
    low = torch.rand(count, 2, generator=generator) * size * 0.9
    side = 4 * (size / 4) ** torch.rand(count, 2, generator=generator)
    boxes = torch.cat([low, low + side], dim=1)
    boxes[::2] = boxes[::2].round()
    index = torch.randint(images, (count,), generator=generator)
    return GroundTruth(boxes, torch.zeros(count, dtype=torch.long), index, images)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize(("device", "count"), [("cpu", 40), *map(on_gpu, (0, 1, 40, 3000))])
def test_anchors_are_assigned_as_on_a_cpu(rule, device, count):
    """All of them; of rules that look at predictions nearly all, because the last bits of
    logarithms and sums differ."""
    gt = random_objects(count, 3, 640)
    anchors = Anchors.grid((640, 640))
    generator = torch.Generator().manual_seed(count)
    boxes = anchors.boxes + 8 * torch.randn(3, *anchors.boxes.shape, generator=generator)
    logits = torch.randn(3, len(anchors.boxes), 4, generator=generator) - 3

    def assign(device):
        moved = boxes.to(device)
        predictions = Predictions(HeadOutput(logits.to(device), moved, None), moved)
        grid = Anchors.grid((640, 640), device=torch.device(device))
        return rule(grid, gt.to(device), predictions).gt_index.cpu()

    expected = assign("cpu")
    tolerated = 0.0
    if getattr(rule, "looks_at_predictions", False):
        tolerated = 1e-3 * (expected >= 0).sum()
    assert (assign(device) != expected).sum() <= tolerated


@pytest.mark.parametrize(
    ("device", "config"),
    [
        ("cpu", "ATSS_R_18_FPN_small"),
        on_gpu("ATSS_R_18_FPN_small"),
        on_gpu("ATSS_dcnv2_R_50_FPN_1x"),
        on_gpu("tables/retinanet_A9"),
        on_gpu("successors/GFLv2_R_50_FPN_1x"),
        on_gpu("successors/PAA_R_50_FPN_1x"),
        on_gpu("successors/VFL_R_50_FPN_1x"),
    ],
)
def test_losses_gradients_and_detections_are_a_cpus(device, config):
    """In float64, which GPUs do not shorten."""
    torch.manual_seed(0)
    cfg = make_cfg("MODEL.ATSS.SCORE_THRESH_TEST", 0.0, config=f"{config}.yaml")
    cfg.MODEL.RESNETS.NORM = "GN" if config.startswith("ATSS_R_18") else cfg.MODEL.RESNETS.NORM
    models = [build_model(cfg).double()]
    models.append(copy.deepcopy(models[0]).to(device))
    losses, gradients, detections = [], [], []
    for model in models:
        losses.append({k: x.cpu() for k, x in model.train()(EXAMPLES).items()})
        sum(model(EXAMPLES).values()).backward()
        gradients.append(
            {k: x.grad.cpu() for k, x in model.named_parameters() if x.grad is not None}
        )
        with torch.no_grad():
            detections.append([x["instances"].to("cpu") for x in model.eval()(EXAMPLES)])
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=1e-5, atol=1e-7)
    for name, gradient in gradients[0].items():
        off = (gradients[1][name] - gradient).norm()
        assert off <= 1e-4 * gradient.norm() + 1e-9, name
    for one, other in zip(*detections, strict=True):
        assert len(one) == len(other) > 0
        torch.testing.assert_close(other.scores, one.scores, rtol=1e-5, atol=1e-7)
        boxes = [x.pred_boxes.tensor for x in (other, one)]
        torch.testing.assert_close(*boxes, rtol=1e-5, atol=1e-3)
        assert torch.equal(other.pred_classes, one.pred_classes)


def random_images(count, height, width):
    return random_batch(Case("fp32", False, count, height, width, 7, "cpu", ""))


def random_cfg(device, config, *options):
    """A config with random weights, for random images."""
    options = ("MODEL.TIMM.PRETRAINED", False, "MODEL.ATSS.NUM_CLASSES", NUM_CLASSES, *options)
    return make_cfg("MODEL.DEVICE", device, "SEED", 1, *options, config=f"{config}.yaml")


@pytest.mark.parametrize(
    ("device", "config"), [*(("cpu", x) for x in CONFIGS[::16]), *map(on_gpu, CONFIGS)]
)
def test_half_precision_is_close_to_fp32(device, config):
    """Losses of a step; gradients are finite."""
    small = ("MODEL.FPN.OUT_CHANNELS", 64, "MODEL.ATSS.NUM_CONVS", 2) if device == "cpu" else ()
    images = random_images(2, *((64, 64) if device == "cpu" else (384, 512)))
    torch.manual_seed(0)
    model = build_model(random_cfg(device, config, *small)).train()
    exact, _ = half_step(model, images, "fp32", 1.0)
    for precision in ("bf16",) if device == "cpu" else ("bf16", "fp16"):
        for scale in SCALES if precision == "fp16" else (1.0,):
            losses, finite = half_step(model, images, precision, scale)
            if finite:
                break
        assert finite, f"gradients are not finite in {precision}"
        close = pytest.approx(exact, rel=LOSS_TOLERANCE, abs=1e-3 * LOSS_TOLERANCE)
        assert losses == close, precision


def half_step(model, images, precision, scale):
    """Return losses, and whether all gradients are finite."""
    model.precision = DTYPES[precision]
    model.zero_grad()
    losses = model(images)
    (sum(losses.values()) * scale).backward()
    gradients = [x.grad for x in model.parameters() if x.grad is not None]
    finite = bool(torch.stack([torch.isfinite(x).all() for x in gradients]).all())
    return {name: loss.item() for name, loss in losses.items()}, finite


@pytest.mark.parametrize("device", [SLOW_ON_CPU, on_gpu()])
def test_trainings_in_half_precision_end_as_in_fp32(device, tmp_path):
    """The mean loss of the last third of a training."""
    data = tmp_path / "digits"
    make_digits(data, FEW)
    iterations, size, workers = (4, 96, 0) if device == "cpu" else (300, 320, 2)
    running = {}
    for precision in ("fp32", "bf16") if device == "cpu" else ("fp32", "bf16", "fp16"):
        options = {
            "MODEL.DEVICE": device,
            "MODEL.ATSS.PRECISION": precision,
            "DATASETS.TRAIN": ("few",),
            "DATASETS.TEST": (),
            "SEED": 1,
            "SOLVER.MAX_ITER": iterations,
            "SOLVER.CHECKPOINT_EPOCHS": 0.0,
            "SOLVER.CHECKPOINT_PERIOD": iterations,
            "OUTPUT_DIR": tmp_path / precision,
            "INPUT.MIN_SIZE_TRAIN": (size,),
            "DATALOADER.NUM_WORKERS": workers,
        }
        argv = [f"{ROOT}/tools/train_net.py", "--config-file", "ATSS_R_18_FPN_small"]
        argv += ["--register", f"few={data}/train.json:{data}/train"]
        argv += [x for item in options.items() for x in item]
        running[precision] = Script(argv, tmp_path)
    for script in running.values():
        text, code = script.communicate(timeout=600)
        assert code == 0, text[-3000:]
    losses = {precision: final_loss(tmp_path / precision) for precision in running}
    assert losses == pytest.approx(dict.fromkeys(losses, losses["fp32"]), rel=TRAINING_TOLERANCE)


def final_loss(folder):
    lines = [json.loads(x) for x in (folder / "metrics.json").read_text().splitlines()]
    losses = [x["total_loss"] for x in lines if "total_loss" in x]
    last = losses[-max(len(losses) // 3, 1) :]
    return sum(last) / len(last)


@pytest.mark.parametrize("device", [SLOW_ON_CPU, on_gpu()])
def test_processes_make_the_steps_of_one(device, tmp_path):
    """Weights after two steps in float64, with a process for each GPU (two on a CPU), over the
    backend of the device."""
    count = 2 if device == "cpu" else torch.cuda.device_count()
    arguments = (count, device, tmp_path)
    mp.start_processes(shared_steps, arguments, nprocs=count, start_method="forkserver")
    whole = two_steps(double_model().to(device), random_images(2 * count, 128, 128))
    for rank in range(count):
        weights = torch.load(tmp_path / f"weights.{rank}", weights_only=True)
        for name, exact in whole.items():
            # Losses are float32 whatever the network is.
            off = (weights[name] - exact).abs().max() / exact.abs().max()
            assert off <= 1e-6, name


def double_model():
    """Without dropout and without statistics of a batch."""
    torch.manual_seed(0)
    options = ("MODEL.RESNETS.NORM", "GN", "MODEL.FPN.NORM", "GN")
    return build_model(random_cfg("cpu", "ATSS_R_18_FPN_small", *options)).double().train()


def shared_steps(rank: int, count: int, device: str, folder: Path) -> None:
    if device == "cuda":
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=count,
    )
    model = DistributedDataParallel(double_model().to(device))
    images = random_images(2 * count, 128, 128)[2 * rank : 2 * rank + 2]
    torch.save(two_steps(model, images), folder / f"weights.{rank}")
    distributed.destroy_process_group()


def two_steps(model, images):
    optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        sum(model(images).values()).backward()
        optimizer.step()
    plain = getattr(model, "module", model)
    return {name: x.detach().cpu() for name, x in plain.named_parameters()}


class OneBatch(Trainer):
    """Trains on the same images in every iteration."""

    def build_train_loader(self, cfg):
        return Endless()


class Endless(list):
    def __iter__(self):
        while True:
            yield [x | {"file_name": "x.png"} for x in EXAMPLES]

    def skip(self, batches, seed, origin):
        self.skipped = batches


@pytest.mark.gpu
def test_scale_of_gradients_is_resumed(tmp_path):
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


@contextmanager
def recorded_waits():
    """Count the calls for which the host waits for the GPU, by file and line."""
    waits = Counter()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield waits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchronizing" in str(warning.message):
            path = Path(warning.filename)
            waits[f"{path.parent.name}/{path.name}:{warning.lineno}"] += 1


class CountingWaits(OneBatch):
    """Counts the waits of ordinary iterations."""

    def __init__(self, cfg):
        self.waits = Counter()
        super().__init__(cfg)

    def run_step(self):
        self._count(super().run_step)

    def after_step(self):
        self._count(super().after_step)

    def _count(self, function):
        with recorded_waits() if self.iter in ORDINARY else nullcontext({}) as waits:
            function()
        self.waits.update(waits)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_host_does_not_wait_in_a_training(precision, tmp_path):
    """Not counted: the event after which it reads the losses."""
    options = ("MODEL.DEVICE", "cuda", "MODEL.ATSS.PRECISION", precision)
    options += ("SOLVER.MAX_ITER", 18, "SOLVER.CHECKPOINT_PERIOD", 100)
    trainer = CountingWaits(make_cfg(*options, "OUTPUT_DIR", str(tmp_path)))
    trainer.train()
    allowed = ALLOWED_WAITS.get(precision, "nowhere")
    assert not [place for place in trainer.waits if not place.startswith(allowed)]


@pytest.mark.gpu
def test_compiled_tail_gives_the_losses():
    """As tests/system/test_compile.py on a CPU."""
    images = random_images(2, 800, 1344)
    losses = []
    for part in ("", "tail"):
        torch.manual_seed(0)
        options = ("MODEL.ATSS.COMPILE", part) if part else ()
        losses.append(build_model(random_cfg("cuda", "ATSS_R_50_FPN_1x", *options)).train()(images))
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=1e-3, atol=0.0)
