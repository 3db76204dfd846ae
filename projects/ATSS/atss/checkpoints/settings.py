"""Settings and classes in the files of mmdet and OTX. Their configs are not executed."""

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode

from ..config.checks import flatten


@dataclass(frozen=True)
class Unread:
    """Python code of a value other than a literal, ``dict(...)`` or an earlier name."""

    code: str

    def __repr__(self) -> str:
        return self.code


class Unsupported(Exception):
    """Error for a value that no key of this project can express."""


def parse_config(text: str) -> dict[str, Any]:
    """Return the top-level values of a config in Python, {} if the text is none. Values may be
    :class:`Unread`."""
    names: dict[str, Any] = {}
    try:
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                names[node.targets[0].id] = _evaluate(node.value, names)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    return names


def _evaluate(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_evaluate(x, names) for x in items]
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=items):
            pairs = [(x.arg, x.value) for x in items]
        case ast.Dict(keys=keys, values=values):
            pairs = [(getattr(k, "value", None), v) for k, v in zip(keys, values, strict=True)]
        case _:
            try:
                return ast.literal_eval(node)
            except (TypeError, ValueError):
                return Unread(ast.unparse(node))
    if not all(isinstance(name, str) for name, _ in pairs):
        return Unread(ast.unparse(node))
    return {name: _evaluate(value, names) for name, value in pairs}


