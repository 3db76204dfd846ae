"""Boxes drawn, images and films found; where torch is not installed, too."""

import subprocess
import sys

import numpy as np
import pytest

from atss_runner import media


def test_needs_neither_torch_nor_detectron2():
    code = "import sys; sys.modules.update(torch=None, detectron2=None); import atss_runner.media"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_draws_on_a_copy_in_the_colour_of_the_class():
    image = np.full((120, 160, 3), 90, np.uint8)
    boxes = np.array([[20.2, 40.0, 80.0, 100.4], [100, 5, 155, 60]], np.float32)
    drawn = media.draw(image, boxes, [1, 11], ["ant 90%", "bee 80%"])
    assert (image == 90).all()
    for x, y in ((20, 70), (80, 70), (50, 100), (100, 40), (155, 40)):  # on a side of a box
        assert tuple(drawn[y, x]) == media.COLOURS[1]
    assert (drawn[60:90, 30:70] == 90).all()
    # The label stands above its box, or, where there is no room, inside.
    assert (drawn[28:39, 20:40] != 90).any()
    assert (drawn[7:16, 102:130] != 90).any()


def test_nothing_found_is_the_image():
    image = np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8)
    assert (media.draw(image, np.zeros((0, 4)), [], []) == image).all()


def test_batches_are_lists_of_up_to_so_many():
    assert list(media.batches(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(media.batches([], 2)) == []


def test_folders_and_files_are_found(tmp_path):
    for name in ("b.png", "a.JPG", "film.mp4", "notes.txt"):
        (tmp_path / name).touch()
    found = media.find_media([tmp_path, tmp_path / "b.png"])
    assert [path.name for path in found] == ["a.JPG", "b.png", "film.mp4"]  # each once
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image and no video"):
        media.find_media([tmp_path / "empty"])
