"""A thousand objects in an image: trained, found, counted."""

import json

import numpy as np
import pytest
from conftest import ROOT
from crowds import COLUMNS, ROWS, SPLITS, compare_libraries, make_crowds
from trainings import flatten

import atss.engine.run as way_in

pytestmark = pytest.mark.slow
OBJECTS = ROWS * COLUMNS * SPLITS["test"][0]
# Some minutes of one core: crops of a few objects, anchors of their size.
OPTS = {
    "DATASETS.TRAIN": ("train",),
    "DATASETS.TEST": ("test",),
    "MODEL.ATSS.ANCHOR_SCALES": [4.0],
    "MODEL.ATSS.NUM_CONVS": 1,
    "MODEL.FPN.OUT_CHANNELS": 64,
    "INPUT.MIN_SIZE_TRAIN": (256,),
    "INPUT.MAX_SIZE_TRAIN": 256,
    "INPUT.MIN_SIZE_TEST": 800,
    "INPUT.MAX_SIZE_TEST": 1280,
    "INPUT.COLOR_JITTER": 0.0,
    "INPUT.AUGMENT_UNTIL": 1.0,
    "INPUT.CROP.ENABLED": True,
    "INPUT.CROP.TYPE": "absolute",
    "INPUT.CROP.SIZE": [256, 256],
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.EPOCHS": 0.0,
    "SOLVER.MIN_ITER": 0,
    "SOLVER.MAX_ITER": 120,
    "SOLVER.WARMUP_ITERS": 10,
    "SOLVER.CHECKPOINT_EPOCHS": 0.0,
    "SOLVER.CHECKPOINT_PERIOD": 120,
    "SOLVER.EMA_DECAY": 0.0,
    "TEST.EVAL_EPOCHS": 0.0,
    "TEST.EVAL_PERIOD": 0,
    "TEST.REPORT": False,
    "SEED": 1,
}


def test_a_thousand_objects_are_found_and_counted(real_data, tmp_path):
    pytest.importorskip("timm")
    sources = make_crowds(tmp_path, real_data / "coco")
    registered = [x for name, source in sources.items() for x in ("--register", f"{name}={source}")]
    config = str(ROOT / "configs" / "ATSS_lite0_FPN_fine_tune.yaml")

    def run(*options, **opts):
        values = OPTS | {"OUTPUT_DIR": tmp_path / "out"} | opts
        args = ["--config-file", config, *registered, *options, *flatten(values)]
        args = way_in.make_parser().parse_args(args)
        return way_in.run(args, way_in.prepare(args))["bbox"]

    limited = run()
    log = (tmp_path / "out" / "log.txt").read_text()
    assert (
        "has 2 images with more objects than TEST.DETECTIONS_PER_IMAGE 100: set it to 1000" in log
    )
    assert limited["objects_beyond_limit"] == OBJECTS - 200
    assert limited["AP50"] < 12  # recall is a tenth
    weights = {"MODEL.WEIGHTS": tmp_path / "out" / "model_final.pth"}
    whole = run("--eval-only", **weights, **{"TEST.DETECTIONS_PER_IMAGE": 1500})
    assert whole["max_detections"] == 1500
    assert whole["AP50"] > 3 * limited["AP50"]
    results = tmp_path / "out" / "inference" / "test" / "coco_instances_results.json"
    assert len(json.loads(results.read_text())) > OBJECTS


def test_libraries_agree_on_a_thousand_objects():
    for limit in (100, 1000):
        (_, fast), (_, exact) = compare_libraries(1, 3, limit).values()
        np.testing.assert_allclose(fast, exact, rtol=0, atol=1e-9)
