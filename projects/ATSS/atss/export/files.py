"""Export of a trained detector to one file for every batch and size, with its parity checked.

The file maps pixels to boxes, class probabilities and quality at every anchor, and the runner
(``atss_runner``) selects detections; or the file maps pixels to detections. Its metadata property
"atss" is JSON with all that a runner needs.
"""

import dataclasses
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

import atss_runner
from atss_runner.postprocess import anchors_per_level, select
from atss_runner.settings import SCHEMA

from .. import __version__
from ..config import build_tiles, class_ids, class_names
from ..errors import UserError
from ..modeling import ATSSDetector, suppression
from ..modeling.postprocess import product, root
from . import selection
from .formats import Save, hidden, move, remove, require, to_onnx, to_openvino
from .padding import static_padding

OUTPUTS = ("boxes", "probabilities", "quality")
SUPPRESSIONS: dict[Any, str] = {
    suppression.keep_all: "none",
    suppression.NMS: "nms",
    suppression.ScoreVote: "score_vote",
    suppression.Vote: "vote",
    suppression.SoftVote: "soft_vote",
}
# The file may differ from eager by so many times what eager itself moves when its input is
# multiplied by 1 + NUDGE.
NUDGE, ALLOWED = 1e-6, 10
# Share of the detections that may differ: engines suppress in float32, so that a pair of boxes near
# the threshold may be decided otherwise.
UNMATCHED = 0.01


class Parity(NamedTuple):
    """The largest differences of a file and eager at one shape, and eager's own movement.

    Attributes:
        shape: (N, C, H, W).
        differences, own: of boxes in pixels, of probabilities, and of quality.
        detections: if the file contains NMS, their number, and how many differ from the runner's.
    """

    shape: tuple[int, ...]
    differences: tuple[float, ...]
    own: tuple[float, ...]
    detections: tuple[int, int] | None = None


class Raw(nn.Module):
    """The part of a detector that is exported."""

    def __init__(self, detector: ATSSDetector):
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(N, C, H, W) -> :meth:`ATSSDetector.raw`."""
        return self.detector.raw(image)


def export_onnx(
    detector: ATSSDetector,
    cfg: CfgNode,
    target: Path,
    nms: bool = False,
    thresholds: Sequence[float | None] | None = None,
) -> list[Parity]:
    """Write an ONNX file, and compare it with the detector at three other shapes.

    Args:
        detector: with its weights.
        cfg: its config.
        nms: whether the file selects and suppresses, so that its outputs are detections.
        thresholds: least score of each class, for the metadata; the outputs do not depend on it.

    Returns:
        the comparisons.

    Raises:
        UserError: if a package is missing, the config has no class names, its suppression or score
            is not one of ours, or the file differs from the detector; then there is no file.
    """
    # Before the export, which takes long.
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package)
    return _export(detector, cfg, target, nms, thresholds, to_onnx)


def export_openvino(
    detector: ATSSDetector,
    cfg: CfgNode,
    target: Path,
    nms: bool = False,
    thresholds: Sequence[float | None] | None = None,
) -> list[Parity]:
    """Write OpenVINO's .xml and .bin, as :func:`export_onnx`."""
    require("openvino")
    return _export(detector, cfg, target, nms, thresholds, to_openvino)


def _export(
    detector: ATSSDetector,
    cfg: CfgNode,
    target: Path,
    nms: bool,
    thresholds: Sequence[float | None] | None,
    convert: Callable[..., Save],
) -> list[Parity]:
    detector.cpu().float().eval()
    detector.precision = None
    settings = metadata(detector, cfg, nms)
    if thresholds is not None:
        settings["thresholds"] = [*thresholds]
    model = selection.Selected(detector) if nms else Raw(detector)
    raw = raw_outputs(detector)
    everything = [*settings["outputs"], *(f"raw_{x}" for x in raw)] if nms else [*raw]
    probe, unfinished = hidden(target, "probe"), hidden(target, "unfinished")
    try:
        with torch.no_grad(), static_padding(model):
            program = export_program(
                model.eval(), settings["divisor"], nms, len(settings["pixel_mean"])
            )
            save = convert(program, settings["inputs"], everything)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A file of detections is compared by one of the same graph with its raw outputs too.
        if nms:
            save(probe, settings | {"outputs": everything})
        save(unfinished, settings)
        found = compare(detector, unfinished, probe if nms else unfinished)
        move(unfinished, target)
    finally:
        remove(probe)
        remove(unfinished)
    return found


