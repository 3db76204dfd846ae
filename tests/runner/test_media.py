"""Boxes drawn, images and films found; where torch is not installed, too."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from atss_runner import media


def test_needs_neither_torch_nor_detectron2():
    code = "import sys; sys.modules.update(torch=None, detectron2=None); import atss_runner.media"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_draws_on_a_copy_in_the_colour_of_the_class():
    image = np.full((120, 160, 3), 90, np.uint8)
    boxes = np.array([[20.2, 40.0, 80.0, 100.4], [100, 5, 155, 60]], np.float32)
    drawn = media.draw_boxes(image, boxes, [1, 11], ["ant 90%", "bee 80%"])
    assert (image == 90).all()
    for x, y in ((20, 70), (80, 70), (50, 100), (100, 40), (155, 40)):  # on a side of a box
        assert tuple(drawn[y, x]) == media.COLOURS[1]
    assert (drawn[60:90, 30:70] == 90).all()
    # The label stands above its box, or, where there is no room, inside.
    assert (drawn[28:39, 20:40] != 90).any()
    assert (drawn[7:16, 102:130] != 90).any()


def test_nothing_found_is_the_image():
    image = np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8)
    assert (media.draw_boxes(image, np.zeros((0, 4)), [], []) == image).all()


def test_batches_are_lists_of_up_to_so_many():
    assert list(media.batches(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(media.batches([], 2)) == []


@pytest.fixture
def folder(tmp_path):
    names = (
        "b.png",
        "a.JPG",
        "film.mp4",
        "notes.txt",
        "1.md",
        "day/b.png",
        "day/.b.png",
        ".x/a.png",
    )
    for name in (*names, "day/night/c.png", "empty/labels/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "day" / "night" / "loop").symlink_to(tmp_path / "day")
    return tmp_path


def find(*names, output="nowhere"):
    """(files, their names among the results, what is said of others)."""
    found, skipped = media.find_media(names, {".png", ".jpg"}, Path(output))
    return [*found], [str(x) for x in found.values()], skipped


def test_folders_are_walked(folder):
    """Each file once, by whatever way; what is hidden is passed over, what is of another kind is
    counted."""
    files, names, skipped = find(folder, folder / "b.png", f"{folder}/day/../b.png")
    assert names == ["a.JPG", "b.png", "film.mp4", "day/b.png", "day/night/c.png"]
    assert files == [folder / name for name in names]
    others = "1.md, notes.txt, empty/labels/b.txt"
    assert skipped == [f"neither images nor videos by their endings in {folder} (3): {others}"]
    (folder / "empty" / "labels" / "c.txt").touch()
    assert find(folder)[2] == [
        f"neither images nor videos by their endings in {folder} (4): {others}, and 1 more"
    ]


def test_results_are_no_inputs(folder):
    _, names, skipped = find(folder, output=folder / "day")
    assert names == ["a.JPG", "b.png", "film.mp4"]
    assert skipped[0] == f"the folder {folder}/day, in which the results are"
    assert find(folder / "day", output=folder / "day")[1] == ["b.png", "night/c.png"]
    assert find(folder / "day", output=folder)[1] == ["b.png", "night/c.png"]


def test_a_file_that_is_named_is_found_whatever_its_ending(folder):
    assert find(folder / "notes.txt")[1:] == (["notes.txt"], [])


def test_inputs_that_cannot_be_are_named(folder, monkeypatch):
    (folder / "empty" / "labels" / "b.txt").unlink()
    names = (folder / "no.png", folder / "empty", "x" * 300)
    assert find(*names) == (
        [],
        [],
        [
            f"{folder}/no.png does not exist",
            f"the folder {folder}/empty has no image and no video",
            f"{'x' * 300} cannot be read: File name too long",
        ],
    )

    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("day"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    files, _, skipped = find(folder, folder / "day")
    assert files == [folder / name for name in ("a.JPG", "b.png", "film.mp4")]
    assert skipped[0] == f"the folder {folder}/day cannot be read: Permission denied"
    assert len(skipped) == 2  # and of the other kind


@pytest.mark.parametrize(
    ("content", "problem"), [(b"", "empty"), (b"text", "damaged, or of an unknown")]
)
def test_films_that_cannot_be_opened_are_named(tmp_path, content, problem):
    (tmp_path / "film.mp4").write_bytes(content)
    with pytest.raises(OSError, match=f"cannot open the film .*film.mp4: it is {problem}"):
        media.Film(tmp_path / "film.mp4")
