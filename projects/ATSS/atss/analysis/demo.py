"""A training on a small data set that needs no download, with pictures of the results."""

import logging
from pathlib import Path

from detectron2.data import DatasetCatalog
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from ..engine import Trainer
from ..engine.run import make_parser, prepare
from ..engine.terminal import hide_explained_tracebacks
from ..predictor import Predictor
from .digits import Recipe, make_digits
from .pictures import beside_truth
from .plots import plot_examples, plot_metrics

# Loggers that are silent in the demo.
QUIET = ("detectron2.engine.defaults", "detectron2.data", "fvcore", "detectron2.evaluation.testing")


def train_on_digits(
    root: Path, config: str, recipe: Recipe, score: float = 0.4
) -> dict[str, float]:
    """Draw the data, train or resume, evaluate, and write config, weights, metrics and pictures.
    Return AP, AP50 and so on, in percent.

    Args:
        config: a file with the data sets digits_train and digits_test.
        score: least score in detections.png.
    """
    data = root / "data"
    root.mkdir(parents=True, exist_ok=True)
    make_digits(data, recipe)
    register = [f"--register=digits_{s}={data}/{s}.json:{data}/{s}" for s in ("train", "test")]
    args = make_parser().parse_args(["--config-file", config, *register, "OUTPUT_DIR", str(root)])
    cfg = prepare(args)
    setup_logger(str(root))
    hide_explained_tracebacks(str(root))
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    seed_all_rng(cfg.SEED)
    (root / "config.yaml").write_text(cfg.dump())

    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    if trainer.start_iter >= trainer.max_iter:
        print(f"The demo in {root} is trained: evaluating it again.")
    elif trainer.start_iter:
        print(f"Resuming the demo in {root} at iteration {trainer.start_iter}.")
    else:
        print(f"Starting a new demo of {trainer.max_iter} iterations in {root}.")
    trainer.train()

    predictor = Predictor(root / "config.yaml", str(root / "model_final.pth"))
    held_out = DatasetCatalog.get("digits_test")[:8]
    plot_examples(*beside_truth(predictor, held_out, score), root / "detections.png")
    plot_metrics(root / "metrics.json", root / "training.png")
    return trainer._last_eval_results["bbox"]