def _get(config: Any, path: str) -> Any:
    """Return the value at a dotted path, or None."""
    for name in path.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def _steps(pipeline: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a test pipeline, outer ones first."""
    for step in pipeline if isinstance(pipeline, list) else []:
        if isinstance(step, Mapping):
            yield step
            yield from _steps(step.get("transforms"))


def _with_preprocessing(config: dict[str, Any]) -> dict[str, Any]:
    """Return mmdet 2's or 3's config with the test images' ``pixels`` and ``size``, and with the
    places of mmdet 3 for the other values."""
    model = config.get("model")
    model = dict(model) if isinstance(model, Mapping) else {}
    for name in ("train_cfg", "test_cfg", "data_preprocessor"):  # earlier at the top level
        if model.get(name) is None:
            model[name] = config.get(name)
    places = ("test_dataloader.dataset.pipeline", "data.test.pipeline", "test_pipeline")
    steps = [*_steps(next(filter(None, (_get(config, x) for x in places)), None))]
    normalise = [x for x in steps if str(x.get("type")).endswith("Normalize")]
    pixels = model["data_preprocessor"]
    if isinstance(pixels, Mapping):
        pixels = {"bgr_to_rgb": False} | dict(pixels)
    else:
        pixels = next(iter(normalise), config.get("img_norm_cfg"))
        if isinstance(pixels, Mapping):
            pixels = dict(pixels) | {"bgr_to_rgb": pixels.get("to_rgb", True)}
    sizes = [x for step in steps for x in (step.get("img_scale"), step.get("scale")) if x]
    ratios = [step["keep_ratio"] for step in steps if "keep_ratio" in step]
    size, keep_ratio = next(iter(sizes), None), next(iter(ratios), None)
    if keep_ratio is False and isinstance(size, list | tuple) and size[0] >= size[-1]:
        keep_ratio = "stretch"  # to width and height
    return {
        "model": model,
        "pixels": pixels,
        "input": {"size": size, "keep_ratio": keep_ratio},
    }


def _choose(choices: Mapping[Any, Any]) -> Callable[[Any], Any]:
    def choose(value: Any) -> Any:
        if not isinstance(value, str | bool) or value not in choices:
            raise Unsupported
        return choices[value]

    return choose


def _floats(value: Any) -> list[float]:
    return [float(x) for x in value]


_HEAD, _TEST = "model.bbox_head", "model.test_cfg"
_ANCHORS = f"{_HEAD}.anchor_generator"
# (path of mmdet 3, key, conversion).
Setting = tuple[str, str, Callable[[Any], Any]]
SETTINGS: tuple[Setting, ...] = (
    (
        "model.backbone.style",
        "MODEL.RESNETS.STRIDE_IN_1X1",
        _choose({"caffe": True, "pytorch": False}),
    ),
    ("pixels.mean", "MODEL.PIXEL_MEAN", _floats),
    ("pixels.std", "MODEL.PIXEL_STD", _floats),
    ("pixels.bgr_to_rgb", "INPUT.FORMAT", _choose({True: "RGB", False: "BGR"})),
    ("input.size", "INPUT.MIN_SIZE_TEST", lambda x: int(min(x))),
    ("input.size", "INPUT.MAX_SIZE_TEST", lambda x: int(max(x))),
    (
        "model.neck.relu_before_extra_convs",
        "MODEL.ATSS.RELU_BEFORE_P7",
        _choose({True: True, False: False}),
    ),
    ("model.backbone.dcn.deform_groups", "MODEL.RESNETS.DEFORM_NUM_GROUPS", int),
    (f"{_ANCHORS}.ratios", "MODEL.ATSS.ANCHOR_RATIOS", _floats),
    (f"{_ANCHORS}.octave_base_scale", "MODEL.ATSS.ANCHOR_SCALES", lambda x: [float(x)]),
    (f"{_ANCHORS}.center_offset", "MODEL.ANCHOR_GENERATOR.OFFSET", float),
    (
        f"{_HEAD}.bbox_coder.target_stds",
        "MODEL.ATSS.BBOX_REG_WEIGHTS",
        lambda x: tuple(round(1 / std, 9) for std in x),
    ),
    (
        f"{_HEAD}.score_voting",
        "MODEL.ATSS.SUPPRESSION",
        _choose({True: "score_vote", False: "nms"}),
    ),
    (f"{_TEST}.nms_pre", "MODEL.ATSS.TOPK_CANDIDATES_TEST", int),
    (f"{_TEST}.score_thr", "MODEL.ATSS.SCORE_THRESH_TEST", float),
    (f"{_TEST}.nms.iou_threshold", "MODEL.ATSS.NMS_THRESH_TEST", float),
    (f"{_TEST}.max_per_img", "TEST.DETECTIONS_PER_IMAGE", int),
)
# Those that most configs leave out, and that our defaults then equal.
OPTIONAL: tuple[Setting, ...] = (
    ("input.keep_ratio", "INPUT.RESIZE", _choose({True: "shortest", "stretch": "stretch"})),
    (
        f"{_TEST}.nms.class_agnostic",
        "MODEL.ATSS.CLASS_AGNOSTIC_NMS",
        _choose({True: True, False: False}),
    ),
)
# Key of the rule ATSS; other detectors' rules have other arguments.
_TOP_K: Setting = ("model.train_cfg.assigner.topk", "MODEL.ATSS.ASSIGNERS.ATSS.TOP_K", int)
# {path: the only value that is taken over}.
FIXED = {
    "pixels.rgb_to_bgr": False,
    "model.neck.start_level": 1,
    "model.neck.add_extra_convs": "on_output",
    f"{_ANCHORS}.scales_per_octave": 1,
    f"{_ANCHORS}.strides": [8, 16, 32, 64, 128],
    f"{_HEAD}.bbox_coder.target_means": [0, 0, 0, 0],
    f"{_TEST}.nms.type": "nms",
}


def apply_settings(cfg: CfgNode, text: str) -> tuple[list[str], list[str]]:
    """Set keys, in place, to the values of mmdet's config.

    Args:
        text: the config in the file, or "".

    Returns:
        values that are not taken over, and keys with values that the text does not contain.
    """
    config = _with_preprocessing(parse_config(text))
    rows = (*SETTINGS, _TOP_K) if cfg.MODEL.ATSS.ASSIGNER == "ATSS" else SETTINGS
    refused, assumed = [], []
    optional = {key for _, key, _ in OPTIONAL}
    for path, key, convert in (*rows, *OPTIONAL):
        value = _get(config, path)
        if value is None:
            if key not in optional:
                assumed.append(key)
            continue
        try:
            cfg.merge_from_list([key, convert(value)])
        except (Unsupported, AssertionError, ArithmeticError, TypeError, ValueError):
            refused.append(f"{path} {value!r}")
    refused += [
        f"{path} {value!r}"
        for path, only in FIXED.items()
        if (value := _get(config, path)) is not None and value != only
    ]
    values = dict(flatten(cfg))
    return refused, [f"{key} {values[key]!r}" for key in assumed]


# Places of the class names: of mmdet 3 and 2, getitune, OTX 2.
CLASS_NAMES = (
    *("meta.dataset_meta.classes", "meta.dataset_meta.CLASSES", "meta.CLASSES"),
    *("hyper_parameters.label_info.label_names", "label_info.label_names"),
)


def class_names_in(content: Any) -> list[str]:
    """Return the class names in a checkpoint by mmdet or OTX, or []."""
    names: Any = next(filter(None, (_get(content, x) for x in CLASS_NAMES)), [])
    names = [names] if isinstance(names, str) else names
    is_list = isinstance(names, list | tuple) and all(isinstance(x, str) for x in names)
    return list(names) if is_list else []
