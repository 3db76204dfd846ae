"""Detectors of other projects, for tools/benchmark.py: R-50 with FPN, stem and first stage frozen,
all batch norms frozen, 80 classes.

All have the same images, boxes, precision and memory layout as ours: backbone, neck and head under
autocast, the rest in float32.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d, batched_nms

NUM_CLASSES = 80
# None: float32.
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Peer:
    """The interface of a detector.

    Attributes:
        model: the trained module.
        wide: names of its parts that run under autocast.
        prepare: Detectron2's list of dicts -> the argument of ``losses`` and ``detect``; not timed.
        losses: prepared batch -> losses by name, in training mode.
        detect: prepared batch -> detections, in evaluation mode.
    """

    model: nn.Module
    wide: Sequence[str]
    prepare: Callable[[list[dict]], object]
    losses: Callable[[object], dict[str, Tensor]]
    detect: Callable[[object], object]


def in_precision(peer: Peer, dtype: torch.dtype | None, channels_last: bool) -> None:
    """Apply precision and memory layout as MODEL.ATSS.PRECISION and CHANNELS_LAST do, in place."""
    if channels_last:
        peer.model.to(memory_format=torch.channels_last)
    for name in peer.wide if dtype is not None else ():
        module = peer.model.get_submodule(name)
        module.forward = _autocast(module, module.forward, dtype)


def _autocast(module: nn.Module, forward: Callable, dtype: torch.dtype) -> Callable:
    def wrapped(*args, **kwargs):
        with torch.autocast(next(module.parameters()).device.type, dtype=dtype):
            return _in_float32(forward(*args, **kwargs))

    return wrapped


def _in_float32(x):
    if isinstance(x, Tensor):
        return x.float()
    if isinstance(x, dict):
        return type(x)((name, _in_float32(value)) for name, value in x.items())
    if isinstance(x, (list, tuple)):
        return type(x)(map(_in_float32, x))
    return x


# ------------------------------------------------------------------------------------------------
# Detectron2
# ------------------------------------------------------------------------------------------------


def _detectron2(config: str) -> Peer:
    import detectron2
    from detectron2.config import LazyConfig, instantiate

    # detectron2.model_zoo imports pkg_resources, which setuptools 82 removed.
    file = Path(detectron2.__file__).parent / "model_zoo" / "configs" / config
    model = instantiate(LazyConfig.load(str(file)).model)
    return Peer(model, ("backbone", "head"), lambda batch: batch, model, model)


# ------------------------------------------------------------------------------------------------
# torchvision
# ------------------------------------------------------------------------------------------------


def _torchvision(build: Callable[..., nn.Module]) -> Peer:
    model = build(weights=None, weights_backbone=None, num_classes=NUM_CLASSES)
    # Images have their final size. torchvision's _skip_resize works in training only.
    model.transform.resize = lambda image, target: (image, target)
    _freeze_norms(model.backbone)
    for name in ("conv1", "layer1"):
        getattr(model.backbone.body, name).requires_grad_(False)

    def prepare(batch: list[dict]) -> tuple[list[Tensor], list[dict] | None]:
        device = next(model.parameters()).device
        images = [x["image"].to(device).float() / 255 for x in batch]
        objects = [x["instances"].to(device) for x in batch]
        return images, [{"boxes": x.gt_boxes.tensor, "labels": x.gt_classes} for x in objects]

    return Peer(
        model,
        ("backbone", "head"),
        prepare,
        losses=lambda prepared: model(*prepared),
        detect=lambda prepared: model(prepared[0]),
    )


def _freeze_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(child.num_features, eps=child.eps))
        _freeze_norms(child)


# ------------------------------------------------------------------------------------------------
# mmdet
# ------------------------------------------------------------------------------------------------


class _MissingOperators(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes mmdet importable with mmcv-lite, which has no compiled operators: ``mmcv.ops`` has
    torchvision's suppression, and an empty class for each other name."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "mmcv.ops" or fullname.startswith("mmcv.ops."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def exec_module(self, module: ModuleType) -> None:
        def missing(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (nn.Module,), {})

        module.__getattr__ = missing
        module.batched_nms = self.batched_nms

    @staticmethod
    def batched_nms(boxes, scores, idxs, nms_cfg, class_agnostic=False):
        keep = batched_nms(boxes, scores, idxs, nms_cfg["iou_threshold"])
        return torch.cat([boxes[keep], scores[keep, None]], dim=1), keep


def import_mmdet() -> None:
    """Import mmdet.

    Raises:
        ImportError: if it is not installed.
    """
    complete = importlib.util.find_spec("mmcv._ext")  # of mmcv, not of mmcv-lite
    if complete is None and not any(isinstance(x, _MissingOperators) for x in sys.meta_path):
        sys.meta_path.insert(0, _MissingOperators())
    import mmdet.models
    from mmengine.registry import init_default_scope

    assert mmdet.models
    init_default_scope("mmdet")


def _mmdet(config: str) -> Peer:
    import_mmdet()
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmengine.hub import get_config
    from mmengine.structures import InstanceData

    cfg = get_config(f"mmdet::{config}").model
    cfg.backbone.init_cfg = None  # no download
    model = MODELS.build(cfg)
    logging.disable()  # it logs each name
    model.init_weights()
    logging.disable(logging.NOTSET)

    def prepare(batch: list[dict]) -> dict:
        samples = []
        for x in batch:
            height, width = x["image"].shape[-2:]
            objects = x["instances"]
            meta = {"img_shape": (height, width), "ori_shape": (height, width)}
            sample = DetDataSample(metainfo=meta | {"scale_factor": (1.0, 1.0)})
            sample.gt_instances = InstanceData(
                bboxes=objects.gt_boxes.tensor, labels=objects.gt_classes
            )
            samples.append(sample)
        return {"inputs": [x["image"] for x in batch], "data_samples": samples}

    def run(prepared: dict, mode: str):
        return model(**model.data_preprocessor(prepared, model.training), mode=mode)

    def losses(prepared: dict) -> dict[str, Tensor]:
        named = run(prepared, "loss")
        return {k: sum(x) if isinstance(x, list) else x for k, x in named.items()}

    return Peer(
        model,
        ("backbone", "neck", "bbox_head"),
        prepare,
        losses,
        detect=lambda prepared: run(prepared, "predict"),
    )


PEERS: dict[str, Callable[[], Peer]] = {
    "detectron2-fcos": lambda: _detectron2("COCO-Detection/fcos_R_50_FPN_1x.py"),
    "detectron2-retinanet": lambda: _detectron2("COCO-Detection/retinanet_R_50_FPN_1x.py"),
    "torchvision-fcos": lambda: _torchvision(detection.fcos_resnet50_fpn),
    "torchvision-retinanet": lambda: _torchvision(detection.retinanet_resnet50_fpn_v2),
    **{
        f"mmdet-{name}": partial(_mmdet, f"{name}/{name}_r50_fpn_1x_coco.py")
        for name in ("atss", "gfl", "paa")
    },
}


def installed(name: str) -> bool:
    """Return whether a peer is installed; only mmdet may be missing."""
    if not name.startswith("mmdet"):
        return True
    try:
        import_mmdet()
    except ImportError:
        return False
    return True