def export_program(model: nn.Module, divisor: int, nms: bool = False, channels: int = 3) -> Any:
    """Return torch.export's program for any batch and any size that the divisor divides.

    Raises:
        UserError: if the model branches on values.
    """
    # From a batch of 1, or a side on which a level is one cell, this size would be baked in.
    height, width = (-(-side // divisor) * divisor for side in (192, 224))
    height, width = max(height, 2 * divisor), max(width, 3 * divisor)
    dim = torch.export.Dim
    batch = dim("batch")
    sides = [divisor * dim(x) if divisor > 1 else dim.DYNAMIC for x in ("h", "w")]
    shapes = {"image": {0: batch, 2: sides[0], 3: sides[1]}}
    example: tuple[Tensor, ...] = (torch.rand(2, channels, height, width) * 255,)
    if nms:
        shapes["sizes"] = {0: batch}
        example += (torch.tensor([[height, width], [height - 1, width - 1]]),)
    try:
        return torch.export.export(model, example, dynamic_shapes=shapes, strict=False)
    except GuardOnDataDependentSymNode as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = [x for x in frames if not x.filename.startswith(os.path.dirname(torch.__file__))][
            -1
        ]
        raise UserError(
            "a part of the model branches on values, which cannot be exported: "
            f"{place.filename}, line {place.lineno}, `{place.line}`"
        ) from error


def compare(detector: ATSSDetector, file: Path, raw_file: Path) -> list[Parity]:
    """Run the file beside the detector on random pixels of three shapes.

    Args:
        raw_file: the same graph with the raw outputs.

    Raises:
        UserError: if an output differs by more than ALLOWED times eager's own movement, or
            detections differ from those that the runner selects from the raw outputs.
    """
    loaded, raw_loaded = atss_runner.load(file), atss_runner.load(raw_file)
    settings = loaded.settings
    divisor, channels = settings["divisor"], len(settings["pixel_mean"])
    coarsest = max(*settings["strides"], divisor)
    one_cell = -(-coarsest // divisor) * divisor
    sides = [-(-x // divisor) * divisor for x in (320, 384, 256)]
    # Not a single cell: GroupNorm refuses one value per channel.
    shapes = [(3, *sides[:2]), (1, sides[2], sides[0]), (2, one_cell, one_cell)]
    found = []
    generator = torch.Generator().manual_seed(0)
    for batch, height, width in shapes:
        pixels = torch.rand(batch, channels, height, width, generator=generator) * 255
        with torch.no_grad():
            eager = detector.raw(pixels)
            moved = detector.raw(pixels * (1 + NUDGE))
        # Images smaller than their canvas, and of different sizes.
        sizes = np.array([(height - 3 * i, width - 5 * i - 1) for i in range(batch)])
        outputs = raw_loaded.outputs(pixels.numpy(), sizes)
        ours = [outputs[x] for x in raw_loaded.settings["outputs"][-len(eager) :]]
        differences = tuple(
            float(np.abs(x - y.numpy()).max()) for x, y in zip(ours, eager, strict=True)
        )
        own = tuple(float((x - y).abs().max()) for x, y in zip(eager, moved, strict=True))
        floor = (1e-3, 1e-5, 1e-5)
        for name, difference, movement, least in zip(
            OUTPUTS, differences, own, floor, strict=False
        ):
            if not difference <= max(ALLOWED * movement, least):
                raise UserError(
                    f"the exported file differs from the detector: {name} by {difference:.1e} at "
                    f"{tuple(pixels.shape)}, where the detector itself moves by {movement:.1e} if "
                    f"its input moves by {NUDGE:g}; no file was written"
                )
        counts = None
        if settings["nms_inside"]:
            raw = dict(zip(OUTPUTS, ours, strict=False))
            counts = _compare_detections(loaded, pixels.numpy(), sizes, raw)
        found.append(Parity(tuple(pixels.shape), differences, own, counts))
    return found


def _compare_detections(
    loaded: Any, pixels: np.ndarray, sizes: np.ndarray, raw: dict[str, np.ndarray]
) -> tuple[int, int]:
    """Return the number of detections, and of those without an equal one.

    Raises:
        UserError: if there are more than UNMATCHED of the latter.
    """
    total, unmatched = 0, 0
    inside = loaded.outputs(pixels, sizes)
    per_level = loaded.per_level(pixels.shape[2:])
    for i, size in enumerate(sizes.tolist()):
        one = {name: values[i] for name, values in raw.items()}
        expected = select(one, per_level, size, loaded.settings)
        found = {name: values[i] for name, values in inside.items()}
        used = np.arange(len(found["scores"])) < found["count"]
        rows = np.column_stack([found[x][used] for x in ("boxes", "scores", "classes")])
        ours = np.column_stack(expected)
        near = np.abs(rows[:, None] - ours) <= [1e-3] * 4 + [1e-5, 0]
        equal = near.all(axis=2)
        total += len(ours)
        unmatched += max((~equal.any(axis=0)).sum(), (~equal.any(axis=1)).sum())
        if (used != (found["classes"] >= 0)).any():
            raise UserError("the exported file counts other detections than it returns")
    if unmatched > np.ceil(UNMATCHED * total):
        raise UserError(
            f"the exported file differs from the runner: {unmatched} of {total} detections at "
            f"{pixels.shape}; no file was written"
        )
    return total, int(unmatched)


def metadata(detector: ATSSDetector, cfg: CfgNode, nms: bool = False) -> dict[str, Any]:
    """Return the metadata that a runner needs.

    Raises:
        UserError: if the config has no class names, or a part that no runner has.
    """
    post, generator = detector.postprocess, detector.anchor_generator
    names = class_names(cfg)
    if not names:
        raise UserError(
            "the config has no class names, which the file would lack: set MODEL.ATSS.CLASS_NAMES"
        )
    part: Any = post.suppression
    name = SUPPRESSIONS.get(part if part in SUPPRESSIONS else type(part))
    if name is None:
        raise UserError("MODEL.ATSS.SUPPRESSION is a part of your own, which no runner has")
    arguments = {} if part in SUPPRESSIONS else dataclasses.asdict(part)
    scores = {product: "product", root: "sqrt"}
    if post.score not in scores:
        raise UserError("MODEL.ATSS.SCORE is a part of your own, which no runner has")
    return {
        "schema": SCHEMA,
        "version": __version__,
        "classes": list(names),
        "ids": list(class_ids(cfg)),
        "inputs": ["image", "sizes"] if nms else ["image"],
        "outputs": list(selection.OUTPUTS if nms else raw_outputs(detector)),
        "input_format": cfg.INPUT.FORMAT,
        "highest": cfg.INPUT.HIGHEST,
        "shown_planes": list(cfg.INPUT.SHOWN_PLANES),
        "pixel_mean": detector.pixel_mean.flatten().tolist(),
        "pixel_std": detector.pixel_std.flatten().tolist(),
        "normalised_inside": True,
        "nms_inside": nms,
        "resize": cfg.INPUT.RESIZE,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "divisor": max(detector.backbone.size_divisibility, 1),
        "strides": [int(x) for x in generator.strides],
        "anchors_per_location": generator.num_anchors[0],
        "score": scores[post.score],
        "score_thresh": post.score_thresh,
        "topk": post.topk_candidates,
        "max_detections": post.max_detections,
        "threshold_on_score": post.threshold_on_score,
        "rank_by_class": post.rank_by_class,
        "rank_anchors": post.rank_anchors,
        "clip": post.clip,
        "suppression": {"name": name, **arguments},
        "tiles": dataclasses.asdict(build_tiles(cfg, need_size=False)),
        "legacy_pixels": detector.box_coder.inference_only,
    }


def raw_outputs(detector: ATSSDetector) -> tuple[str, ...]:
    """Return the names of the outputs before selection.

    Raises:
        UserError: if the levels have other numbers of anchors than a runner expects.
    """
    generator, divisor = detector.anchor_generator, max(detector.backbone.size_divisibility, 1)
    strides = [int(x) for x in generator.strides]
    # The strides above the divisor do not divide this side: it shows how cells are rounded.
    side = (-(-max(strides) // divisor) + 1) * divisor
    with torch.no_grad():
        zeros = torch.zeros(2, len(detector.pixel_mean), side, side, device=detector.device)
        outputs, found = detector.raw_levels(zeros)
    expected = anchors_per_level((side, side), strides, generator.num_anchors[0])
    if found != expected:
        raise UserError(
            f"the levels of the backbone have {found} anchors at {side} x {side} pixels, a runner "
            f"expects {expected}: each level must have side / stride cells, rounded up"
        )
    return OUTPUTS[: len(outputs)]
