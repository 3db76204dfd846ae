#!/usr/bin/env python3
"""Proves a refactoring: two commits compute the same, bit for bit, on every config.

    tests/equality.py OLD                  # a commit against the working tree
    tests/equality.py OLD NEW              # two commits
    tests/equality.py OLD --only atss_k3   # configs whose names hold it

Each commit is checked out beside the other and run in this environment, on one thread, in
float32: two images of 96 x 128 pixels with five objects, the weights that the seed draws, configs
as they are but for ResNet-101 and ResNeXt-101, which get the depth of 50. Compared are the names,
shapes and values of the state dict, the losses, all gradients and the detections (of one view), by
SHA-256; the LazyConfig likewise. Exits with 1 where anything differs.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Recipes, and the files that they are laid over to make a model.
RECIPES = {
    "tables/atss_box+ablation": ("tables/atss_box.yaml", "ablation.yaml"),
    "tables/ssc_point+ablation": ("tables/ssc_point.yaml", "ablation.yaml"),
    "tables/retinanet_A9+ablation": ("tables/retinanet_A9.yaml", "ablation.yaml"),
}


def digest(tensor) -> str:
    shape = f"{tuple(tensor.shape)} {tensor.dtype}".encode()
    return hashlib.sha256(shape + tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def images() -> list[dict]:
    """Two training images in Detectron2's format."""
    import torch
    from detectron2.structures import Boxes, Instances

    generator = torch.Generator().manual_seed(0)
    boxes = [[4, 6, 40, 50], [30, 10, 120, 90], [60, 40, 76, 52], [0, 0, 128, 96], [90, 5, 99, 60]]
    examples = []
    for own in (boxes[:2], boxes[2:]):
        instances = Instances((96, 128))
        instances.gt_boxes = Boxes(torch.tensor(own, dtype=torch.float32))
        instances.gt_classes = torch.arange(len(own)) % 3
        image = torch.rand(3, 96, 128, generator=generator) * 255
        examples.append({"image": image, "instances": instances, "height": 96, "width": 128})
    return examples


def compute(model) -> dict[str, str]:
    """{what: SHA-256} of everything that a model computes."""
    import torch

    found = {f"weights: {name}": digest(x) for name, x in model.state_dict().items()}
    model.train()
    losses = model(images())
    sum(losses.values()).backward()
    found |= {f"loss: {name}": digest(x) for name, x in losses.items()}
    gradients = ((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
    found |= {f"gradient: {name}": digest(x) for name, x in gradients}
    model.eval()
    with torch.no_grad():
        for i, result in enumerate(model(images())):
            detected = result["instances"]
            for name in ("pred_boxes", "scores", "pred_classes"):
                value = detected.get(name)
                found[f"detections {i}: {name}"] = digest(getattr(value, "tensor", value))
    return found


def models(only: str) -> Iterator[tuple[str, object]]:
    """Name and model of every config of the commit whose package is imported."""
    import torch
    from detectron2.config import LazyConfig, instantiate
    from detectron2.modeling import build_model

    import atss
    from atss import load_config

    assert Path(atss.__file__).is_relative_to(Path.cwd()), atss.__file__
    configs = Path.cwd() / "configs"
    files = {str(f.relative_to(configs)): (f,) for f in sorted(configs.rglob("*.yaml"))}
    files |= {name: tuple(configs / f for f in some) for name, some in RECIPES.items()}
    for name, some in files.items():
        alone = len(some) == 1 and "_BASE_" not in some[0].read_text()
        if only not in name or (alone and name != "Base-ATSS.yaml"):
            continue
        cfg = load_config(*some)
        cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "DATASETS.TRAIN", ()])
        cfg.merge_from_list(["DATASETS.TEST", (), "MODEL.ATSS.NUM_CLASSES", 3])
        cfg.merge_from_list(["MODEL.ATSS.PRECISION", "fp32", "MODEL.ATSS.SCORE_THRESH_TEST", 0.0])
        cfg.MODEL.RESNETS.DEPTH = min(cfg.MODEL.RESNETS.DEPTH, 50)
        torch.manual_seed(0)
        yield name, build_model(cfg)
    if only in "ATSS_R_50_FPN_1x.py":
        lazy = LazyConfig.load(str(configs / "ATSS_R_50_FPN_1x.py"))
        lazy.model.num_classes = 3
        torch.manual_seed(0)
        yield "ATSS_R_50_FPN_1x.py", instantiate(lazy.model)


def dump(target: str, only: str) -> None:
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    found = {}
    for name, model in models(only):
        print(name, file=sys.stderr, flush=True)
        found[name] = compute(model)
    Path(target).write_text(json.dumps(found))


def run(folder: Path, target: Path, only: str) -> dict:
    """What the commit in a folder computes."""
    environment = os.environ | {"PYTHONPATH": str(folder / "projects/ATSS"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--dump", str(target), "--only", only]
    subprocess.run(command, cwd=folder, env=environment, check=True)
    return json.loads(target.read_text())


def worktree(*arguments: str) -> None:
    subprocess.run(["git", "-C", str(ROOT), "worktree", *arguments], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commits", nargs="*", metavar="COMMIT")
    parser.add_argument("--only", default="", help="part of a config's name")
    parser.add_argument("--dump", help=argparse.SUPPRESS)  # what each commit is run with
    args = parser.parse_args()
    if args.dump:
        dump(args.dump, args.only)
        return 0
    if len(args.commits) not in (1, 2):
        parser.error("one commit or two")
    with tempfile.TemporaryDirectory() as scratch:
        found = []
        for i, commit in enumerate([*args.commits, None][:2]):
            folder = ROOT
            if commit:
                folder = Path(scratch) / str(i)
                worktree("add", "-q", "--detach", str(folder), commit)
            try:
                found.append(run(folder, Path(scratch) / f"{i}.json", args.only))
            finally:
                if commit:
                    worktree("remove", "--force", str(folder))
    return compare(*found)


def compare(old: dict, new: dict) -> int:
    differing = len(old.keys() ^ new.keys())
    for name in sorted(old.keys() ^ new.keys()):
        print(f"{name}: in one of them only")
    tensors = 0
    for name in sorted(old.keys() & new.keys()):
        a, b = old[name], new[name]
        wrong = [what for what in sorted(a.keys() | b.keys()) if a.get(what) != b.get(what)]
        differing += bool(wrong)
        tensors += len(a | b)
        if wrong:
            print(f"{name}: {len(wrong)} of {len(a | b)} differ: {', '.join(wrong[:5])}")
    print(f"{len(old.keys() & new.keys())} configs, {tensors} tensors: {differing} configs differ")
    return 1 if differing or not tensors else 0


if __name__ == "__main__":
    sys.exit(main())
