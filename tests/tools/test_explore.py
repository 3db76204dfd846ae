"""tools/explore.py: the picture of several rules on one image."""

import explore
import pytest
from PIL import Image


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
        (["--image", "0.png", "--rules", "Best"], r"unknown rule 'Best': choose from \['ATSS'"),
        (["--image", "0.png", "--rules", "ATSS", "TAL"], "TAL needs predictions: pass --weights"),
        (["--image", "0.png", "--output", "a.txt"], r"--output is '\.txt': choose from \['\.png'"),
    ],
)
def test_mistakes_are_named(draw, words, sentence):
    with pytest.raises(SystemExit, match=f"^error: {sentence}"):
        draw(*words)
