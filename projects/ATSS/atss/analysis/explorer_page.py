"""The page of the explorer, and one that holds its answers and needs no server."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .explorer import Explorer
from .template import render

TITLE = "Assignment explorer"
LONGEST = 1333  # side of pictures, in pixels


def write_page(explorer: Explorer, images: Sequence[str], rules: Sequence[str], page: Path) -> None:
    """Write a page that needs no server, with all answers about some images and rules.

    Raises:
        UserError: for an unknown image or rule, or missing weights.
        OSError: if the page cannot be written.
    """
    answers: dict[str, Any] = {}
    numbers = [explorer.find(image) for image in images]
    checkpoints = range(max(len(explorer.weights), 1))
    for i, number in enumerate(numbers):
        jpeg = base64.b64encode(explorer.picture(number, LONGEST)).decode()
        answers[f"picture|{i}"] = f"data:image/jpeg;base64,{jpeg}"
        answers[f"image|{i}"] = about = explorer.about_image(number)
        for weights in checkpoints:
            if explorer.weights:
                answers[f"detections|{i}|{weights}"] = explorer.detections(number, weights)
            for rule in rules:
                key = f"{i}|{rule}|{weights}"
                answers[f"rule|{key}"] = explorer.about_rule(number, rule, weights)
                for k in range(len(about["boxes"])):
                    values = explorer.about_object(number, rule, weights, k)
                    answers[f"object|{key}|{k}"] = values
    data = start_data(explorer, 0, rules) | {"answers": answers, "texts": list(rules)}
    data["images"] = [_name(explorer.records[number]) for number in numbers]
    page.write_text(render("explorer.html", title=TITLE, data=data), "utf-8")


def _name(record: dict) -> str:
    return Path(record["file_name"]).name


def start_data(explorer: Explorer, image: int, rules: Sequence[str]) -> dict[str, Any]:
    """Return the values with which the page begins."""
    return {
        "images": [_name(record) for record in explorer.records],
        "classes": explorer.classes,
        "rules": explorer.arguments,
        "weights": [Path(x).name for x in explorer.weights],
        "image": image,
        "start": [*rules, ""][:2],
        "answers": None,
    }
