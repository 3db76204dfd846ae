"""Checks of numbers: precisions, trainings in them, several processes, the compiler."""

import json
import math
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
import torch.multiprocessing as mp
from benchmarks.model import build_ours, random_batch, training_step
from benchmarks.peers import DTYPES
from benchmarks.timing import in_turn
from detectron2.modeling import build_model
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from atss.analysis.digits import FEW, make_digits
from atss.config import get_config_file

from .setting import ROOT, Finding, Setting

# docs/performance.md states these.
LOSS_TOLERANCE = 0.02
TRAINING_TOLERANCE = 0.05
# By which losses are multiplied in fp16: as AMP's scaler does, which divides where gradients are
# not finite. Random weights of a network without norms need less than trained ones.
SCALES = (2.0**10, 2.0**5, 1.0, 2.0**-5, 2.0**-10)


def _largest(numbers: Iterable[float]) -> float:
    """NaN where one of them is, which max would pass over."""
    known = [*numbers]
    return math.nan if any(map(math.isnan, known)) else max(known)


def precisions(setting: Setting) -> Finding:
    """Every config, a step forward and backward in each precision: all finite, and the losses those
    of fp32."""
    images = setting.images(2, (128, 128) if setting.small else (384, 512))
    worst, wrong = dict.fromkeys(setting.precisions, 0.0), []
    for name in setting.configs:
        torch.manual_seed(0)
        model = build_model(setting.config(name, "MODEL.ATSS.PRECISION", "fp32")).train()
        exact = _losses(model, images, "fp32", 1.0)
        for precision in setting.precisions:
            for scale in SCALES if precision == "fp16" else (1.0,):
                losses = _losses(model, images, precision, scale)
                if finite := _gradients_are_finite(model):
                    break
            off = _largest(abs(losses[k] - x) / max(abs(x), 1e-3) for k, x in exact.items())
            worst[precision] = _largest((worst[precision], off))
            if not (off <= LOSS_TOLERANCE and finite):
                how = f"losses off by {off:.3g}" if finite else "gradients not finite"
                wrong.append(f"{name} in {precision}: {how}")
    said = f"{len(setting.configs)} configs; losses differ from fp32's by at most " + ", ".join(
        f"{off:.2%} in {precision}" for precision, off in worst.items()
    )
    return Finding(not wrong, "; ".join([said, *wrong]), {"worst": worst, "wrong": wrong})


def _losses(model: nn.Module, images: list[dict], precision: str, scale: float) -> dict[str, float]:
    model.precision = DTYPES[precision]
    model.zero_grad()
    losses = model(images)
    (sum(losses.values()) * scale).backward()
    return {name: loss.item() for name, loss in losses.items()}


def _gradients_are_finite(model: nn.Module) -> bool:
    gradients = [x.grad for x in model.parameters() if x.grad is not None]
    return bool(torch.stack([torch.isfinite(x).all() for x in gradients]).all())


def trainings(setting: Setting) -> Finding:
    """The same training in each precision, by tools/train_net.py: to the losses of fp32's."""
    iterations = 4 if setting.small else 300
    data = setting.folder / "digits"
    make_digits(data, FEW)
    running = {}
    for precision in ("fp32", *setting.precisions):
        folder = setting.folder / f"training_{precision}"
        options = (
            *("MODEL.DEVICE", setting.device, "MODEL.ATSS.PRECISION", precision),
            *("DATASETS.TRAIN", "('few',)", "DATASETS.TEST", "('held_out',)", "SEED", 1),
            *("SOLVER.MAX_ITER", iterations, "SOLVER.CHECKPOINT_EPOCHS", 0.0),
            *("SOLVER.CHECKPOINT_PERIOD", iterations, "OUTPUT_DIR", folder),
            *("INPUT.MIN_SIZE_TRAIN", "(96,)" if setting.small else "(320,)"),
            *("DATALOADER.NUM_WORKERS", 0 if setting.small else 2),
        )
        command = setting.command(
            *(ROOT / "tools/train_net.py", "--config-file"),
            *(
                get_config_file("ATSS_R_18_FPN_small"),
                f"--register=few={data}/train.json:{data}/train",
            ),
            *(f"--register=held_out={data}/val.json:{data}/val", *options),
        )
        with (setting.folder / f"training_{precision}.log").open("w") as log:
            running[precision] = (folder, subprocess.Popen(command, stdout=log, stderr=log))
    failed = [precision for precision, (_, x) in running.items() if x.wait()]
    if failed:
        logs = ", ".join(f"{setting.folder}/training_{x}.log" for x in failed)
        return Finding(False, f"failed in {' and '.join(failed)}: {logs}")
    ends = {precision: _end(folder) for precision, (folder, _) in running.items()}
    exact = ends["fp32"]["loss"]
    off = {x: abs(ends[x]["loss"] / exact - 1) for x in setting.precisions}
    said = "; ".join(f"{x}: loss {end['loss']:.3f}, AP {end['AP']:.1f}" for x, end in ends.items())
    return Finding(
        all(x <= TRAINING_TOLERANCE for x in off.values()),
        f"{iterations} iterations, the mean loss of the last third: {said}",
        ends,
    )


