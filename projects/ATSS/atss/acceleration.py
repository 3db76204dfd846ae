"""What makes the same numbers come faster on the machine at hand."""

import ctypes
import logging

import torch
from torch import nn


def keep_freed_memory() -> None:
    """Lets the C library keep the memory that is freed, for training on CPUs.

    It would give every large block back to the system, and the next feature map of that size would
    be made of fresh pages, one fault per 4 KiB. With glibc; elsewhere nothing happens. The process
    stays as large as it once was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_mmap_max, m_trim_threshold, never = -4, -1, -1  # of malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, never)


def compile_in_place(*modules: nn.Module) -> None:
    """Has torch.compile compile the modules when they are first called; names of parameters stay.
    Where it does not work at all, for want of a compiler for example, the log says so, and the
    modules run as they are."""
    device = next(modules[0].parameters()).device
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        logging.getLogger(__name__).warning(
            "MODEL.ATSS.COMPILE: torch.compile does not work here, running uncompiled: %s", reason
        )
        return
    for module in modules:
        module.compile()
