"""tools/explore.py: the picture of several rules on one image."""

import importlib

import explore
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from atss.analysis import plots
from atss.analysis.assignment import draw_assignment
from atss.errors import UserError


@pytest.fixture
def draw(squares, tmp_path):
    def call(*words):
        source = f"squares={squares}/annotations.json:{squares}/images"
        target = tmp_path / "rules.png"
        opts = ["MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "96"]
        explore.main([*opts, "--register", source, "--output", str(target), *words])
        return target

    return call


def test_draws_rules_beside_each_other(draw):
    one = Image.open(draw("--image", "0.png", "--rules", "ATSS")).size
    two = Image.open(draw("--image", "images/0.png", "--rules", "ATSS", "MaxIoU")).size
    assert two[0] > 1.8 * one[0]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--image", "99.png"], "squares has no image called 99.png"),
        (
            ["--image", "0.png", "--rules", "Best"],
            r"unknown MODEL\.ATSS\.ASSIGNER 'Best': choose from \['ATSS'",
        ),
        (
            ["--image", "0.png", "--rules", "ATSS K=3"],
            r"unknown key MODEL\.ATSS\.ASSIGNERS\.ATSS\.K",
        ),
        (
            ["--image", "0.png", "--rules", "ATSS TOP_K"],
            r"MODEL\.ATSS\.ASSIGNERS\.ATSS\.TOP_K must be a int such as 9, got ''",
        ),
        (
            ["--image", "0.png", "--objects", "0", "9"],
            r"objects must be between 0 and \d, got \[0, 9",
        ),
        (
            ["--image", "0.png", "--rules", "ATSS", "TAL"],
            r"TAL needs predictions: pass weights= \(--weights\)",
        ),
        (["--image", "0.png", "--output", "a.txt"], r"--output is '\.txt': choose from \['\.png'"),
    ],
)
def test_mistakes_are_named(draw, words, sentence):
    with pytest.raises(SystemExit, match=f"^error: {sentence}"):
        draw(*words)


def test_unregistered_data_set_is_named(tmp_path):
    with pytest.raises(UserError, match=r"^unknown data set 'data\.yaml:train': register it first"):
        draw_assignment(
            "data.yaml:train", "0.png", ["ATSS"], "ATSS_R_50_FPN_1x", tmp_path / "a.png"
        )


@pytest.fixture
def counted(draw, monkeypatch):
    """Return a function that draws, and the titles and labels in the picture."""
    texts = []

    def save(figure, *_, **__):
        for axis in figure.axes:
            texts.append([axis.get_title(), *(x.get_text() for x in axis.texts)])

    monkeypatch.setattr(Figure, "savefig", save)
    return lambda *words: (texts.clear(), draw("--image", "0.png", *words), [*texts])[2]


def test_values_of_an_argument_are_drawn_side_by_side(counted):
    nine, three = counted("--rules", "ATSS", "ATSS top_k=1")
    assert three[0].startswith("ATSS top_k=1: ")
    sums = [sum(int(x.partition(": ")[2]) for x in labels) for _, *labels in (nine, three)]
    assert sums[0] > sums[1] > 0


def test_only_chosen_objects_are_labelled(counted):
    ((_, *every),) = counted("--rules", "ATSS")
    ((_, *one),) = counted("--rules", "ATSS", "--objects", "0")
    assert len(every) > 1
    assert one == every[:1]


def test_labels_of_one_place_do_not_cover_each_other():
    axis = Figure().subplots()
    axis.set(xlim=(0, 400), ylim=(400, 0))
    boxes = np.array([[100, 100, 120, 120]] * 4)
    plots._label_objects(axis, boxes, ["#0: 9"] * 4, np.array(["red"] * 4), 1.0)
    assert len({x.get_position() for x in axis.texts}) == 4


def test_backend_of_the_user_stays():
    before = matplotlib.get_backend()
    try:
        matplotlib.use("svg")
        importlib.reload(plots)
        assert matplotlib.get_backend() == "svg"
    finally:
        matplotlib.use(before)
