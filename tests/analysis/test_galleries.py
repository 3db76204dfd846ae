"""Marks on the pictures of a report."""

from golden_results import BOX, FAR, scene

from atss.analysis.figures import figures
from atss.analysis.galleries import Run, marks, suspects


def test_marks_are_found_missed_and_wrong():
    """Of this image alone, at the threshold; the wrong detection of the highest score is on top."""
    objects = {1: [(1, BOX), (2, FAR)], 2: [(1, BOX)]}
    wrong = [90, 10, 20, 20]
    found = [(1, 1, BOX, 0.9), (1, 1, wrong, 0.8), (1, 2, wrong, 0.7), (1, 2, FAR, 0.2)]
    drawn = marks(scene(objects, [*found, (2, 2, FAR, 0.9)]), 0, 0.3)
    assert [(x.kind, x.label, list(x.box)) for x in drawn] == [
        ("found", "", BOX),
        ("missed", "b", FAR),
        ("wrong", "b 0.70", wrong),
        ("wrong", "a 0.80", wrong),
    ]


def test_suspects_name_the_label_or_its_absence():
    """The images of the json are not in the order of their ids."""
    results = scene({2: [], 1: [(1, BOX)]}, [(1, 2, BOX, 0.9), (2, 1, FAR, 0.8)])
    pictures = suspects(Run("run", results, figures(results)))["pictures"]
    captions = [x["caption"] for x in pictures]
    assert captions == ["1.jpg: b 0.90, labelled a", "2.jpg: a 0.80, not labelled"]
