"""A picture of the anchors that several rules assign on one image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2

from ..errors import UserError, check_range
from ..geometry import centres
from .explorer import Explorer
from .plots import plot_assignments


def draw_assignment(
    dataset: str,
    image: str,
    rules: Sequence[str],
    config: str,
    target: Path,
    weights: str = "",
    opts: Sequence[Any] = (),
    objects: Sequence[int] = (),
) -> None:
    """Draw the positives of rules on an image of a registered data set.

    Args:
        rules: names, with arguments as in "ATSS TOP_K=3".
        image: its file name, or the end of its path.
        config: file or name; sets the anchors and the size of the image.
        weights: of a detector with this config, for rules that need predictions.
        objects: numbers of those to draw, in the order of the labels, from 0; empty for all.

    Raises:
        UserError: for an unknown image, rule or object, an image without objects, or missing
            weights.
    """
    explorer = Explorer(dataset, config, opts, [weights] if weights else [])
    number = explorer.find(image)
    resized = explorer.image(number)
    if not len(resized.gt):
        name = explorer.records[number]["file_name"]
        raise UserError(f"{name} has no objects: rules assign anchors to them")
    if objects:
        check_range("objects", [*objects], 0, len(resized.gt) - 1)
    found = {rule: explorer.explain(number, rule) for rule in rules}
    height, width = resized.size
    plot_assignments(
        cv2.resize(resized.pixels, (width, height), interpolation=cv2.INTER_AREA),
        resized.gt.boxes.numpy(),
        centres(resized.anchors.boxes).numpy(),
        resized.anchors.stride.numpy(),
        found,
        target,
        objects,
    )
