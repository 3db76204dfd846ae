"""Execution of a model: device, precision, compilation, batch."""

import logging

import torch
from detectron2.config import CfgNode

from ..errors import UserError, check_choice, check_range
from ..modeling import ATSSDetector

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


def use_available_device(cfg: CfgNode) -> bool:
    """Set MODEL.DEVICE to "cpu", and fp16 to fp32, if no GPU is available; return whether the
    device changed."""
    absent = cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available()
    if absent:
        cfg.MODEL.DEVICE = "cpu"
        if cfg.MODEL.ATSS.PRECISION == "fp16":
            cfg.MODEL.ATSS.PRECISION = "fp32"
    return absent


def check_device(cfg: CfgNode) -> None:
    """Raise UserError if MODEL.DEVICE is a GPU and none is available."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but torch finds no GPU: set MODEL.DEVICE to cpu"
        )


def one_image_at_a_time(cfg: CfgNode) -> CfgNode:
    """Return a copy for models that accept one image (test-time augmentation)."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ATSS.IMS_PER_BATCH_TEST = 1
    return cfg


def images_per_test_batch(cfg: CfgNode) -> int:
    check_range("MODEL.ATSS.IMS_PER_BATCH_TEST", cfg.MODEL.ATSS.IMS_PER_BATCH_TEST, 1)
    return cfg.MODEL.ATSS.IMS_PER_BATCH_TEST


def autocast_dtype(cfg: CfgNode) -> torch.dtype | None:
    """Return the dtype of MODEL.ATSS.PRECISION on MODEL.DEVICE; None without autocast.

    Raises:
        UserError: for an unknown name, or fp16 on a CPU.
    """
    precision, on_gpu = cfg.MODEL.ATSS.PRECISION, cfg.MODEL.DEVICE.startswith("cuda")
    if precision == "auto":
        return torch.bfloat16 if _fast_at_bf16(on_gpu) else None
    if precision == "fp16" and not on_gpu:
        raise UserError("MODEL.ATSS.PRECISION fp16 needs a GPU; on a CPU use bf16, fp32 or auto")
    check_choice("MODEL.ATSS.PRECISION", precision, ("auto", *DTYPES))
    return DTYPES[precision]


def _fast_at_bf16(on_gpu: bool) -> bool:
    if on_gpu:
        return torch.cuda.get_device_capability() >= (8, 0)
    capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(flag, False) for flag in ("amx_bf16", "avx512_bf16"))


def compiled_parts(cfg: CfgNode) -> str | None:
    """Return MODEL.ATSS.COMPILE: "tail", "all" or None.

    Raises:
        UserError: for another value, or "all" with activation checkpointing.
    """
    value = cfg.MODEL.ATSS.COMPILE
    if isinstance(value, bool):  # in configs up to 0.2
        value = "all" if value else None
    check_choice("MODEL.ATSS.COMPILE", value, (None, "tail", "all"))
    if value == "all" and cfg.MODEL.BACKBONE.ACTIVATION_CHECKPOINTING:
        raise UserError(
            "torch.compile cannot compile a backbone with activation checkpointing: set "
            "MODEL.ATSS.COMPILE to tail, or MODEL.BACKBONE.ACTIVATION_CHECKPOINTING to False"
        )
    return value


def compile_in_place(model: ATSSDetector, parts: str) -> None:
    """Compile parts of a model with torch.compile at their first call, under the same parameter
    names. If that fails, for example without a C++ compiler, log a warning.

    Args:
        parts: "tail" (decoding, assignment, criterion) or "all" (backbone and heads too).
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=model.device))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        logging.getLogger(__name__).warning(
            "MODEL.ATSS.COMPILE: torch.compile failed, running uncompiled: %s", reason
        )
        return
    model.compile_tail = True
    if parts == "all":
        own_heads = [x.head for _, x in model.branches.named() if x.head is not None]
        for module in (model.backbone, model.head, *own_heads):
            module.compile()
