"""Pictures of a report: the worst images, and suspected errors of labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..data.images import read_image
from ..errors import UserError
from .figures import limits, lost_objects
from .results import WRONG, Results
from .thumbnails import LEGEND, Mark, thumbnail

PICTURES = 12  # of a gallery

Gallery = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Results to show.

    Attributes:
        name: in headings.
        figures: of :func:`~atss.analysis.figures.figures`.
        image_dir: folder in which file names of images begin; "" shows no pictures.
        folder: of the training; None shows no curves and no config.
        positives: (M,) positives of each object in training, or None.
        about: further facts by name.
    """

    name: str
    results: Results
    figures: Mapping[str, Any]
    image_dir: str = ""
    folder: Path | None = None
    positives: np.ndarray | None = None
    about: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def limits(self) -> np.ndarray:
        """(N,) the thresholds at which objects are found or missed."""
        figures = self.figures
        return limits(self.results, figures["thresholds"], figures["confusion"]["score"])


def worst(run: Run) -> Gallery:
    """Return pictures of the images with most lost objects and wrong detections."""
    entries = run.figures["images"]["cost"][:PICTURES]
    number = run.results.truth.image_numbers
    pictures = [
        {
            "caption": f"{x['file_name']}: {x['lost']} missed, {x['wrong']} wrong, "
            f"{x['right']} right",
            "source": _picture(
                run, x["file_name"], marks(run.results, number[x["image_id"]] - 1, run.limits)
            ),
        }
        for x in entries
    ]
    note = (
        "The images with most missed objects and wrong detections, at the thresholds of the "
        f"classes (above). {LEGEND}"
    )
    return {"anchor": "worst", "title": "Worst images", "note": note, "pictures": pictures}


def suspects(run: Run) -> Gallery:
    """Return pictures of images with suspected errors of labels, by the highest score of each."""
    results, number = run.results, run.results.truth.image_numbers
    by_image: dict[int, list[dict]] = {}
    for x in run.figures["suspected_labels"]:
        by_image.setdefault(number[x["image_id"]] - 1, []).append(x)
    pictures = []
    for i, found in list(by_image.items())[:PICTURES]:
        file_name = str(found[0]["file_name"])
        of_image = np.flatnonzero(results.gt_image == i).tolist()
        drawn = [
            Mark(tuple(results.gt_boxes[j]), "found", results.names[results.gt_category[j]])
            for j in of_image
        ]
        texts = []
        for x in found:
            label = f"{x['predicted']} {x['score']:.2f}"
            # Before the others: the highest score is on top.
            drawn.insert(len(of_image), Mark(tuple(x["bbox"]), "wrong", label))
            labelled = f"labelled {x['labelled']}" if x["labelled"] else "not labelled"
            texts.append(f"{label}, {labelled}")
        more = f", and {len(texts) - 3} more" if len(texts) > 3 else ""
        pictures.append(
            {
                "caption": f"{file_name}: {'; '.join(texts[:3])}{more}",
                "source": _picture(run, file_name, drawn),
            }
        )
    note = (
        "Detections of a high score that contradict the labels: on an object of another class, or "
        "far from all objects. Look at each: the label may be wrong, or the detector. Blue-green: "
        "labels; orange, dashed: detections."
    )
    return {
        "anchor": "suspects",
        "title": "Suspected errors of labels",
        "note": note,
        "pictures": pictures,
    }


def marks(results: Results, image: int, limit: np.ndarray) -> list[Mark]:
    """Return the marks of an image: its objects, found or missed, and wrong detections, of scores
    from ``limit`` (N,) on."""
    drawn = []
    objects = np.flatnonzero((results.gt_image == image) & ~results.crowd)
    lost = lost_objects(results, limit)
    for j in objects.tolist():
        kind = "missed" if lost[j] else "found"
        label = results.names[results.gt_category[j]] if lost[j] else ""
        drawn.append(Mark(tuple(results.gt_boxes[j]), kind, label))
    wrong = (results.image == image) & (results.status == WRONG) & (results.score >= limit)
    for i in sorted(np.flatnonzero(wrong).tolist(), key=lambda i: results.score[i]):
        label = f"{results.names[results.category[i]]} {results.score[i]:.2f}"
        drawn.append(Mark(tuple(results.detections[i]["bbox"]), "wrong", label))
    return drawn


def _picture(run: Run, file_name: str, drawn: Sequence[Mark]) -> str:
    """Return the address of a picture; "" if its image cannot be read."""
    if not run.image_dir:
        return ""
    try:
        return thumbnail(read_image(str(Path(run.image_dir, file_name))), drawn)
    except (OSError, UserError):
        return ""
