"""Images and films into pictures and records, with a predictor that finds one box."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from atss_runner import media
from atss_runner.annotate import annotate, targets
from atss_runner.detections import Detections, as_records
from atss_runner.detector import read_bgr
from atss_runner.media import Film
from atss_runner.planes import Planes


class Predictor:
    """A predictor of one sure and one unsure box."""

    names = ("ant", "bee")
    ids = (7, 9)
    size = (96, 160)
    read, picture = staticmethod(read_bgr), staticmethod(lambda image: image)
    planes = None

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
        found = annotate(predictor, places, 0.4, batch)
        names = (predictor.ids, predictor.names)
        records = [as_records(x.detections, *names, **x.fields) for x in found]
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


def test_film_is_skipped_by_a_detector_of_planes(run, film, monkeypatch, capsys):
    monkeypatch.setattr(Predictor, "planes", Planes(3, 255, (0, 1, 2)))
    assert run(film)[0] == []
    assert "film.avi has no planes (INPUT.FORMAT planes)" in capsys.readouterr().err


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


# ------------------------------------------------------------------------------------------------
# Formats of pictures
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.png", "PNG"), ("a.tiff", "TIFF")),
        *(("a.bmp", "BMP"), ("a.webp", "WEBP"), ("a.ppm", "PPM")),
    ],
)
def test_picture_keeps_the_format_of_its_image(run, tmp_path, name, kind):
    image = np.full((80, 60, 3), 90, np.uint8)
    Image.fromarray(image).save(tmp_path / name, kind)
    _, _, (picture,) = run(tmp_path / name)
    assert picture == tmp_path / "out" / name
    with Image.open(picture) as drawn:
        assert drawn.format == kind
        box = np.asarray(drawn.convert("RGB"))[35, 10][::-1]
        np.testing.assert_allclose(box, media.COLOURS[1], atol=0 if kind == "PNG" else 70)


@pytest.mark.parametrize(("name", "kind"), [("a.gif", "GIF"), ("a.pgm", "PPM"), ("a.jfif", "JPEG")])
def test_formats_that_opencv_cannot_draw_on_become_png(run, tmp_path, name, kind):
    Image.new("L", (60, 80)).save(tmp_path / name, kind)
    records, _, (picture,) = run(tmp_path / name)
    assert records[0][0]["file_name"] == str(tmp_path / name)
    with Image.open(picture) as drawn:
        assert (picture.name, drawn.format) == ("a.png", "PNG")


def test_targets_differ_without_their_endings(tmp_path):
    """So that files named after them, such as YOLO's labels, differ; those of films do anyway."""
    names = ("1.jpg", "1.png", "1_1.png", "d/1.png", "1.mp4", "1.avi")
    places = targets({tmp_path / x: Path(x) for x in names}, Path("out"))
    names = ("1.jpg", "1_1.png", "1_1_1.png", "d/1.png", "1.mp4", "1_1.mp4")
    assert [*places.values()] == [Path("out") / x for x in names]


# ------------------------------------------------------------------------------------------------
# Cameras and addresses
# ------------------------------------------------------------------------------------------------


def annotate_stream(source, output, predictor=None):
    inputs, _ = media.find_media([source], {".png"}, output)
    (target,) = (places := targets(inputs, output)).values()
    output.mkdir()
    found = annotate(predictor or Predictor(), places, 0.4, 2)
    return target, found


def test_address_of_a_film_is_drawn_frame_by_frame(film, tmp_path):
    target, found = annotate_stream(f"file://{film}", tmp_path / "out")
    assert [x.fields["frame"] for x in found] == list(range(5))
    assert Film(target).count == 5


class Camera:
    """OpenCV's capture of a camera that delivers four frames at 10 a second."""

    opened: tuple = ()

    def __init__(self, source):
        Camera.opened += (source,)
        self.shades = iter((20, 80, 140, 200))

    def isOpened(self):
        return True

    def get(self, key):
        return {cv2.CAP_PROP_FPS: 10.0, cv2.CAP_PROP_FRAME_COUNT: -1.0}[key]

    def read(self):
        shade = next(self.shades, None)
        return shade is not None, np.full((48, 64, 3), shade or 0, np.uint8)

    def release(self):
        pass


@pytest.fixture
def camera(monkeypatch):
    """A camera whose frames arrive at 0, 0.1, 0.5 and 1 s, each when the one before is drawn."""
    monkeypatch.setattr(media.cv2, "VideoCapture", Camera)
    monkeypatch.setattr(Camera, "opened", ())

    class Slow(media.Queue):
        def get_nowait(self):
            raise media.Empty

    times = iter((100.0, 100.0, 100.1, 100.5, 101.0))
    monkeypatch.setattr(media, "monotonic", lambda: next(times))
    monkeypatch.setattr(media, "Queue", Slow)


def test_film_of_a_slow_detector_plays_in_time(camera, tmp_path, monkeypatch):
    """Pictures fill the gaps; records have the positions of their pictures in the film."""
    target, found = annotate_stream("0", tmp_path / "out")
    results = [*found]
    assert Camera.opened == (0,)
    assert [x.fields for x in results] == [{"file_name": "0", "frame": i} for i in (0, 1, 5, 10)]
    monkeypatch.undo()
    assert target.name == "camera_0.mp4"
    film = Film(target)
    assert (film.rate, film.count) == (10, 11)
    shades = [round(frame[5:15, 45:].mean() / 10) for frame in film]
    np.testing.assert_allclose(shades, [2, 8, *[14] * 4, *[20] * 5], atol=1)


def test_film_of_a_camera_is_complete_after_ctrl_c(camera, tmp_path, monkeypatch):
    class Interrupted(Predictor):
        def __call__(self, images):
            if len(self.counts) == 2:
                raise KeyboardInterrupt
            return super().__call__(images)

    target, found = annotate_stream("rtsp://me:pass@cam/a?b=c", tmp_path / "out", Interrupted())
    results = []
    with pytest.raises(KeyboardInterrupt):
        results.extend(found)
    assert Camera.opened == ("rtsp://me:pass@cam/a?b=c",)
    assert [x.fields["file_name"] for x in results] == ["rtsp://cam/a"] * 2
    monkeypatch.undo()
    assert target.name == "cam_a.mp4"
    assert Film(target).count == 2


def test_camera_that_does_not_answer_is_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Camera, "isOpened", lambda self: False)
    monkeypatch.setattr(media.cv2, "VideoCapture", Camera)
    for i, source in enumerate(("0", "rtsp://me:pass@cam/a")):
        _, found = annotate_stream(source, tmp_path / str(i))
        assert [*found] == []
    assert capsys.readouterr().err == (
        "skipped: cannot open the camera 0: no camera or stream answers\n"
        "skipped: cannot open the film rtsp://cam/a: no camera or stream answers\n"
    )
