#!/usr/bin/env python3
"""Compares what two commits compute, bit for bit, on every config: proves a refactoring.

    tests/equality.py OLD                  # a commit against the working tree
    tests/equality.py OLD NEW              # two commits
    tests/equality.py OLD --only atss_k3   # configs whose names contain it
    tests/equality.py OLD --rules          # every rule on 200 random scenes

Both commits run in this environment, on one thread, in float32: two images of 96 x 128 pixels with
five objects and random weights of a fixed seed. ResNet-101 and ResNeXt-101 get the depth 50; else
configs are unchanged. Compared by SHA-256: names, shapes and values of the state dict, losses, all
gradients and the detections of one view; the LazyConfig likewise. Exits with 1 if anything differs.

With --rules, the rules of tests/rule_scenes.py are called with each of their arguments on each
scene, in the new commit with every engine of ``use_engine``. Compared are the object of each anchor
and its score, bit for bit. An anchor that is assigned to another of two identical objects (same
box, class and image) differs, and is also counted separately.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))
from benchmarks.commits import checked_out, environment  # noqa: E402

# Arguments of use_engine. The limit is so low that most scenes have several pieces.
ENGINES = {
    "lists": {},
    "tables": {},
    "tables in pieces": {"limit": 1 << 11},
}
# Recipes over a row.
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
    """Return {name: SHA-256} of weights, losses, gradients and detections of a model."""
    import torch

    digests = {f"weights: {name}": digest(x) for name, x in model.state_dict().items()}
    model.train()
    losses = model(images())
    sum(losses.values()).backward()
    digests |= {f"loss: {name}": digest(x) for name, x in losses.items()}
    gradients = ((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
    digests |= {f"gradient: {name}": digest(x) for name, x in gradients}
    model.eval()
    with torch.no_grad():
        for i, result in enumerate(model(images())):
            detected = result["instances"]
            for name in ("pred_boxes", "scores", "pred_classes"):
                value = detected.get(name)
                digests[f"detections {i}: {name}"] = digest(getattr(value, "tensor", value))
    return digests


def models(only: str) -> Iterator[tuple[str, object]]:
    """Yield name and model of each config of the commit whose package is imported."""
    import torch
    from detectron2.config import LazyConfig, instantiate
    from detectron2.modeling import build_model

    import atss
    from atss import load_config

    assert Path(atss.__file__).is_relative_to(Path.cwd()), atss.__file__
    configs = Path.cwd() / "configs"
    files = {str(f.relative_to(configs)): (f,) for f in sorted(configs.rglob("*.yaml"))}
    files = {name: parts for name, parts in files.items() if not name.startswith("two_stage")}
    files |= {name: tuple(configs / x for x in parts) for name, parts in RECIPES.items()}
    for name, parts in files.items():
        alone = len(parts) == 1 and "_BASE_" not in parts[0].read_text()
        if only not in name or (alone and name != "Base-ATSS.yaml"):
            continue
        cfg = load_config(*parts)
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


def call_rules(only: str, num_scenes: int) -> dict:
    """Call every rule on every scene.

    Returns:
        {engine: {rule and arguments: [(N, R) objects and scores, or the error, of each scene]}},
        and under "scenes" traits, digest and identical objects of each scene.
    """
    import rule_scenes

    from atss import assigners

    use_engine = getattr(assigners, "use_engine", None)
    engines = ENGINES if use_engine else {"lists": {}}
    scenes = [rule_scenes.make_scene(i) for i in range(num_scenes)]
    found: dict = {"scenes": [(" + ".join(s.traits), _inputs(s), _alike(s.gt)) for s in scenes]}
    for engine, options in engines.items():
        with use_engine(engine.split()[0], **options) if use_engine else nullcontext():
            found[engine] = {
                f"{rule} {arguments or ''}".strip(): [_call(rule, arguments, s) for s in scenes]
                for rule, all_arguments in rule_scenes.ARGUMENTS.items()
                if only in rule
                for arguments in all_arguments
            }
        print(engine, file=sys.stderr, flush=True)
    return found


def _call(rule: str, arguments: dict, scene):
    import rule_scenes
    import torch

    _, anchors, gt, predictions = scene
    try:
        assigner = rule_scenes.make_rule(rule, arguments, len(anchors.strides))
        assigned = assigner(anchors, gt, predictions)
    except Exception as error:  # a difference of this scene, which must not hide others
        return f"{type(error).__name__}: {error}"
    return assigned.gt_index.to(torch.int16), assigned.score


def _inputs(scene) -> str:
    """Return the digest of a scene."""
    # By position: the names of the fields differ between commits.
    classes, box_regression, *_ = scene.predictions.output
    tensors = scene.anchors.boxes, scene.gt.boxes, classes, box_regression
    return "".join(map(digest, tensors))


def _alike(gt):
    """Return a (G,) number for each object, the same for identical objects."""
    import torch

    key = torch.cat([gt.boxes, gt.classes[:, None], gt.image_index[:, None]], dim=1)
    return key.unique(dim=0, return_inverse=True)[1]


def dump(target: str, args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if args.rules:
        torch.save(call_rules(args.only, args.scenes), target)
        return
    found = {}
    for name, model in models(args.only):
        print(name, file=sys.stderr, flush=True)
        found[name] = compute(model)
    Path(target).write_text(json.dumps(found))


def run(folder: Path, target: Path, args: argparse.Namespace) -> dict:
    """Return the digests, or assignments, of the commit in a folder."""
    command = [sys.executable, "-W", "ignore", __file__, "--dump", str(target), "--only", args.only]
    if args.rules:
        command += ["--rules", "--scenes", str(args.scenes)]
    subprocess.run(command, cwd=folder, env=environment(folder, threads=1), check=True)
    if args.rules:
        import torch

        return torch.load(target)
    return json.loads(target.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commits", nargs="*", metavar="COMMIT")
    parser.add_argument("--only", default="", help="part of a config's name, or of a rule's")
    parser.add_argument("--rules", action="store_true", help="rules alone, on random scenes")
    parser.add_argument("--scenes", type=int, default=200, help="number of them")
    parser.add_argument("--dump", help=argparse.SUPPRESS)  # of each commit's process
    args = parser.parse_args()
    if args.dump:
        dump(args.dump, args)
        return 0
    if len(args.commits) not in (1, 2):
        parser.error("one commit or two")
    with tempfile.TemporaryDirectory() as scratch:
        found = []
        for i, commit in enumerate([*args.commits, None][:2]):
            with checked_out(commit) as folder:
                found.append(run(folder, Path(scratch) / f"{i}.json", args))
    return (compare_rules if args.rules else compare)(*found)


def compare_rules(old: dict, new: dict) -> int:
    """Print a table of rules and engines, and the scenes that differ."""
    from benchmarks.timing import table

    scenes, engines = old.pop("scenes"), list(new)
    for (*one, _), (*other, _) in zip(scenes, new.pop("scenes"), strict=True):
        assert one == other, "the commits have different scenes"
    rows: dict[tuple[str, str], list] = {}
    examples: dict[tuple[str, str], list[str]] = {}
    for engine in engines[1:]:
        for name, expected in old["lists"].items():
            key = name.split()[0], engine
            row = rows.setdefault(key, [0, 0, 0, 0, 0, 0, 0.0])
            for i, (traits, _, alike) in enumerate(scenes):
                *counts, largest, error = differences(expected[i], new[engine][name][i], alike)
                wrong = counts[1] + counts[3] > 0
                row[:6] = [a + b for a, b in zip(row, [1, wrong, *counts], strict=False)]
                row[6] = max(row[6], largest)
                if wrong:
                    where = f"{engine}, scene {i} ({traits}): {name}"
                    found = error or f"{counts[1]} anchors, {counts[3]} scores"
                    examples.setdefault(key, []).append(f"{where}: {found}")
    header = ["rule", "engine", "calls", "of them differ", "anchors", "of them differ"]
    header += ["between identical objects", "scores that differ", "by up to"]
    print(table(header, [[*key, *row[:6], f"{row[6]:.3g}"] for key, row in rows.items()]))
    for lines in examples.values():
        print(*lines[:3], sep="\n")
    differing = sum(map(len, examples.values()))
    print(f"{len(scenes)} scenes: {differing} calls differ")
    return 1 if differing or not rows else 0


def differences(old, new, alike) -> tuple[int, int, int, int, float, str]:
    """Compare the results of one call in two commits.

    Args:
        alike: (G,) a number for each object, the same for identical objects.

    Returns:
        the number of anchors, of those that differ, of those among them that are assigned to an
        identical object, of scores that differ, the largest difference of scores, and the error if
        only one of the calls has raised one.
    """
    import torch

    errors = [x for x in (old, new) if isinstance(x, str)]
    if len(errors) == 2:
        return 0, 0, 0, 0, 0.0, ""
    if errors:
        count = next(x for x in (old, new) if not isinstance(x, str))[0].numel()
        return count, count, 0, 0, 0.0, errors[0]
    (a, a_score), (b, b_score) = old, new
    differ = a != b
    both = differ & (a >= 0) & (b >= 0)
    identical = alike[a[both].long()] == alike[b[both].long()]
    none = torch.full(a.shape, torch.nan)
    a_score, b_score = (none if x is None else x for x in (a_score, b_score))
    # The sign of a zero counts, the payload of a NaN does not.
    same = a_score.view(torch.int32) == b_score.view(torch.int32)
    off = (a_score - b_score)[~(same | (a_score.isnan() & b_score.isnan()))].abs()
    largest = off.nan_to_num(torch.inf).max().item() if len(off) else 0.0
    return a.numel(), int(differ.sum()), int(identical.sum()), len(off), largest, ""


def compare(old: dict, new: dict) -> int:
    differing = len(old.keys() ^ new.keys())
    for name in sorted(old.keys() ^ new.keys()):
        print(f"{name}: in one commit only")
    tensors = 0
    for name in sorted(old.keys() & new.keys()):
        a, b = old[name], new[name]
        wrong = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
        differing += bool(wrong)
        tensors += len(a | b)
        if wrong:
            print(f"{name}: {len(wrong)} of {len(a | b)} differ: {', '.join(wrong[:5])}")
    print(f"{len(old.keys() & new.keys())} configs, {tensors} tensors: {differing} configs differ")
    return 1 if differing or not tensors else 0


if __name__ == "__main__":
    sys.exit(main())
