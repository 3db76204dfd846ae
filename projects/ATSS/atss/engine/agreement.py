"""What the processes of a training have to agree on: config, data and weights.

If one machine has a stale copy of a file, its processes would train on something else, or wait in a
collective that the others never enter.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, distributed, nn

from ..config import autocast_dtype
from ..data.datasets import classes_of
from ..errors import UserError

# Paths, and what follows from a machine's processors.
OF_A_MACHINE = (
    "DATALOADER.NUM_WORKERS",
    "DATASETS.REGISTER",
    "MODEL.DEVICE",
    "MODEL.TIMM.WEIGHTS",
    "MODEL.WEIGHTS",
    "OUTPUT_DIR",
)


def refuse_differences(facts: Mapping[str, object]) -> None:
    """Compare what each process of the group knows. All of them call this.

    Args:
        facts: values by name, the same names everywhere.

    Raises:
        ValueError: in all processes, naming a value that differs, and two processes.
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
    """Every key of a config but those of OF_A_MACHINE, and the precision that PRECISION auto has
    become on this machine."""
    flat: dict[str, object] = {"MODEL.ATSS.PRECISION on this machine": autocast_dtype(cfg)}

    def collect(node: CfgNode, prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, CfgNode):
                collect(value, f"{name}.")
            elif name not in OF_A_MACHINE:
                flat[name] = value

    collect(cfg, "")
    return flat


def facts_of_data(names: Sequence[str], records: Sequence[dict]) -> dict[str, object]:
    """Number, first and last of the images, and the classes, of data sets that are used together.

    Args:
        records: their images, in Detectron2's format.
    """
    of = " and ".join(names)
    ends = {"first": 0, "last": -1} if records else {}
    return {
        f"the number of images of {of}": len(records),
        **{f"the {end} image of {of}": _describe(records[i]) for end, i in ends.items()},
        **{f"the list of classes of {name}": classes_of(name) for name in names},
    }


def _describe(record: dict) -> str:
    """Without the path, which may differ from machine to machine."""
    return f"{record.get('image_id')!r} with {len(record.get('annotations', ()))} objects"


def share_weights(model: nn.Module) -> None:
    """Give all processes the weights and buffers of the first. DDP does so when it is made, which
    is before weights are loaded."""
    share((*model.parameters(), *model.buffers()))


@torch.no_grad()
def share(tensors: Iterable[Tensor]) -> None:
    """Give all processes the values of the first."""
    if comm.get_world_size() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, 0)
