#!/usr/bin/env python3
"""`make demo`: trains ATSS on handwritten digits over photographs, evaluates, and draws what came
out, in some minutes on two CPU cores. Run again after an interruption it goes on."""

import logging
from pathlib import Path

from detectron2.data import DatasetCatalog
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from atss.analysis.pictures import beside_truth
from atss.analysis.plots import plot_examples, plot_metrics
from atss.config import get_config_file
from atss.data.digits import DEMO, make_digits
from atss.engine import Trainer
from atss.engine.run import make_parser, prepare
from atss.predictor import Predictor

ROOT = Path("output/demo")
CONFIG = get_config_file("ATSS_R_18_FPN_demo")
SCORE = 0.4
# Loggers that tell more than a newcomer wants to read.
QUIET = ("detectron2.engine.defaults", "detectron2.data", "fvcore", "detectron2.evaluation.testing")


def main() -> None:
    data = ROOT / "data"
    ROOT.mkdir(parents=True, exist_ok=True)
    make_digits(data, DEMO)
    register = [f"--register=digits_{s}={data}/{s}.json:{data}/{s}" for s in ("train", "test")]
    args = make_parser().parse_args(
        ["--config-file", str(CONFIG), *register, "OUTPUT_DIR", str(ROOT)]
    )
    cfg = prepare(args)
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

    predictor = Predictor(ROOT / "config.yaml", str(ROOT / "model_final.pth"))
    held_out = DatasetCatalog.get("digits_test")[:8]
    plot_examples(*beside_truth(predictor, held_out, SCORE), ROOT / "detections.png")
    plot_metrics(ROOT / "metrics.json", ROOT / "training.png")
    results = trainer._last_eval_results["bbox"]
    print("\nAP on 250 held-out images:")
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl"):
        print(f"  {name:<5} {results[name]:5.1f}")
    print(f"Pictures: {ROOT}/detections.png and {ROOT}/training.png")


if __name__ == "__main__":
    main()
