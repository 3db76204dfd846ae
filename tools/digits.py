#!/usr/bin/env python3
"""`make demo`: trains ATSS on handwritten digits over photographs, evaluates, and draws what came
out, in some minutes on two CPU cores. Run again after an interruption it goes on."""

import json
import logging
from pathlib import Path

import matplotlib
import numpy as np
import train_net
from demo import Detector
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from atss.data.digits import DEMO, make_digits
from atss.engine import Trainer

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path("output/demo")
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"
SCORE = 0.4
# Loggers that tell more than a newcomer wants to read.
QUIET = ("detectron2.engine.defaults", "detectron2.data", "fvcore", "detectron2.evaluation.testing")


def plot_metrics(metrics_file: Path, target: Path) -> None:
    """Losses and AP over iterations, from the trainer's metrics.json."""
    records = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    curves = {"class": "loss_cls", "box": "loss_box_reg", "centerness": "loss_centerness"}
    for axis, lines in ((left, curves), (right, {"AP": "bbox/AP", "AP50": "bbox/AP50"})):
        for label, key in lines.items():
            # A resumed run writes some iterations twice: the last word counts.
            points = {r["iteration"]: r[key] for r in records if key in r}
            marker = "o" if axis is right else None
            axis.plot(
                sorted(points), [points[i] for i in sorted(points)], label=label, marker=marker
            )
        axis.set_xlabel("iteration")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.legend()
    left.set_ylabel("loss (median of 20 iterations)")
    left.set_ylim(bottom=0)
    right.set_ylabel("AP on held-out images (%)")
    right.set_ylim(0, 100)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def draw_examples(detector: Detector, records: list[dict], target: Path) -> None:
    """Held-out images, ground truth left and detections right."""
    images = [read_image(record["file_name"], format="BGR") for record in records]
    figure, axes = plt.subplots(len(images) // 2, 4, figsize=(12, 1.55 * len(images)))
    axes = axes.reshape(-1, 2)
    for axis, image, record, found in zip(axes, images, records, detector(images), strict=True):
        found = found[found.scores >= SCORE]
        truth = [(a["bbox"], str(a["category_id"])) for a in record["annotations"]]
        detected = [
            ([x1, y1, x2 - x1, y2 - y1], f"{k} {score:.2f}")
            for (x1, y1, x2, y2), k, score in zip(
                found.pred_boxes.tensor.tolist(),
                found.pred_classes.tolist(),
                found.scores.tolist(),
                strict=True,
            )
        ]
        for panel, boxes, colour, style in (
            (axis[0], truth, "lime", "-"),
            (axis[1], detected, "orange", "--"),
        ):
            panel.imshow(np.ascontiguousarray(image[:, :, ::-1]))
            panel.set_axis_off()
            for (x, y, w, h), text in boxes:
                box = plt.Rectangle((x, y), w, h, fill=False, ec=colour, ls=style, lw=1.6)
                panel.add_patch(box)
                panel.text(
                    *(x, max(y - 2, 8), text),
                    color="black",
                    fontsize=8,
                    va="bottom",
                    bbox={"facecolor": colour, "pad": 0.8, "lw": 0, "alpha": 0.85},
                )
    for i in range(2):
        axes[i][0].set_title("ground truth", color="green")
        axes[i][1].set_title(f"detections, score ≥ {SCORE}", color="darkorange")
    figure.tight_layout(pad=0.4)
    figure.savefig(target, dpi=100)
    plt.close(figure)


def main() -> None:
    data = ROOT / "data"
    ROOT.mkdir(parents=True, exist_ok=True)
    make_digits(data, DEMO)
    register = [f"--register=digits_{s}={data}/{s}.json:{data}/{s}" for s in ("train", "test")]
    args = train_net.make_parser().parse_args(
        ["--config-file", str(CONFIG), *register, "OUTPUT_DIR", str(ROOT)]
    )
    cfg = train_net.setup(args)
    setup_logger(str(ROOT))
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    seed_all_rng(cfg.SEED)
    (ROOT / "config.yaml").write_text(cfg.dump())

    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    if trainer.start_iter >= trainer.max_iter:
        print(f"The demo in {ROOT} is trained already: evaluating it again.")
    elif trainer.start_iter:
        print(f"An interrupted demo is in {ROOT}: going on at iteration {trainer.start_iter}.")
    else:
        print(f"Starting a new demo of {trainer.max_iter} iterations in {ROOT}.")
    trainer.train()

    detector = Detector(str(ROOT / "config.yaml"), str(ROOT / "model_final.pth"), [])
    draw_examples(detector, DatasetCatalog.get("digits_test")[:8], ROOT / "detections.png")
    plot_metrics(ROOT / "metrics.json", ROOT / "training.png")
    results = trainer._last_eval_results["bbox"]
    print("\nAP on 250 held-out images:")
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl"):
        print(f"  {name:<5} {results[name]:5.1f}")
    print(f"Pictures: {ROOT}/detections.png and {ROOT}/training.png")


if __name__ == "__main__":
    main()