def _end(folder: Path) -> dict[str, float]:
    lines = [json.loads(x) for x in (folder / "metrics.json").read_text().splitlines()]
    losses = [x["total_loss"] for x in lines if "total_loss" in x]
    last = losses[-max(len(losses) // 3, 1) :]
    found = [x["bbox/AP"] for x in lines if x.get("bbox/AP") is not None]
    return {"loss": sum(last) / len(last), "AP": found[-1] if found else float("nan")}


def processes(setting: Setting) -> Finding:
    """DDP as it runs on GPUs, of as many processes as there are (on CPUs two), against one process
    on all the images: weights after two steps, in float64."""
    count = torch.cuda.device_count() if setting.on_gpu else 2
    mp.spawn(_shared_step, (count, setting), nprocs=count)
    whole = _two_steps(setting, _double(setting).to(setting.device), _images_of_all(setting, count))
    off = 0.0
    for rank in range(count):
        weights = torch.load(setting.folder / f"weights.{rank}", weights_only=True)
        for name, exact in whole.items():
            difference = (weights[name] - exact).abs().max() / exact.abs().max()
            off = _largest((off, difference.item()))
    backend = "NCCL" if setting.on_gpu else "gloo"
    said = f"{count} over {backend}: weights differ from one process's by at most {off:.1e}"
    # Losses are float32 whatever the network is.
    return Finding(off <= 1e-6, said, {"processes": count, "off": off})


def _double(setting: Setting) -> nn.Module:
    """Nothing random or of a batch's statistics in it."""
    torch.manual_seed(0)
    norms = ("MODEL.RESNETS.NORM", "GN", "MODEL.FPN.NORM", "GN")
    options = (*norms, "MODEL.ATSS.PRECISION", "fp32", "MODEL.DEVICE", "cpu")
    return build_model(setting.config("ATSS_R_18_FPN_small", *options)).double().train()


def _images_of_all(setting: Setting, count: int) -> list[dict]:
    return setting.images(2 * count, (128, 128))


def _shared_step(rank: int, count: int, setting: Setting) -> None:
    device = torch.device(setting.device, rank if setting.on_gpu else None)
    if setting.on_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if setting.on_gpu else "gloo",
        init_method=f"file://{setting.folder}/meeting",
        rank=rank,
        world_size=count,
    )
    ids = [rank] if setting.on_gpu else None
    model = DistributedDataParallel(_double(setting).to(device), device_ids=ids)
    images = _images_of_all(setting, count)[2 * rank : 2 * rank + 2]
    torch.save(_two_steps(setting, model, images), setting.folder / f"weights.{rank}")
    distributed.destroy_process_group()


def _two_steps(setting: Setting, model: nn.Module, images: list[dict]) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        sum(model(images).values()).backward()
        optimizer.step()
    plain = getattr(model, "module", model)
    return {name: x.detach().cpu() for name, x in plain.named_parameters()}


def compiled(setting: Setting) -> Finding:
    """MODEL.ATSS.COMPILE tail: the losses of the detector as it is, and the time of a step."""
    case = setting.case("fp32", "ATSS_R_50_FPN_1x")
    batch = random_batch(case)
    models = {}
    for name, options in (("plain", ()), ("compiled", ("MODEL.ATSS.COMPILE", "tail"))):
        torch.manual_seed(0)
        models[name] = build_ours(replace(case, options=(*case.options, *options)))
    losses = {name: peer.losses(batch) for name, peer in models.items()}
    off = _largest((losses["compiled"][k] / x - 1).abs().item() for k, x in losses["plain"].items())
    steps = {name: training_step(peer, batch) for name, peer in models.items()}
    seconds = in_turn(steps, 7, torch.device(setting.device))
    ratio = seconds["compiled"].median / seconds["plain"].median
    said = f"losses off by {off:.1e}, step {ratio:.3f} of the plain one"
    return Finding(off <= 1e-3, said, {"off": off, "ratio": ratio})
