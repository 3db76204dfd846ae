"""Checkpoints in the formats of other projects, made without these projects."""

import argparse
import io
import sys
from collections import OrderedDict
from functools import cache
from pathlib import PurePosixPath, PureWindowsPath
from types import ModuleType
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

# mmengine's class; its instances are pickled together with methods of the class.
_LOGS = ModuleType("mmengine.logging.history_buffer")
_OTHERS: dict[str, ModuleType] = {}
exec(
    """
class HistoryBuffer:
    _statistics_methods = {}

    def __init__(self, log_history, count_history):
        self._statistics_methods.update(min=HistoryBuffer.min)
        self._log_history, self._count_history = log_history, count_history

    def __getstate__(self):
        self.__dict__.update(statistics_methods=self._statistics_methods)
        return self.__dict__

    def min(self):
        return self._log_history.min()
""",
    _LOGS.__dict__,
)
HistoryBuffer = _LOGS.HistoryBuffer


def saved(content, **how):
    """Return the bytes that torch.save writes."""
    buffer = io.BytesIO()
    names = ("mmengine", "mmengine.logging", _LOGS.__name__)
    with patch.dict(sys.modules, dict.fromkeys(names, _LOGS) | _OTHERS):
        torch.save(content, buffer, **how)
    return buffer.getvalue()


@cache
def classes(module, name):
    """Return a class of another project, whose instances can be saved."""
    cls = type(name, (), {"__module__": module})
    parts = module.split(".")
    for i in range(len(parts)):
        _OTHERS.setdefault(".".join(parts[: i + 1]), ModuleType(module))
    setattr(_OTHERS[module], name, cls)
    return cls


def otx_2(weights, names, root):
    """Return the content of a checkpoint of OTX 2, whose modules are in ``root``."""
    labels = classes(f"{root}.types.label", "LabelInfo")()
    labels.label_names, labels.label_groups = names, [names]
    tiles = classes(f"{root}.config.data", "TileConfig")()
    tiles.tile_size = (400, 400)
    return lightning(weights) | {"label_info": labels, "tile_config": tiles, "otx_version": "2.4"}


def mmdet(weights, config=""):
    """Return the content of epoch_12.pth after a training by mmdet 3."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.01, momentum=0.9)
    losses = HistoryBuffer(np.array([0.9, 0.7]), np.array([1, 1]))
    info = {"iter": 12, "best_score": np.float64(0.5), "last_ckpt": PurePosixPath("epoch_11.pth")}
    return {
        "meta": {"epoch": 12, "cfg": config, "dataset_meta": {"classes": ("a", "b")}},
        "state_dict": weights,
        "message_hub": {
            "log_scalars": OrderedDict({"train/loss": losses}),
            "runtime_info": OrderedDict(info),
            "resumed_keys": OrderedDict({"train/loss": True}),
        },
        "optimizer": optimizer.state_dict(),
        "param_schedulers": [{"by_epoch": True, "_last_value": [0.01], "milestones": {8: 1}}],
    }


def lightning(weights):
    """Return the content of a .ckpt of Lightning, whose module has the model as ``self.model``."""
    args = argparse.Namespace(data=PureWindowsPath("C:\\data"), lr=np.float32(0.1))
    return {
        "epoch": 3,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": OrderedDict({f"model.{name}": x for name, x in weights.items()}),
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "hyper_parameters": {"args": args, "seeds": np.arange(3)},
    }


def wrapped(model):
    """Return {format: content} of checkpoints of one model."""
    weights = model.state_dict()
    return {
        "compiled": torch.compile(model).state_dict(),
        "compiled, then distributed": nn.DataParallel(torch.compile(model)).state_dict(),
        "distributed": {"model": nn.DataParallel(model).state_dict(), "epoch": 3},
        "state_dict": {"state_dict": weights},
        "lightning": lightning(weights),
        "lightning, compiled": lightning(torch.compile(model).state_dict()),
        "mmdet": mmdet(weights),
    }


WRAPPERS = list(wrapped(nn.Linear(1, 1)))
