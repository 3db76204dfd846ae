"""The server: with a stand-in for the detector in a thread; with an exported file in a process."""

import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from exported import export_once
from PIL import Image

from atss_runner import Detections, FileError, load, media
from atss_runner.detector import read_bgr

pytest.importorskip("starlette", reason="needs the extra: pip install -e '.[serve]'")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra: pip install -e '.[serve]'")

from atss_runner import serve  # noqa: E402

RED = (200, 20, 20)


class StandIn:
    """Detects the whole image; its score and class are in the colour of the image.

    Attributes:
        calls: number of images of each call.
        gate: calls wait for it.
    """

    names = ("ant", "bee", "cat")
    read = staticmethod(read_bgr)

    def __init__(self):
        self.calls = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, images):
        self.calls.append(len(images))
        assert self.gate.wait(60)
        return [self.detect(image) for image in images]

    def detect(self, image):
        height, width = image.shape[:2]
        blue, green, red = map(int, image[0, 0])
        if red == 255:
            raise FileError("the image is too red")
        if red == 254:
            raise ValueError("a bug")
        box = np.array([[0, 0, width, height]], np.float32)
        return Detections(box, np.array([green / 256], np.float32), np.array([blue % 3]))


def picture(colour=RED, size=(40, 30), kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def huge():
    """A PNG of 100 megapixels in a few kilobytes."""
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, "PNG")
    return file.getvalue()


def expected(colour, size=(40, 30)):
    k = colour[2] % 3
    box = [0.0, 0.0, *map(float, size)]
    name = StandIn.names[k]
    return {"boxes": [box], "scores": [colour[1] / 256], "classes": [k], "names": [name]}


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline


