"""Metadata of a small exported file."""

MEAN = [103.5, 116.25, 123.75]
SETTINGS = {
    "schema": 1,
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
}
