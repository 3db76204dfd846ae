"""Images and videos found, and boxes drawn, also without torch."""

import os
import subprocess
import sys
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from atss_runner import media


def test_needs_neither_torch_nor_detectron2():
    code = "import sys; sys.modules.update(torch=None, detectron2=None); import atss_runner.media"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_draws_on_a_copy_in_the_colour_of_the_class():
    image = np.full((120, 160, 3), 90, np.uint8)
    boxes = np.array([[20.2, 40.0, 80.0, 100.4], [100, 5, 155, 60]], np.float32)
    drawn = media.draw_boxes(image, boxes, [1, 11], ["ant 0.90", "bee 0.80"])
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


# ------------------------------------------------------------------------------------------------
# Films that are written
# ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["H264Writer", "Mpeg4Writer"])
def codec(request, monkeypatch):
    """Both codecs in turn; the second as if PyAV were missing."""
    if request.param == "H264Writer":
        pytest.importorskip("av")
    else:
        monkeypatch.setattr(media, "find_spec", lambda name: None)
    return request.param


def write(path, frames, rate=25.0, size=None):
    writer = media.open_writer(path, rate, size or frames[0].shape[:2])
    for frame in frames:
        writer.write(frame)
    writer.close()
    return media.Film(path)


COLOURS = ((200, 40, 60), (30, 180, 90), (50, 60, 220), (128, 128, 128))


def test_written_film_has_the_frames_and_the_rate(tmp_path, codec):
    frames = [np.full((48, 64, 3), colour, np.uint8) for colour in COLOURS]
    for rate in (30000 / 1001, 12.5):
        film = write(tmp_path / "film.mp4", frames, rate)
        assert film.rate == pytest.approx(rate, abs=1e-3)
        assert film.count == 4
        for frame, colour in zip(film, COLOURS, strict=True):
            np.testing.assert_allclose(frame.mean(axis=(0, 1)), colour, atol=8)


def test_odd_sides_keep_their_pixels(tmp_path, codec):
    """The codecs need even sides: the last column and row are repeated."""
    for size in ((45, 61), (45, 64), (1, 1), (2, 3)):
        film = write(tmp_path / "film.mp4", [np.full((*size, 3), 200, np.uint8)] * 3)
        assert film.count == 3
        assert film.size == (size[0] + size[0] % 2, size[1] + size[1] % 2)
        assert film.first.min() > 180


def test_frames_of_other_sizes_are_resized(tmp_path, codec):
    frames = [np.full((*size, 3), 200, np.uint8) for size in ((48, 64), (96, 64), (45, 61))]
    assert [x.shape for x in write(tmp_path / "film.mp4", frames)] == [(48, 64, 3)] * 3


def test_film_of_h264_is_what_browsers_play(tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    write(tmp_path / "film.mp4", [np.zeros((48, 64, 3), np.uint8)])
    with av.open(str(tmp_path / "film.mp4")) as container:
        (stream,) = container.streams
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    # The index precedes the frames, so that a browser plays while it loads.
    content = (tmp_path / "film.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize(("rate", "size"), [(25.0, (40, 90000)), (25.0, (0, 0))])
def test_film_that_no_codec_takes_is_refused(tmp_path, codec, rate, size):
    with pytest.raises(media.FileError, match=r"^cannot write the film .*film.mp4 of .*: .+") as e:
        media.open_writer(tmp_path / "film.mp4", rate, size)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "film.mp4").exists()


def test_film_in_a_folder_that_is_missing_is_refused(tmp_path, codec):
    with pytest.raises(media.FileError, match=r"cannot write the film .*nowhere/film.mp4"):
        media.open_writer(tmp_path / "nowhere" / "film.mp4", 25.0, (48, 64))


@pytest.mark.parametrize("rate", [float("nan"), 0.0, -1.0, 1e-5, 90000.0])
def test_film_without_a_usable_rate_gets_one(tmp_path, monkeypatch, rate):
    write(tmp_path / "film.mp4", [np.zeros((48, 64, 3), np.uint8)])
    capture = media.cv2.VideoCapture

    class WithoutRate:
        def __init__(self, path):
            self.capture = capture(path)

        def __getattr__(self, name):
            return getattr(self.capture, name)

        def get(self, key):
            return rate if key == media.cv2.CAP_PROP_FPS else self.capture.get(key)

    monkeypatch.setattr(media.cv2, "VideoCapture", WithoutRate)
    assert media.Film(tmp_path / "film.mp4").rate == media.FRAMES_PER_SECOND


def test_full_disk_ends_in_a_sentence(tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    writer = media.open_writer(tmp_path / "film.mp4", 25.0, (48, 64))

    class Full:
        def mux(self, packets):
            raise av.FFmpegError(28, "No space left on device")

    monkeypatch.setattr(writer, "container", Full())
    with pytest.raises(OSError, match=r"^cannot write the film .*film.mp4: .*No space left"):
        writer.write(np.zeros((48, 64, 3), np.uint8))


# ------------------------------------------------------------------------------------------------
# Streams
# ------------------------------------------------------------------------------------------------


def test_numbers_and_addresses_are_streams_unless_they_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1").mkdir()
    (tmp_path / "1/a.png").touch()
    names = ("0", "1", "rtsp://u:p@10.0.0.1:554/live/ch0?x=1", "0", Path("2"), "C://x")
    files, results, skipped = find(*names)
    assert files == ["0", Path("1/a.png"), names[2], "2"]
    assert results == ["camera_0", "a.png", "10_0_0_1_554_live_ch0", "camera_2"]
    assert skipped == ["C:/x does not exist"]
    assert media.show_source(names[2]) == "rtsp://10.0.0.1:554/live/ch0"
    assert media.show_source("rtsp://u:p@ss@cam/a@b") == "rtsp://cam/a@b"
    assert [media.is_video(x) for x in files] == [True, False, True, True]


def test_frames_of_a_live_film_are_the_newest():
    """While the caller is busy with the first frame, frames 1 and 2 arrive; then the film ends."""
    is_taken, has_arrived = Event(), Event()

    class Live:
        rate = 1e-9

        def __iter__(self):
            yield 0
            assert is_taken.wait(60)
            yield from (1, 2)
            has_arrived.set()

    frames = media.read_live(Live())
    assert next(frames) == (0, 0)
    is_taken.set()
    assert has_arrived.wait(60)
    assert [*frames] == [(1, 2)]


def test_live_film_is_released_when_its_reader_stops():
    is_released = Event()

    class Live:
        rate = 25.0

        def __iter__(self):
            try:
                while True:
                    yield 0
            finally:
                is_released.set()

    frames = media.read_live(Live())
    next(frames)
    frames.close()
    assert is_released.wait(60)


def test_error_while_reading_ends_a_live_film(monkeypatch):
    class Live:
        rate = 25.0

        def __iter__(self):
            yield 0
            raise RuntimeError

    monkeypatch.setattr("threading.excepthook", lambda _: None)
    assert [frame for _, frame in media.read_live(Live())] == [0]
