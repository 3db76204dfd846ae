"""Rows of the paper's tables, trained on a small data set and compared seed by seed."""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.utils.env import seed_all_rng
from torch import nn
from tqdm import tqdm

from ..config import (
    complete_classes,
    config_names,
    get_config_file,
    load_config,
    use_available_device,
)
from ..data.datasets import register
from ..engine import Trainer
from ..engine.writers import strict
from ..errors import UserError
from .digits import ABLATION, make_digits

# Chosen before the first result.
# fmt: off
PRIMARY = (
    "retinanet_A1", "iou_box", "iou_point", "ssc_box", "ssc_point", "ssc_lite_point",
    "atss_box", "atss_point", "atss_k3", "atss_k17", "iou_A9", "atss_A9",
)
# fmt: on
# (statement, row, row to compare it with).
CLAIMS = (
    ("Table 1: all improvements over none", "iou_box", "retinanet_A1"),
    ("Table 2: spatial and scale over IoU, boxes", "ssc_box", "iou_box"),
    ("Table 2: spatial and scale over IoU, points", "ssc_point", "iou_point"),
    ("Table 2: point over box, IoU", "iou_point", "iou_box"),
    ("Table 2: point over box, spatial and scale", "ssc_point", "ssc_box"),
    ("Table 3: ATSS over IoU, boxes", "atss_box", "iou_box"),
    ("Table 3: ATSS over spatial and scale, points", "atss_point", "ssc_point"),
    ("Table 3: lite over spatial and scale, points", "ssc_lite_point", "ssc_point"),
    ("Table 3: point over box, ATSS", "atss_point", "atss_box"),
    ("Table 4: k = 3 over k = 9", "atss_k3", "atss_box"),
    ("Table 4: k = 17 over k = 9", "atss_k17", "atss_box"),
    ("Table 7: 9 anchors over 1, IoU", "iou_A9", "iou_box"),
    ("Table 7: 9 anchors over 1, ATSS", "atss_A9", "atss_box"),
    ("Table 7: 3 scales over 1, ATSS", "atss_A3_scales", "atss_box"),
    ("Table 7: 3 ratios over 1, ATSS", "atss_A3_ratios", "atss_box"),
    ("Table 7: ATSS over IoU, 9 anchors", "atss_A9", "iou_A9"),
    ("the later rule, k * 9, over 1 anchor", "atss_A9_locations", "atss_box"),
)
METRICS = ("AP", "AP50", "AP75")


def known_rows() -> list[str]:
    return sorted(n.removeprefix("tables/") for n in config_names() if n.startswith("tables/"))


def row_config(row: str, seed: int, output: Path, opts: list[str]) -> CfgNode:
    cfg = load_config(get_config_file(f"tables/{row}"), get_config_file("ablation"), opts=opts)
    use_available_device(cfg)
    complete_classes(cfg)
    cfg.SEED = seed
    cfg.OUTPUT_DIR = str(output)
    cfg.freeze()
    return cfg


@torch.no_grad()
def pair_weights(model: nn.Module, seed: int) -> None:
    """Initialise each part of the head with the seed, so that rows whose heads lack a part share
    the others. The backbone comes first and is equal anyway."""
    for name, part in model.get_submodule("head").named_children():
        generator = torch.Generator().manual_seed(seed)
        for module in part.modules() if name != "scales" else ():
            if isinstance(module, nn.Conv2d):
                weight = torch.empty_like(module.weight, device="cpu")
                module.weight.copy_(nn.init.normal_(weight, std=0.01, generator=generator))


def train(cfg: CfgNode, progress: tqdm) -> dict[str, float]:
    """Train and evaluate one run, without log, and return its metrics."""
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    start = time.perf_counter()
    seed_all_rng(cfg.SEED)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        trainer = Trainer(cfg)
        pair_weights(trainer.model, cfg.SEED)
        trainer.register_hooks([hooks.CallbackHook(after_step=lambda _: progress.update())])
        trainer.train()
    (Path(cfg.OUTPUT_DIR) / "model_final.pth").unlink()
    results = trainer._last_eval_results["bbox"]
    return {name: results[name] for name in METRICS} | {"seconds": time.perf_counter() - start}


