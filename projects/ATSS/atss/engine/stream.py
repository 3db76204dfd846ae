"""The position of a training in its endless stream of images."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Stream:
    """The part of the stream that iterations take.

    Attributes:
        batch: images of an iteration, of all processes.
        processes: their number.
        iteration: the first one with this batch and number of processes.
        images: images before that iteration.
    """

    batch: int
    processes: int
    iteration: int = 0
    images: int = 0

    def images_until(self, iteration: int) -> int:
        return self.images + (iteration - self.iteration) * self.batch


def skip_batches(
    loader: Iterable, batches: int, seed: int, origin: tuple[int, int] = (0, 0)
) -> None:
    """Skip batches of a seed's stream, if the loader has a method ``skip``. ``origin``: iteration
    and images of :class:`Stream`."""
    if hasattr(loader, "skip"):
        loader.skip(batches, seed, *([origin] if any(origin) else []))
    elif batches:
        logging.getLogger(__name__).warning(
            "%s has no method skip(batches, seed): after %d batches its stream of images starts "
            "anew",
            type(loader).__name__,
            batches,
        )