class Client:
    """Requests to a port."""

    def __init__(self, port):
        self.port = port

    def __call__(self, method, path, body=None):
        """Return the status, the decoded answer and the headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        # As urllib: the server closes the connection, and could do so before all is sent.
        connection.request(method, path, body, {"Connection": "close"})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        is_json = response.headers["Content-Type"] == "application/json"
        return response.status, json.loads(text) if is_json else text, response.headers

    def detect(self, body):
        return self("POST", "/detect", body)[:2]

    def send(self, body, length=None):
        """Send a request, and return its connection, which no answer was read from."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        head = f"POST /detect HTTP/1.1\r\nHost: x\r\nContent-Length: {length or len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        return connection

    def wait_until(self, count):
        """Wait until the server has this number of requests."""
        wait_for(lambda: self("GET", "/health")[1]["requests"] == count)


@pytest.fixture
def start():
    """start(detector, **limits): a client of a new server."""
    running = []

    def begin(detector, **limits):
        app = serve.make_app(serve.Service(detector, "model.onnx", **limits))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        listener = socket.create_server(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        running.append((server, thread))
        client = Client(listener.getsockname()[1])
        client.server = server
        return client

    yield begin
    for server, thread in running:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture
def detector():
    stand_in = StandIn()
    yield stand_in
    stand_in.gate.set()


def test_each_client_gets_the_answer_of_its_image(start, detector):
    client = start(detector)
    cases = [((3 * x, 7 * x % 256, x), (20 + x, 90 - x)) for x in range(64)]

    def answer(case):
        return client.detect(picture(*case))

    with ThreadPoolExecutor(16) as clients:
        for case, found in zip(cases, clients.map(answer, cases), strict=True):
            assert found == (200, expected(*case))
    assert sum(detector.calls) == 64


def test_waiting_requests_run_together(start, detector):
    client = start(detector)
    detector.gate.clear()
    with ThreadPoolExecutor(9) as clients:
        first = clients.submit(client.detect, picture())
        wait_for(lambda: detector.calls)
        others = [clients.submit(client.detect, picture((9, x, x))) for x in range(8)]
        client.wait_until(9)
        detector.gate.set()
    assert first.result() == (200, expected(RED))
    assert [x.result() for x in others] == [(200, expected((9, x, x))) for x in range(8)]
    # A request counts before its image is opened, so the second call may be smaller.
    assert len(detector.calls) < 6
    assert max(detector.calls) == 4


def test_images_of_a_call_share_the_limit_of_pixels(detector):
    service = serve.Service(detector, "model.onnx", batch=4, max_pixels=1000)
    for side in (25, 20, 10, 31, 5):
        image = Image.new("RGB", (side, side))
        service.jobs.append(serve.Job(None, image, None))
    sides = [[job.image.width for job in service._next_batch()] for _ in range(3)]
    assert sides == [[25], [20, 10], [31, 5]]
    assert not service.jobs


def test_health_names_the_model_and_its_classes(start, detector):
    client = start(detector, waiting=1)
    answer = {"model": "model.onnx", "classes": ["ant", "bee", "cat"], "ready": True, "requests": 0}
    assert client("GET", "/health")[:2] == (200, answer)
    detector.gate.clear()
    connection = client.send(picture())
    client.wait_until(1)
    assert client("GET", "/health")[:2] == (200, answer | {"ready": False, "requests": 1})
    connection.close()


BROKEN = {
    "empty": (b"", 415, "the body is no image"),
    "text": (b"hello", 415, "the body is no image"),
    "form": (b"--x\r\nContent-Type: image/png\r\n\r\n" + picture(), 415, "not a form"),
    "truncated": (picture(size=(99, 99))[:-30], 400, "cannot read the image"),
    "of many bytes": (bytes(3_000_001), 413, "the limit is 3000000 bytes per image"),
    "of many pixels": (picture(size=(1001, 1000)), 413, "1001 x 1000 pixels, the limit is 1000000"),
    "of another format": (picture(kind="PCX"), 415, "JPEG, PNG, WEBP, BMP, GIF, TIFF"),
    "refused": (picture((255, 0, 0)), 400, "the image is too red"),
    "with a bug": (picture((254, 0, 0)), 500, "the detector failed: see the log"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unusable_image_gets_one_sentence(name, start, detector):
    body, code, sentence = BROKEN[name]
    client = start(detector, max_bytes=3_000_000, max_pixels=1_000_000)
    status, answer = client.detect(body)
    assert (status, [*answer]) == (code, ["error"])
    assert sentence in answer["error"]
    assert "\n" not in answer["error"]
    assert client.detect(picture()) == (200, expected(RED))


def test_other_addresses_and_methods_are_refused(start, detector):
    client = start(detector)
    assert client("GET", "/detections")[:2] == (404, {"error": "Not Found"})
    assert client("GET", "/detect")[:2] == (405, {"error": "Method Not Allowed"})


def test_image_that_fails_does_not_fail_its_batch(start, detector):
    client = start(detector, batch=6)
    detector.gate.clear()
    colours = [RED, (254, 0, 0), (9, 9, 9), (255, 0, 0)]
    with ThreadPoolExecutor(6) as clients:
        clients.submit(client.detect, picture())
        client.wait_until(1)
        found = [clients.submit(client.detect, picture(x)) for x in colours]
        found.append(clients.submit(client.detect, BROKEN["truncated"][0]))
        client.wait_until(6)
        detector.gate.set()
    assert [x.result()[0] for x in found] == [200, 500, 200, 400, 400]
    assert found[2].result()[1] == expected((9, 9, 9))


@pytest.mark.filterwarnings("ignore:Image size")
def test_100_megapixels_are_refused_undecoded(start, detector, monkeypatch):
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", None)
    status, answer = start(detector).detect(huge())
    assert (status, detector.calls) == (413, [])
    assert "10000 x 10000 pixels" in answer["error"]


def test_requests_beyond_the_limit_get_503_and_retry_after(start, detector):
    client = start(detector, waiting=2)
    detector.gate.clear()
    with ThreadPoolExecutor(2) as clients:
        accepted = [clients.submit(client.detect, picture()) for _ in range(2)]
        client.wait_until(2)
        # A body larger than all buffers of the sockets: the answer arrives all the same.
        status, answer, headers = client("POST", "/detect", bytes(10_000_000))
        assert (status, headers["Retry-After"]) == (503, "1")
        assert answer == {"error": "2 requests are waiting: try again in a second"}
        detector.gate.set()
        assert [x.result() for x in accepted] == [(200, expected(RED))] * 2
    client.wait_until(0)
    assert client.detect(picture()) == (200, expected(RED))


def test_client_that_leaves_costs_no_detection(start, detector):
    client = start(detector, batch=2)
    detector.gate.clear()
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(client.detect, picture())
        wait_for(lambda: detector.calls)
        leaving = [client.send(picture((9, 9, x))) for x in range(5)]
        leaving.append(client.send(picture()[:50], length=100))  # in the middle of its image
        client.wait_until(7)
        last = clients.submit(client.detect, picture((1, 2, 3)))
        client.wait_until(8)
        for connection in leaving:
            connection.close()
        # The half image is noticed at once, the others in their turn.
        client.wait_until(7)
        detector.gate.set()
        assert first.result() == (200, expected(RED))
        assert last.result() == (200, expected((1, 2, 3)))
    client.wait_until(0)
    assert sum(detector.calls) == 2


def test_image_that_does_not_arrive_is_given_up(start, detector, monkeypatch):
    monkeypatch.setattr(serve, "BODY_SECONDS", 0.1)
    client = start(detector)
    connection = client.send(picture()[:50], length=100)
    text = connection.recv(10_000)
    assert text.startswith(b"HTTP/1.1 408 ")
    assert client.detect(picture()) == (200, expected(RED))


def test_accepted_requests_are_answered_when_it_stops(start, detector):
    client = start(detector)
    detector.gate.clear()
    with ThreadPoolExecutor(6) as clients:
        accepted = [clients.submit(client.detect, picture((9, x, x))) for x in range(6)]
        client.wait_until(6)
        client.server.should_exit = True
        wait_for(lambda: not is_open(client))
        detector.gate.set()
    assert [x.result() for x in accepted] == [(200, expected((9, x, x))) for x in range(6)]


def is_open(client):
    try:
        return bool(client("GET", "/health"))
    except OSError:
        return False


def test_page_is_complete_in_itself(start, detector):
    status, page, headers = start(detector)("GET", "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "://" not in page
    assert not re.search(r"<(script|img|link)[^>]* src=|@import|url\(", page)
    colours = json.loads(re.search(r"const COLOURS = (\[.*\]);", page)[1])
    assert colours == [f"#{red:02x}{green:02x}{blue:02x}" for blue, green, red in media.COLOURS]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["x.onnx", "--batch", "0"], "--batch must be >= 1, got 0"),
        (["x.onnx", "--limit-megapixels", "-1"], "--limit-megapixels must be >= 1, got -1"),
        (["nowhere.onnx"], "nowhere.onnx does not exist"),
    ],
)
def test_unusable_arguments_get_one_sentence(words, sentence):
    with pytest.raises(SystemExit) as leaving:
        serve.main(words)
    assert leaving.value.code == f"error: {sentence}"


def test_batch_is_that_of_the_detector_too(monkeypatch):
    loads, apps = [], []
    monkeypatch.setattr(serve, "load", lambda *arguments: loads.append(arguments) or StandIn())
    monkeypatch.setattr(uvicorn, "run", lambda app, **_: apps.append(app))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    serve.main(["x.onnx", "--batch", "9"])
    assert loads == [("x.onnx", 0, 9)]
    assert len(apps) == 1


# ------------------------------------------------------------------------------------------------
# An exported file in a process
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export_once(tmp_path_factory) / "model.onnx"


@pytest.fixture
def process(exported):
    """A server in a process, and a client of it."""
    command = [sys.executable, "-m", "atss_runner.serve", str(exported), "--port", "0"]
    command += ["--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        lines = iter(running.stderr.readline, "")
        port = next(x[1] for x in (re.search(r"127\.0\.0\.1:(\d+) ", x) for x in lines) if x)
        # Unread lines would fill the pipe.
        reader = threading.Thread(target=lambda: [None for _ in lines])
        reader.start()
        yield running, Client(int(port))
        running.kill()
        reader.join()


def memory(process, field):
    """Return "VmRSS" or its peak "VmHWM" in MB."""
    with open(f"/proc/{process.pid}/status") as file:
        return int(re.search(rf"{field}:\s+(\d+)", file.read())[1]) / 1000


def photographs(count):
    """Yield (file, array BGR) of different images of several sizes and formats."""
    rng = np.random.default_rng(0)
    for i in range(count):
        height, width = rng.integers(60, 400, 2)
        small = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((int(width), int(height)))
        file = io.BytesIO()
        image.save(file, ("PNG", "JPEG", "WEBP")[i % 3])
        decoded = np.asarray(Image.open(file).convert("RGB"))
        yield file.getvalue(), decoded[:, :, ::-1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_200_requests_get_the_answers_of_the_detector(exported, process):
    """16 clients; among them broken and huge images, and clients that leave."""
    running, client = process
    images = list(photographs(200))
    large = huge()
    client.detect(images[0][0])
    before = memory(running, "VmRSS")

    def answer(number):
        body = images[number][0]
        if number % 5 == 1:
            client.send(body).close()
        if number % 5 == 2:
            client.send(body[:99], length=len(body)).close()
        if number % 5 == 3:
            assert client.detect(body[: len(body) // 2])[0] in (400, 415)
        if number % 20 == 4:
            assert client.detect(large)[0] == 413
        return client.detect(body)

    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(answer, range(200)))
    detector = load(exported, threads=1)
    for (_, array), (status, found) in zip(images, answers, strict=True):
        own = detector(array)
        assert status == 200
        assert len(found["boxes"]) == len(own.boxes) > 0
        np.testing.assert_allclose(found["scores"], own.scores, atol=1e-6)
        np.testing.assert_allclose(found["boxes"], own.boxes, atol=1e-3)
        assert found["classes"] == own.classes.tolist()
    peak, after = memory(running, "VmHWM"), memory(running, "VmRSS")
    print(f"RSS before {before:.0f} MB, peak {peak:.0f} MB, after {after:.0f} MB")
    # Decoded, the image of 100 megapixels alone is 300 MB.
    assert peak < before + 150
    client.wait_until(0)


@pytest.mark.slow
def test_sigterm_loses_no_accepted_request(process):
    running, client = process
    # Large images: the requests arrive faster than they are decoded.
    bodies = [picture((9, x, x), (2000, 1500)) for x in range(24)]
    with ThreadPoolExecutor(24) as clients:
        answers = [clients.submit(client.detect, body) for body in bodies]
        waiting = [0]

        def all_accepted():
            waiting.append(client("GET", "/health")[1]["requests"])
            return waiting[-1] + sum(x.done() for x in answers) >= 24

        wait_for(all_accepted)
        running.send_signal(signal.SIGTERM)
    assert waiting[-1] > 0
    assert [x.result()[0] for x in answers] == [200] * 24
    assert running.wait(60) == 0
    with pytest.raises(OSError, match="refused"):
        client.detect(bodies[0])
