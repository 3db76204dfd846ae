"""A small exported file, metadata of one, and a backbone to export."""

import os
from pathlib import Path

import torch
from conftest import make_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from filelock import FileLock
from torch import nn

MEAN = [103.5, 116.25, 123.75]
SETTINGS = {
    "schema": 2,
    "classes": ["ant", "bee"],
    "ids": [],
    "inputs": ["image"],
    "outputs": ["boxes", "probabilities", "quality"],
    "nms_inside": False,
    "pixel_mean": MEAN,
    "strides": [32],
    "anchors_per_location": 1,
    "divisor": 32,
    "max_detections": 10,
    "topk": 50,
    "resize": "shortest",
    "min_size": 96,
    "max_size": 160,
    "clip": True,
    "legacy_pixels": False,
    "rank_anchors": False,
    "rank_by_class": False,
    "threshold_on_score": False,
    "input_format": "BGR",
    "score": "sqrt",
    "score_thresh": 0.5,
    "suppression": {"name": "nms", "threshold": 0.6},
    "tiles": {},
    "thresholds": None,
}


# Export takes longer with each layer: two blocks in each of two stages, and an FPN on both.
SMALL = (
    *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 64, "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3"]),
    *("MODEL.FPN.IN_FEATURES", ["res2", "res3"], "MODEL.FPN.OUT_CHANNELS", 64),
    *("MODEL.ATSS.IN_FEATURES", ["p2", "p3", "p4", "p5"], "MODEL.ATSS.NUM_CONVS", 1),
    *("INPUT.MIN_SIZE_TEST", 96, "INPUT.MAX_SIZE_TEST", 160),
    *("MODEL.ATSS.CLASS_NAMES", ["ant", "bee", "cat"], "MODEL.ATSS.CLASS_IDS", [5, 6, 90]),
    *("MODEL.ATSS.NUM_CLASSES", 3, "MODEL.ATSS.SCORE_THRESH_TEST", 0.0),
)
THRESHOLDS = [None, None, 0.9]


def build(*opts):
    """Return a config with class names, and its model with stirred norms."""
    cfg = make_cfg(*SMALL, *opts)
    torch.manual_seed(0)
    model: nn.Module = build_model(cfg).eval()
    with torch.no_grad():
        for name, value in model.named_buffers():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
    return cfg, model


def export_once(tmp_path_factory, nms: bool = False) -> Path:
    """Return a folder with config.yaml, model_best.pth and model.onnx; all processes of a run of
    the tests share it."""
    from atss.export import export_onnx

    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / ("exported_with_nms" if nms else "exported")
    with FileLock(f"{folder}.lock"):
        if not (folder / "model.onnx").exists():
            folder.mkdir(exist_ok=True)
            cfg, model = build()
            (folder / "config.yaml").write_text(cfg.dump())
            torch.save({"model": model.state_dict()}, folder / "model_best.pth")
            export_onnx(model, cfg, folder / "model.onnx", nms, THRESHOLDS)
            # No unfinished file is left.
            assert {x.stem for x in folder.iterdir()} == {"config", "model", "model_best"}
    return folder


class TwoLevels(Backbone):
    """Backbone for images of any size: Detectron2's default divisor is 0."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        kind = cfg.MODEL.RESNETS.NORM
        self.branches = kind == "branches"
        self.fine = nn.Conv2d(3, 32, 7, 8, 0 if kind == "rounds down" else 3)
        self.coarse = nn.Conv2d(32, 32, 3, 2, 1)

    def forward(self, x):
        x = self.fine(x)
        if self.branches and x.mean() > 0:
            x = x + 1
        return {"fine": x, "coarse": self.coarse(x)}

    def output_shape(self):
        return {"fine": ShapeSpec(channels=32, stride=8), "coarse": ShapeSpec(32, stride=16)}


def with_own_backbone(monkeypatch, kind: str = ""):
    """Return a model with this backbone, and its config."""
    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "TwoLevels", TwoLevels)
    opts = ("MODEL.BACKBONE.NAME", "TwoLevels", "MODEL.RESNETS.NORM", kind)
    opts += ("MODEL.ATSS.NUM_CONVS", 1, "MODEL.ATSS.IN_FEATURES", ["fine", "coarse"])
    cfg = make_cfg(*opts, "MODEL.ATSS.CLASS_NAMES", ["ant", "bee", "cat"])
    return build_model(cfg).eval(), cfg
