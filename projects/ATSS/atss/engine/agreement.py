"""Agreement of a training's processes on config, data and weights, which a stale file on one
machine would break."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, distributed, nn

from ..config import autocast_dtype
from ..data.datasets import classes_of
from ..deprecated import renamed_names
from ..errors import UserError

__getattr__ = renamed_names(__name__)

# Paths, and values that follow from a machine's processors.
MACHINE_KEYS = (
    "DATALOADER.NUM_WORKERS",
    "DATASETS.REGISTER",
    "MODEL.DEVICE",
    "MODEL.TIMM.WEIGHTS",
    "MODEL.WEIGHTS",
    "OUTPUT_DIR",
)


def refuse_differences(facts: Mapping[str, object]) -> None:
    """Compare values by name over all processes.

    Raises:
        UserError: in all processes, naming a value that differs and two processes.
    """
    gathered = comm.all_gather({name: str(value) for name, value in facts.items()})
    for rank, other in enumerate(gathered):
        names = [name for name in gathered[0] if other.get(name) != gathered[0][name]]
        if names:
            more = f" ({len(names)} values differ)" if len(names) > 1 else ""
            raise UserError(
                f"{names[0]} is {gathered[0][names[0]]} in process 0, but {other.get(names[0])} in "
                f"process {rank}{more}: do all machines have the same files?"
            )


def facts_of_config(cfg: CfgNode) -> dict[str, object]:
    """Return the keys of a config except MACHINE_KEYS, and the precision of "auto" here."""
    flat: dict[str, object] = {"MODEL.ATSS.PRECISION on this machine": autocast_dtype(cfg)}

    def collect(node: CfgNode, prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, CfgNode):
                collect(value, f"{name}.")
            elif name not in MACHINE_KEYS:
                flat[name] = value

    collect(cfg, "")
    return flat


def facts_of_data(names: Sequence[str], records: Sequence[dict]) -> dict[str, object]:
    """Return number, first and last of the images (records of Detectron2), and the classes, of
    several data sets."""
    data = " and ".join(names)
    ends = {"first": 0, "last": -1} if records else {}
    return {
        f"the number of images of {data}": len(records),
        **{f"the {end} image of {data}": _describe(records[i]) for end, i in ends.items()},
        **{f"the list of classes of {name}": classes_of(name) for name in names},
    }


def _describe(record: dict) -> str:
    """Leave out the path, which may differ between machines."""
    return f"{record.get('image_id')!r} with {len(record.get('annotations', ()))} objects"


def share_weights(model: nn.Module) -> None:
    """Broadcast weights and buffers from the first process: DDP did before they were loaded."""
    share((*model.parameters(), *model.buffers()))


@torch.no_grad()
def share(tensors: Iterable[Tensor]) -> None:
    if comm.get_world_size() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, 0)
