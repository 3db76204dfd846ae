#!/usr/bin/env python3
"""Exports every config at its full size and compares the files with eager, for docs/deploy.md.

    tests/export_table.py table.csv              # can be interrupted: rows of table.csv are kept
    tests/export_table.py table.csv --only TOOD  # networks of configs whose names contain it
    tests/export_table.py table.csv --print      # the table in Markdown

Configs of one network are exported once, as the first of them: their modules, names and shapes of
the state dict, box code and number of anchors per location are equal; what differs is the training,
sizes of anchors and post-processing. Weights are random (see `stir`), images are noise. One thread.
A row is a shape: the largest differences of the file (px, probability, quality), and how far the
detector itself moves if its input is multiplied by 1 + 1e-6.
"""

import argparse
import csv
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from conftest import CONFIGS, make_cfg
from detectron2.modeling import build_model
from torch import nn

import atss_runner
from atss.config import for_inference
from atss.export import export_onnx
from atss.export.files import NUDGE

SHAPES = [(2, 320, 384), (1, 256, 320), (3, 320, 352), (1, 480, 640), (1, 128, 96)]
OFFSET = 0.3  # px
VALUES = ("boxes", "probabilities", "quality")
COLUMNS = ["config", "others", "seconds", "megabytes", "shape"]
COLUMNS += [f"{x}{of}" for of in ("", " of the detector") for x in VALUES] + ["error"]
OPTS = ("MODEL.ATSS.NUM_CLASSES", 80, "MODEL.ATSS.CLASS_NAMES", [f"class {i}" for i in range(80)])
OPTS += ("MODEL.TIMM.PRETRAINED", False)


def stir(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return a model with random norms and offsets, which are equal at the start of a training.

    Offsets get a standard deviation of OFFSET: with many pixels, rounding alone moves boxes by
    pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    hooks = []

    def fill(conv: nn.Conv2d, inputs: tuple) -> None:
        if not conv.weight.any():
            conv.weight.normal_(generator=generator)
            conv.weight *= OFFSET / conv._conv_forward(inputs[0], conv.weight, None).std()

    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("running_mean"):
                value.normal_(generator=generator)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                hooks.append(module.register_forward_pre_hook(fill))
        model.eval().raw(torch.rand(1, 3, 256, 320, generator=generator) * 255)
    for hook in hooks:
        hook.remove()
    return model


def build(name: str, device: str = "cpu"):
    """Return a config for inference and its model."""
    cfg = for_inference(make_cfg(*OPTS, "MODEL.DEVICE", device, config=f"{name}.yaml"))
    torch.manual_seed(0)
    with torch.device(device):
        return cfg, build_model(cfg).eval()


def network_key(model: nn.Module) -> str:
    """Return a text that is equal for models whose files differ in constants alone."""
    shapes = {key: tuple(x.shape) for key, x in model.state_dict().items()}
    plain = bool, int, float, str, tuple, type(None)
    options = [
        {key: x for key, x in vars(module).items() if isinstance(x, plain)}
        for module in [*model.backbone.modules(), *model.head.modules()]
    ]
    box_code, num_anchors = type(model.box_coder), model.anchor_generator.num_anchors
    return f"{model} {shapes} {options} {box_code} {num_anchors} {model.inference}"


def networks() -> list[list[str]]:
    """Return the names of configs, grouped by network, small networks first."""
    groups, sizes = defaultdict(list), {}
    for name in CONFIGS:
        _, model = build(name, device="meta")
        key = network_key(model)
        groups[key].append(name)
        sizes[key] = sum(x.numel() for x in model.state_dict().values())
    return [groups[key] for key in sorted(groups, key=sizes.__getitem__)]


def differences(model: nn.Module, file: Path, shape: tuple[int, int, int]) -> dict[str, str]:
    """Return the largest differences of a file and its detector on noise, and its own movement."""
    batch, *sides = shape
    loaded = atss_runner.load(file, threads=1)
    sides = [-(-x // loaded.settings["divisor"]) * loaded.settings["divisor"] for x in sides]
    pixels = torch.rand(batch, 3, *sides, generator=torch.Generator().manual_seed(batch)) * 255
    with torch.no_grad():
        eager, moved = model.raw(pixels), model.raw(pixels * (1 + NUDGE))
    found = {"shape": " x ".join(map(str, pixels.shape))}
    sizes = np.array([pixels.shape[2:]] * len(pixels))
    outputs = loaded.outputs(pixels.numpy(), sizes).values()
    for name, output, expected, other in zip(VALUES, outputs, eager, moved, strict=False):
        found[name] = f"{np.abs(output - expected.numpy()).max():.1e}"
        found[f"{name} of the detector"] = f"{(other - expected).abs().max():.1e}"
    return found


def rows(names: list[str], folder: Path) -> list[dict]:
    """Export one network and compare it at SHAPES."""
    row = {"config": names[0], "others": " ".join(names[1:])}
    file = folder / "model.onnx"
    start = time.process_time()
    try:
        cfg, model = build(names[0])
        export_onnx(stir(model), cfg, file)
    except Exception as error:  # the next networks are independent of it
        return [row | {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}]
    row["seconds"] = round(time.process_time() - start)
    row["megabytes"] = round(file.stat().st_size / 1e6, 1)
    return [row | differences(model, file, shape) for shape in SHAPES]


def print_table(table: list[dict]) -> None:
    """Print the largest differences of each network, the detector's own in brackets."""
    print(
        "| network of | boxes [px] | probabilities | quality | s | MB |\n|---|---|---|---|---|---|"
    )
    groups = defaultdict(list)
    for row in table:
        groups[row["config"]].append(row)
    for name, (first, *others) in groups.items():
        cells = [first["error"]]
        if not first["error"]:
            worst = {
                x: max((row[x] for row in (first, *others)), key=lambda v: float(v or 0))
                for x in COLUMNS[5:-1]
            }
            cells = [f"{worst[x]} ({worst[f'{x} of the detector']})" for x in VALUES]
            cells = [x.replace(" ()", "") for x in cells] + [first["seconds"], first["megabytes"]]
        print("|", " | ".join([", ".join([name, *first["others"].split()]), *cells]), "|")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, metavar="TABLE.csv")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of configs' names")
    parser.add_argument("--print", action="store_true", help="print the table in Markdown")
    args = parser.parse_args()
    table = list(csv.DictReader(args.table.open())) if args.table.is_file() else []
    if args.print:
        return print_table(table)
    torch.set_num_threads(1)
    done = {row["config"] for row in table}
    for names in networks():
        if names[0] in done or not any(x in name for x in args.only for name in names):
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = rows(names, Path(folder))
        new = not args.table.is_file()
        with args.table.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            if new:
                writer.writeheader()
            writer.writerows(found)
        print(*(list(row.values()) for row in found), sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
