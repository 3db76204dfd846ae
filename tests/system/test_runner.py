"""The runner beside the predictor, and as a distribution of its own."""

import ast
import email
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict

import cv2
import demo
import numpy as np
import pytest
from conftest import ROOT
from exported import export_once
from PIL import Image

import atss
from atss import Predictor
from atss_runner import Detections, load

RUNNER = ROOT / "projects" / "ATSS" / "atss_runner"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a config, weights with stirred norms, the exported file, and images."""
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(export_once(tmp_path_factory), folder, dirs_exist_ok=True)
    (folder / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for i, size in enumerate([(333, 200), (400, 60), (128, 96), (200, 333)]):
        image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
        image.save(folder / "images" / f"{i}.jpg", exif=exif)
    image.convert("L").save(folder / "images" / "4.png")
    return folder


def agreement(found, expected):
    """Return the share of detections with a partner of their class within 0.03 pixels and 1e-4."""
    assert len(found.boxes) == len(expected.boxes) > 0
    same = found.classes[:, None] == expected.classes
    same &= np.abs(found.scores[:, None] - expected.scores) < 1.1e-4
    same &= np.abs(found.boxes[:, None] - expected.boxes).max(axis=2) < 0.03
    return same.any(axis=1).mean()


@pytest.mark.slow
def test_detections_are_those_of_the_predictor(trained):
    """Files of five sizes with EXIF, and BGR, BGRA and grey arrays, several together."""
    predictor, detector = Predictor(trained), load(trained / "model.onnx")
    assert (detector.names, detector.ids) == (predictor.names, predictor.ids)
    images = [str(x) for x in sorted((trained / "images").iterdir())]
    bgr = cv2.imread(images[0])
    images += [bgr, np.dstack([bgr, bgr[:, :, :1]]), bgr[:, :, 0], Image.open(images[1])]
    for found, expected in zip(detector(images), predictor(images), strict=True):
        # Scores of random weights are close: rounding swaps a few, and NMS keeps a neighbour.
        assert agreement(found, expected) > 0.95


WITHOUT = """
import runpy, sys
sys.modules.update(torch=None, torchvision=None, detectron2=None, atss=None)
sys.argv = ["atss_runner", *sys.argv[1:]]
runpy.run_module("atss_runner", run_name="__main__")
"""


def test_command_writes_the_json_of_the_demo(trained, tmp_path):
    """Without torch, Detectron2 and our own package."""
    film = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(film), cv2.VideoWriter.fourcc(*"MJPG"), 5, (128, 96))
    for i in range(3):
        writer.write(cv2.resize(cv2.imread(str(trained / f"images/{i}.jpg")), (128, 96)))
    writer.release()
    inputs = [str(trained / "images"), str(film)]
    options = ["--score-threshold", "0", "--batch", "2"]
    output = tmp_path / "runner"
    argv = [str(trained / "model.onnx"), *inputs, "--output", str(output), *options]
    subprocess.run([sys.executable, "-c", WITHOUT, *argv, "--threads", "1"], check=True)
    argv = ["--config-file", f"{trained}/config.yaml", "--weights", f"{trained}/model_best.pth"]
    demo.main([*argv, "--output", str(tmp_path / "demo"), *options, "--input", *inputs])
    written = {x.name for x in output.iterdir()}
    assert written == {x.name for x in (tmp_path / "demo").iterdir()}
    assert "film.mp4" in written
    ours, theirs = (
        json.loads((tmp_path / name / "detections.json").read_text()) for name in ("runner", "demo")
    )
    found, expected = map(by_frame, (ours, theirs))
    assert found.keys() == expected.keys()
    assert len(found) == 5 + 3
    for frame, detections in found.items():
        assert agreement(detections, expected[frame]) > 0.95


def by_frame(records):
    """{(file, frame, id of the image, all fields): detections} of a detections.json."""
    frames = defaultdict(list)
    for x in records:
        frames[x["file_name"], x.get("frame"), x.get("image_id"), *x].append(x)
    fields = ("bbox", "score", "category_id")
    return {
        frame: Detections(*(np.array([x[field] for x in of_frame]) for field in fields))
        for frame, of_frame in frames.items()
    }


# ------------------------------------------------------------------------------------------------
# Distribution
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built distribution; the checkout gets no new file."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    before = {*RUNNER.rglob("*")}
    code = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=RUNNER, check=True)
    assert {x for x in RUNNER.rglob("*") if "__pycache__" not in x.parts} <= before
    (path,) = folder.iterdir()
    return zipfile.ZipFile(path)


def metadata(wheel):
    (name,) = (x for x in wheel.namelist() if x.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def test_distribution_contains_the_package_alone(wheel):
    files = {x for x in wheel.namelist() if ".dist-info/" not in x}
    assert files == {
        f"atss_runner/{x.relative_to(RUNNER)}"
        for x in RUNNER.rglob("*")
        if x.is_file() and "__pycache__" not in x.parts and x.name != "pyproject.toml"
    }


def test_distribution_requires_no_torch(wheel):
    requirements = metadata(wheel).get_all("Requires-Dist")
    always = {x for x in requirements if ";" not in x}
    assert always == {"numpy", "onnxruntime", "opencv-python", "pillow"}
    assert metadata(wheel)["Version"] == atss.__version__
    assert metadata(wheel)["Name"] == "atss-runner"


def test_extras_of_the_distribution_are_those_of_the_package(wheel):
    setup = ast.parse((ROOT / "setup.py").read_text())
    keywords = [x for node in ast.walk(setup) if isinstance(node, ast.Call) for x in node.keywords]
    (dictionary,) = (x.value for x in keywords if x.arg == "extras_require")
    extras = dict(zip(map(ast.literal_eval, dictionary.keys), dictionary.values, strict=True))
    own = {name: [] for name in metadata(wheel).get_all("Provides-Extra")}
    for requirement in metadata(wheel).get_all("Requires-Dist"):
        if match := re.fullmatch(r"(\S+); extra == '(\w+)'", requirement):
            own[match[2]].append(match[1])
    assert "video" in own
    for name, requirements in own.items():
        assert ast.literal_eval(extras[name]) == requirements
