#!/usr/bin/env python3
"""Compare trainings on whole images, on crops (INPUT.FULL_SIZE_CROP), and on both.

    python tests/crop_ablation.py aquarium/data.yaml --output output/crops

Images are halved, so that many objects are small: most have 240 x 320 pixels then, and are trained
at 192 x 256. All trainings have the same iterations. The last weights are
evaluated on whole images of the training's size and of twice that. After an interruption the same
command continues.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from atss.engine.coco import evaluate_boxes
from atss.labels.formats import read_labels

TRAIN_NET = Path(__file__).parents[1] / "tools/train_net.py"
SPLITS = {"train": "train", "test": "val"}
# The share of crops of each row, and the sizes of evaluation, chosen before the first training.
ROWS = {"whole": 0.0, "crops": 1.0, "both": 0.5}
SIZES = {192: 256, 384: 512}
RECIPE = {
    "INPUT.MIN_SIZE_TRAIN": "(192,)",
    "INPUT.MAX_SIZE_TRAIN": 256,
    "SOLVER.EPOCHS": 0.0,
    "SOLVER.MAX_ITER": 640,
    "SOLVER.CHECKPOINT_EPOCHS": 0.0,
    "SOLVER.CHECKPOINT_PERIOD": 160,
    "SOLVER.EMA_DECAY": 0.0,
    "TEST.EVAL_EPOCHS": 0.0,
    "TEST.EVAL_PERIOD": 0,
    "TEST.REPORT": False,
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="data.yaml with the splits train and val")
    parser.add_argument("--output", type=Path, default=Path("output/crops"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "opts", nargs="*", default=[], metavar="KEY VALUE", help="last: over every row"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_intermixed_args(argv)
    truth = {split: halve(args.source, split, args.output / "data") for split in SPLITS}
    lines = ["| row | evaluated at | seed | AP | AP, small | recall, small |", "|" + "---|" * 6]
    for seed in args.seeds:
        for row, share in ROWS.items():
            folder = args.output / row / f"seed{seed}"
            opts = RECIPE | {"INPUT.FULL_SIZE_CROP": share, "SEED": seed}
            if not (folder / "model_final.pth").is_file():
                run(args, folder, opts, "--resume")
            for short, longest in SIZES.items():
                target = folder / str(short)
                sizes = {"INPUT.MIN_SIZE_TEST": short, "INPUT.MAX_SIZE_TEST": longest}
                detections = target / "inference" / "halved_test" / "coco_instances_results.json"
                if not detections.is_file():
                    weights = {"MODEL.WEIGHTS": folder / "model_final.pth"}
                    run(args, target, opts | sizes | weights, "--eval-only")
                numbers = measure(truth["test"], json.loads(detections.read_text()))
                cells = " | ".join(f"{100 * x:.1f}" for x in numbers)
                lines.append(f"| {row} | {short} x {longest} | {seed} | {cells} |")
    (args.output / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def halve(source: str, split: str, folder: Path) -> dict:
    """Write a split with half the sides, in COCO's format, and return its content."""
    labels = read_labels(source, SPLITS[split])
    images = folder / split
    for image in labels.content["images"]:
        name = image["file_name"]
        target = images / f"{image['id']}.png"
        image["file_name"] = target.name
        image["width"], image["height"] = size = image["width"] // 2, image["height"] // 2
        if not target.is_file():
            images.mkdir(parents=True, exist_ok=True)
            with Image.open(Path(labels.image_dir) / name) as opened:
                opened.convert("RGB").resize(size, Image.Resampling.BOX).save(target)
    for annotation in labels.content["annotations"]:
        annotation["bbox"] = [x / 2 for x in annotation["bbox"]]
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        annotation.pop("segmentation", None)
    (folder / f"{split}.json").write_text(json.dumps(labels.content))
    return labels.content


def run(args: argparse.Namespace, folder: Path, opts: dict, option: str) -> None:
    data = args.output / "data"
    register = [f"halved_{x}={data}/{x}.json:{data}/{x}" for x in SPLITS]
    opts |= {"DATASETS.TRAIN": "('halved_train',)", "DATASETS.TEST": "('halved_test',)"}
    pairs = [str(x) for item in (opts | {"OUTPUT_DIR": folder}).items() for x in item]
    subprocess.run(
        [
            *(sys.executable, str(TRAIN_NET), "--config-file", "ATSS_lite0_FPN_fine_tune", option),
            *(x for name in register for x in ("--register", name)),
            *(*pairs, *args.opts),
        ],
        check=True,
    )


def measure(truth: dict, detections: list[dict]) -> tuple[float, float, float]:
    """Return AP, and AP and recall (of 100 detections per image) of objects below 32 x 32
    pixels."""
    annotations = [x | {"id": i, "difficult": 0} for i, x in enumerate(truth["annotations"], 1)]
    evaluation = evaluate_boxes(truth | {"annotations": annotations}, detections)
    precision, recall = (np.array(evaluation.eval[x]) for x in ("precision", "recall"))
    everything, small = precision[..., 0, -1], precision[..., 1, -1]
    found = recall[..., 1, -1]
    return tuple(float(x[x > -1].mean()) for x in (everything, small, found))


if __name__ == "__main__":
    main()
