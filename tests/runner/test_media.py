"""Images and videos found, and boxes drawn, also without torch."""

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
    for x, y in ((20, 70), (80, 70), (50, 100), (100, 40), (155, 40)):  # on a box
        assert tuple(drawn[y, x]) == media.COLOURS[1]
    assert (drawn[60:90, 30:70] == 90).all()
    # The label is above its box, or inside if there is no room.
    assert (drawn[28:39, 20:40] != 90).any()
    assert (drawn[7:16, 102:130] != 90).any()


def test_no_boxes_leave_the_image():
    image = np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8)
    assert (media.draw_boxes(image, np.zeros((0, 4)), [], []) == image).all()


def test_batches_are_lists_of_at_most_the_size():
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
    """Return (files, their names among the results, messages about others)."""
    found, skipped = media.find_media(names, {".png", ".jpg"}, Path(output))
    return [*found], [str(x) for x in found.values()], skipped


def test_folders_are_walked(folder):
    """Each file once; hidden ones are ignored, others counted."""
    files, names, skipped = find(folder, folder / "b.png", f"{folder}/day/../b.png")
    assert names == ["a.JPG", "b.png", "film.mp4", "day/b.png", "day/night/c.png"]
    assert files == [folder / name for name in names]
    others = "1.md, notes.txt, empty/labels/b.txt"
    assert skipped == [f"files in {folder} without the ending of an image or a video (3): {others}"]
    (folder / "empty" / "labels" / "c.txt").touch()
    assert find(folder)[2] == [
        f"files in {folder} without the ending of an image or a video (4): {others}, and 1 more"
    ]


def test_results_are_no_inputs(folder):
    _, names, skipped = find(folder, output=folder / "day")
    assert names == ["a.JPG", "b.png", "film.mp4"]
    assert skipped[0] == f"the folder {folder}/day is the --output"
    assert find(folder / "day", output=folder / "day")[1] == ["b.png", "night/c.png"]
    assert find(folder / "day", output=folder)[1] == ["b.png", "night/c.png"]


def test_named_file_may_have_any_ending(folder):
    assert find(folder / "notes.txt")[1:] == (["notes.txt"], [])


def test_unusable_inputs_are_named(folder, monkeypatch):
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
    ("content", "problem"), [(b"", "empty"), (b"text", "damaged, or has an unknown")]
)
def test_unreadable_videos_are_named(tmp_path, content, problem):
    (tmp_path / "film.mp4").write_bytes(content)
    with pytest.raises(OSError, match=f"cannot open the film .*film.mp4: it is {problem}"):
        media.Film(tmp_path / "film.mp4")
