"""Images and films into pictures and records, with a predictor that finds one box."""

import cv2
import numpy as np
import pytest
from PIL import Image

from atss_runner import media
from atss_runner.annotate import annotate, targets
from atss_runner.detections import Detections
from atss_runner.detector import read_bgr
from atss_runner.media import Film


class Predictor:
    """A predictor of one sure and one unsure box."""

    names = ("ant", "bee")
    ids = (7, 9)
    size = (96, 160)

    def __init__(self):
        self.counts = []

    def __call__(self, images):
        self.counts.append(len(images))
        boxes = np.array([[10, 20, 30, 50], [0, 0, 5, 5]], np.float32)
        scores, classes = np.array([0.9, 0.2], np.float32), np.array([1, 0])
        return [Detections(boxes, scores, classes) for _ in images]


@pytest.fixture
def run(tmp_path):
    def run(*paths, batch=2):
        predictor = Predictor()
        places = targets({path: path.relative_to(tmp_path) for path in paths}, tmp_path / "out")
        (tmp_path / "out").mkdir(exist_ok=True)
        records = list(annotate(predictor, places, 0.4, batch, read=read_bgr))
        return records, predictor.counts, [*places.values()]

    return run


def test_records_have_the_ids_of_the_data(run, tmp_path):
    paths = [tmp_path / f"{i}.png" for i in (3, 4, 5)]
    for path in paths:
        Image.new("RGB", (60, 80), (90, 90, 90)).save(path)
    records, counts, pictures = run(*paths)
    assert counts == [2, 1]
    record = {"category_id": 9, "category_name": "bee", "bbox": [10, 20, 20, 30], "score": 0.9}
    assert records == [
        [{"image_id": int(path.stem), "file_name": str(path), **record}] for path in paths
    ]
    for picture in pictures:
        drawn = cv2.imread(str(picture))
        assert tuple(drawn[35, 10]) == media.COLOURS[1]
        assert (drawn[:5, :5] == 90).all()  # the unsure box is not drawn


def test_unusable_images_are_skipped_and_named(run, tmp_path, capsys):
    good, thin, text = (tmp_path / f"{x}.png" for x in ("good", "thin", "text"))
    Image.new("RGB", (60, 80)).save(good)
    Image.new("RGB", (5000, 1)).save(thin)
    text.write_text("text")
    records, counts, _ = run(thin, good, text)
    assert [x["file_name"] for record in records for x in record] == [str(good)]
    assert counts == [1]
    thin_line, text_line = capsys.readouterr().err.splitlines()
    assert thin_line == f"skipped: {thin} is 5000 x 1 pixels, too thin to be resized to 160 at most"
    assert text_line.startswith(f"skipped: cannot read the image {text}: ")


@pytest.fixture
def film(tmp_path):
    """Five frames of increasing grey, 64 x 48, 12.5 a second."""
    path = tmp_path / "film.avi"
    code = cv2.VideoWriter.fourcc(*"MJPG")
    writer = cv2.VideoWriter(str(path), code, 12.5, (64, 48))
    for i in range(5):
        writer.write(np.full((48, 64, 3), 40 * i + 20, np.uint8))
    writer.release()
    return path


def test_film_is_drawn_frame_by_frame(run, film, capsys):
    records, counts, (target,) = run(film)
    assert counts == [2, 2, 1]
    assert [x["frame"] for record in records for x in record] == list(range(5))
    drawn = Film(target)
    assert drawn.rate == 12.5
    shades = [frame[5:15, 45:].mean() for frame in drawn]
    np.testing.assert_allclose(shades, [20, 60, 100, 140, 180], atol=6)
    assert capsys.readouterr().err == ""


def test_films_that_cannot_be_used_are_skipped(run, film, tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.mp4"
    text.write_text("text")

    def refuse(path, rate, size):
        raise ValueError("no codec")

    monkeypatch.setattr(media, "H264Writer", refuse)
    monkeypatch.setattr(media, "Mpeg4Writer", refuse)
    records, counts, _ = run(text, film)
    assert records == counts == []
    text_line, film_line = capsys.readouterr().err.splitlines()
    assert text_line == (
        f"skipped: cannot open the film {text}: it is damaged, or has an unknown format"
    )
    assert film_line == (
        f"skipped: cannot write the film {tmp_path}/out/film.mp4 of 64 x 48 pixels and 12.5 "
        "frames per second: no codec"
    )