def run_all(rows: list[str], seeds: int, output: Path, opts: list[str]) -> dict:
    """Train the runs without a result, and return {row: {seed: metrics}}.

    Raises:
        UserError: if the folder contains results of another config, or damaged ones.
    """
    missing = []
    results: dict[str, dict] = {row: {} for row in rows}
    for seed in range(1, seeds + 1):
        for row in rows:
            folder = output / row / f"seed{seed}"
            cfg = row_config(row, seed, folder, opts)
            target = folder / "result.json"
            if not target.is_file():
                missing.append((row, seed, cfg, target))
                continue
            result = _read_result(target)
            if result["config"] != cfg.dump():
                raise UserError(f"{folder} has a run of another config: choose another --output")
            results[row][seed] = result["metrics"]
    if len(missing) < seeds * len(rows):
        print(f"{seeds * len(rows) - len(missing)} runs are in {output}; {len(missing)} to go.")
    total = sum(cfg.SOLVER.MAX_ITER for _, _, cfg, _ in missing)
    with tqdm(total=total, unit="iteration", disable=not missing) as progress:
        for number, (row, seed, cfg, target) in enumerate(missing, start=1):
            progress.set_description(f"run {number} of {len(missing)}: {row}, seed {seed}")
            metrics = results[row][seed] = train(cfg, progress)
            unfinished = target.with_suffix(".unfinished")
            unfinished.write_text(json.dumps({"config": cfg.dump(), "metrics": strict(metrics)}))
            unfinished.rename(target)
            progress.write(f"{row}, seed {seed}: AP {metrics['AP']:.1f}", file=sys.stdout)
    return results


def _read_result(file: Path) -> dict:
    try:
        result = json.loads(file.read_text())
        metrics = {k: result["metrics"][k] for k in METRICS}
        nan = float("nan")  # null in json
        metrics = {k: nan if x is None else x for k, x in metrics.items()}
        return {"config": result["config"], "metrics": metrics}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no result of a run, or is damaged: remove it") from error


def paired(results: dict, row: str, other: str) -> tuple[np.ndarray, float]:
    """Return differences of AP by seed, and half the 95 % interval of their mean (Student's t; NaN
    for one seed)."""
    seeds = sorted(set(results[row]) & set(results[other]))
    difference = np.array([results[row][s]["AP"] - results[other][s]["AP"] for s in seeds])
    if len(seeds) < 2:
        return difference, float("nan")
    from scipy import stats  # the extra "demo"

    half = stats.t.ppf(0.975, len(seeds) - 1) * stats.sem(difference)
    return difference, float(half)


def claims(results: dict) -> list[tuple[str, np.ndarray, float]]:
    trained = [c for c in CLAIMS if c[1] in results and c[2] in results]
    return [(statement, *paired(results, row, other)) for statement, row, other in trained]


def paper_ap(row: str) -> str:
    """Return the paper's AP from a row's comment, or ""."""
    comment = Path(get_config_file(f"tables/{row}")).read_text().replace("\n# ", " ")
    printed = re.search(r"the paper's AP ([\d.]+\d)", comment)
    return printed.group(1) if printed else ""


def write_table(results: dict, target: Path) -> None:
    seeds = max(len(runs) for runs in results.values())
    lines = [
        f"Means over {seeds} seed(s) on the 200 test images of `atss.analysis.digits.ABLATION`.",
        "",
        "| row | AP | AP50 | AP75 | paper, COCO |",
        "|---|---|---|---|---|",
    ]
    for row, runs in results.items():
        means = [np.mean([r[name] for r in runs.values()]) for name in METRICS]
        cells = " | ".join(f"{mean:.1f}" for mean in means)
        lines.append(f"| {row} | {cells} | {paper_ap(row)} |")
    lines += [
        "",
        "| paired difference of AP | mean | 95 % interval | per seed |",
        "|---|---|---|---|",
    ]
    for statement, difference, half in claims(results):
        mean = difference.mean()
        interval = "" if np.isnan(half) else f"{mean - half:+.1f} to {mean + half:+.1f}"
        each = ", ".join(f"{d:+.1f}" for d in difference)
        lines.append(f"| {statement} | {mean:+.1f} | {interval} | {each} |")
    target.write_text("\n".join(lines) + "\n")


def compare_rows(rows: Sequence[str], seeds: int, output: Path, opts: list[str]) -> dict:
    """Draw the data set, and train rows, or "all", by :func:`run_all`.

    Raises:
        UserError: for an unknown row.
    """
    choices = known_rows()
    rows = choices if list(rows) == ["all"] else list(dict.fromkeys(rows))
    for row in rows:
        if row not in choices:
            raise UserError(f"unknown row {row!r}: choose from {choices}")
    data = output / "data"
    make_digits(data, ABLATION)
    for split in ("train", "test"):
        register(f"ablation_{split}={data}/{split}.json:{data}/{split}")
    return run_all(rows, seeds, output, opts)
