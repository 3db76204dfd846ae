"""tools/demo.py, and the data of `make demo`."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import demo
import digits as digits_tool
import numpy as np
import pytest
import torch
from conftest import ROOT, make_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image
from pycocotools.coco import COCO

from atss.analysis import digits
from atss.predictor import Predictor
from atss_runner import media
from atss_runner.annotate import image_ids
from atss_runner.detections import explain_none
from atss_runner.images import SUFFIXES


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A config and random weights as train_net.py writes them."""
    folder = tmp_path_factory.mktemp("trained")
    cfg = make_cfg("MODEL.FPN.OUT_CHANNELS", 64, "MODEL.ATSS.NUM_CONVS", 1)
    cfg.INPUT.MIN_SIZE_TEST = 96
    cfg.MODEL.ATSS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ATSS.CLASS_NAMES = ["ant", "bee", "cat"]
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder


@pytest.fixture
def run(trained, tmp_path):
    def call(*inputs, threshold=0.0, output=tmp_path / "out", opts=(), weights=None):
        argv = ["--config-file", str(trained / "config.yaml")]
        argv += ["--weights", str(weights or trained / "model.pth")]
        argv += ["--score-threshold", str(threshold), "--batch", "3"]
        argv += ["--input", *map(str, inputs), "--output", str(output)]
        demo.main([*argv, *map(str, opts)])
        return json.loads((output / "detections.json").read_text())

    return call


def test_draws_a_folder_and_an_image(run, squares, tmp_path):
    records = run(squares / "images", squares / "images" / "0.png")  # named twice
    names = sorted(p.name for p in (tmp_path / "out").glob("*.png"))
    assert names == [f"{i}.png" for i in range(8)]
    first = [r for r in records if r["file_name"] == str(squares / "images" / "0.png")]
    assert len(first) > 0
    assert {r["image_id"] for r in first} == {0}
    assert {(r["category_id"], r["category_name"]) for r in first} <= {
        *((1, "ant"), (2, "bee"), (3, "cat"))
    }
    assert all(len(r["bbox"]) == 4 and 0 <= r["score"] <= 1 for r in first)
    drawn = cv2.imread(str(tmp_path / "out" / "0.png"))
    assert drawn.shape == (96, 128, 3)


def test_highest_score_is_named_if_nothing_is_drawn(run, squares, capsys):
    highest = max(x["score"] for x in run(squares / "images"))
    assert "pass a lower" not in capsys.readouterr().out
    assert run(squares / "images", threshold=1.0) == []
    hint = r"The highest score is (\S+): pass a lower --score-threshold than 1"
    shown = float(re.search(hint, capsys.readouterr().out)[1])
    assert highest - 0.0011 < shown < highest + 0.0001
    run(squares / "images", opts=("MODEL.ATSS.SCORE_THRESH_TEST", "1.0"))
    assert "No score is above MODEL.ATSS.SCORE_THRESH_TEST" in capsys.readouterr().out


def test_highest_score_is_rounded_down():
    assert "score is 0.599: pass" in explain_none(0.5999, 0.6, "--score-threshold")


def test_images_at_the_limit_of_detections_are_counted(run, squares, capsys):
    run(squares / "images", opts=("TEST.DETECTIONS_PER_IMAGE", "2"))
    assert "\n8 images or frames reached TEST.DETECTIONS_PER_IMAGE (2)" in capsys.readouterr().out
    run(squares / "images", threshold=1.0, opts=("TEST.DETECTIONS_PER_IMAGE", "2"))
    assert "reached" not in capsys.readouterr().out


def test_skipped_inputs_do_not_share_the_line_of_the_bar(run, squares, tmp_path, capsys):
    (tmp_path / "a.png").write_text("")
    run(squares / "images" / "0.png", tmp_path / "a.png")
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert [x for x in lines if "skipped:" in x and not x.startswith("skipped:")] == []
    assert any(x.startswith("skipped:") for x in lines)


def test_detections_have_the_ids_of_the_data(run, squares):
    """COCO's own reader takes them."""
    records = run(squares / "images", opts=("MODEL.ATSS.CLASS_IDS", "[5, 6, 90]"))
    assert {r["category_id"] for r in records} <= {5, 6, 90}
    truth = COCO(str(squares / "annotations.json"))
    assert len(truth.loadRes(records).anns) == len(records) > 0


def test_images_of_one_name_have_numbered_pictures(run, squares, tmp_path):
    for name in ("a/0.png", "a/0_1.png", "b/0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(squares / "images" / "0.png", tmp_path / name)
    run(tmp_path / "a", tmp_path / "b")
    names = sorted(p.name for p in (tmp_path / "out").glob("*.png"))
    assert names == ["0.png", "0_1.png", "0_2.png"]


def test_no_input_is_replaced(run, squares, tmp_path):
    image = tmp_path / "photo.png"
    shutil.copy(squares / "images" / "0.png", image)
    before = image.read_bytes()
    with pytest.raises(SystemExit, match=r"photo.png would replace an input: choose another --o"):
        run(image, output=tmp_path)
    assert image.read_bytes() == before
    assert not (tmp_path / "detections.json").exists()


def test_detections_are_written_after_an_error(run, squares, tmp_path, monkeypatch, capsys):
    drawn = []

    def write(path, picture):
        drawn.append(path)
        return len(drawn) < 6

    monkeypatch.setattr(cv2, "imwrite", write)
    with pytest.raises(SystemExit, match=r"error: cannot write the picture .*5.png"):
        run(squares / "images")
    records = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {r["image_id"] for r in records} == {0, 1, 2, 3, 4}

    def stopped(at):
        (tmp_path / "out" / "detections.json").write_text("[1]")
        drawn.clear()

        def stop(path, picture):
            drawn.append(path)
            if len(drawn) == at:
                raise KeyboardInterrupt
            return True

        monkeypatch.setattr(cv2, "imwrite", stop)
        with pytest.raises(SystemExit, match="130"):
            run(squares / "images")
        return capsys.readouterr().err

    assert stopped(4).endswith("stopped after 3 images or frames\n")
    assert stopped(1).endswith("stopped after 0 images or frames\n")
    with pytest.raises(SystemExit, match="error: the weights nowhere do not exist"):
        run(squares / "images", weights="nowhere")
    assert (tmp_path / "out" / "detections.json").read_text() == "[1]"


def test_ids_are_numbers_if_all_names_are():
    def ids(*names):
        return list(image_ids([Path(x) for x in names]).values())

    assert ids("a/000000000139.jpg", "a/0.png") == [139, 0]
    assert ids("a/0001.jpg", "b/1.jpg") == ["0001.jpg", "1.jpg"]
    assert ids("a/1.jpg", "a/\uff12.jpg") == ["1.jpg", "\uff12.jpg"]
    assert ids("a/1.jpg", "a/cell.jpg") == ["1.jpg", "cell.jpg"]
    assert ids("a/1.jpg", "b/1.jpg") == ["a/1.jpg", "b/1.jpg"]


def test_unwritable_output_is_refused_first(run, squares, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"cannot write --output .*file: File exists"):
        run(squares / "images", output=tmp_path / "file")


def test_images_that_training_refuses_are_skipped(run, tmp_path, capsys):
    """Images of 16 bits would be white, a PNG damaged in its middle grey, a thin one has no
    pixel."""
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(tmp_path / "deep.png")
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "damaged.png")
    content = bytearray((tmp_path / "damaged.png").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "damaged.png").write_bytes(content)
    Image.fromarray(np.zeros((1, 5000, 3), np.uint8)).save(tmp_path / "thin.png")
    with pytest.raises(SystemExit, match="error: none of the inputs could be read"):
        run(*(tmp_path / f"{name}.png" for name in ("deep", "damaged", "thin")))
    output = capsys.readouterr().err
    for sentence in (
        "deep.png has more than 8 bits per channel",
        "cannot read the image .*damaged.png: ",
        "thin.png is 5000 x 1 pixels, too thin",
    ):
        assert re.search(sentence, output), sentence


def test_several_images_at_once_equal_one_by_one(trained, squares):
    predictor = Predictor(trained / "config.yaml", str(trained / "model.pth"))
    assert predictor.names == ["ant", "bee", "cat"]
    images = [cv2.imread(str(squares / "images" / f"{i}.png")) for i in range(3)]
    together = predictor(images)
    for image, joint in zip(images, together, strict=True):
        (alone,) = predictor([image])
        assert joint.boxes.shape == (len(joint.scores), 4)
        np.testing.assert_allclose(joint.scores, alone.scores, atol=1e-4, rtol=1e-3)


@pytest.fixture
def film(tmp_path):
    """Four frames of noise, 128 x 96."""
    rng = np.random.default_rng(0)
    video = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"MJPG"), 5, (128, 96))
    for _ in range(4):
        writer.write(rng.integers(0, 255, (96, 128, 3), np.uint8))
    writer.release()
    return video


def frames_of(video):
    return [*media.Film(video)]


def test_reads_a_video(run, film, tmp_path, capsys):
    records = run(film)
    assert {r["frame"] for r in records} == set(range(4))
    assert [x.shape for x in frames_of(tmp_path / "out" / "film.mp4")] == [(96, 128, 3)] * 4
    assert "incomplete" not in capsys.readouterr().err


def test_frames_of_another_size_are_resized(run, film, tmp_path, monkeypatch):
    frames = frames_of(film)
    frames[2] = frames[2].repeat(2, axis=0)
    with monkeypatch.context() as patch:
        patch.setattr(media.Film, "__iter__", lambda self: iter(frames))
        records = run(film)
    assert max(r["bbox"][1] + r["bbox"][3] for r in records if r["frame"] == 2) > 100
    assert [x.shape for x in frames_of(tmp_path / "out" / "film.mp4")] == [(96, 128, 3)] * 4


def test_truncated_video_is_named(run, film, capsys):
    content = film.read_bytes()
    film.write_bytes(content[: len(content) * 6 // 10])
    frames = {r["frame"] for r in run(film)}
    assert frames < set(range(4))
    counts = f"4 frames by its header, {len(frames)} could be read"
    assert f"incomplete: {film}: {counts}\n" in capsys.readouterr().err


BAD = {
    "an image of text": (
        "bad.png",
        b"no image",
        "cannot read the image .*bad.png: it is not an image",
    ),
    "another kind": ("notes.txt", b"text", "cannot read the image .*notes.txt: it is not an image"),
    "an empty film": ("film.mp4", b"", "cannot open the film .*film.mp4: it is empty"),
    "a film of text": ("film.mp4", b"text", "cannot open the film .*film.mp4: it is damaged"),
    "nothing": ("nowhere.png", None, ".*nowhere.png does not exist"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_skipped_and_named(run, squares, tmp_path, capsys, kind):
    name, content, sentence = BAD[kind]
    bad = tmp_path / name
    if content is not None:
        bad.write_bytes(content)
    good = str(squares / "images" / "1.png")
    assert {r["file_name"] for r in run(bad, good, bad)} == {good}
    assert re.search(f"skipped: {sentence}", capsys.readouterr().err)
    with pytest.raises(SystemExit, match=r"^error: .*input"):
        run(bad)
    assert sorted(x.name for x in (tmp_path / "out").iterdir()) == ["1.png", "detections.json"]


@pytest.mark.parametrize("size", [(4000, 1), (20000, 40)])
def test_videos_of_extreme_sizes_are_skipped(run, squares, film, monkeypatch, capsys, size):
    """The first is too thin to be resized, the second too wide for the codecs."""
    read = media.Film.__init__

    def read_wide(self, path):
        read(self, path)
        self.size = size[::-1]

    monkeypatch.setattr(media.Film, "__init__", read_wide)
    run(film, squares / "images" / "1.png")
    thin = "film.avi is 4000 x 1 pixels, too thin"
    message = {4000: thin, 20000: "cannot write the film .*mp4"}[size[0]]
    assert re.search(f"skipped: .*{message}", capsys.readouterr().err)


def test_subfolders_have_their_own_results(run, squares, tmp_path, capsys):
    """With all endings of training; a second run ignores the first one's results."""
    folder = tmp_path / "photos"
    names = {"day1/a.png": "png", "day2/a.png": "png", "a.jfif": "jpeg", "b.gif": "gif"}
    for name, kind in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(squares / "images" / "1.png").save(folder / name, kind)
    for name in ("day1/a.txt", "c.heic"):
        (folder / name).write_text("")
    for _ in range(2):
        records = run(folder, output=folder / "out")
        drawn = {str(x.relative_to(folder / "out")) for x in (folder / "out").rglob("*.png")}
        assert drawn == {"day1/a.png", "day2/a.png", "a.png", "b.png"}
        assert {r["file_name"] for r in records} == {str(folder / name) for name in names}
        assert len({r["image_id"] for r in records}) == 4
        output = capsys.readouterr().err
        assert "without the ending of an image or a video" in output
        assert "(1): day1/a.txt\n" in output
        assert re.search("skipped: cannot read the image .*c.heic: it is empty", output)


def test_images_of_training_are_found(tmp_path):
    for ending in SUFFIXES:
        (tmp_path / f"a{ending.upper()}").touch()
    found, skipped = media.find_media([tmp_path], SUFFIXES, tmp_path / "out")
    assert {path.suffix.lower() for path in found} == {*SUFFIXES}
    assert not skipped


@pytest.mark.parametrize("threshold", ["nan", "1.5", "40", "-0.1"])
def test_threshold_is_a_probability(run, squares, threshold):
    message = f"error: --score-threshold must be between 0 and 1, got {float(threshold)}"
    with pytest.raises(SystemExit, match=f"^{re.escape(message)}$"):
        run(squares / "images", threshold=threshold)


def test_user_modules_are_imported(tmp_path, monkeypatch):
    """The module is in the folder of the command, and stops the tool."""
    (tmp_path / "part_of_ones_own.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    argv = ["--config-file", "x", "--weights", "x", "--input", "x", "--output", "x"]
    for module, message in (
        ("part_of_ones_own", "imported"),
        ("nowhere", "error: --import nowhere:"),
    ):
        with pytest.raises(SystemExit, match=message):
            demo.main([*argv, "--import", module])


def test_digits_are_fixed_tight_and_apart(tmp_path):
    pytest.importorskip("sklearn")
    few = replace(digits.DEMO, images={"train": 12, "test": 6})
    for name in ("one", "two"):
        digits.make_digits(tmp_path / name, few)
    for split, count in few.images.items():
        first, second = ((tmp_path / n / f"{split}.json").read_text() for n in ("one", "two"))
        assert first == second
        content = json.loads(first)
        assert len(content["images"]) == count
        for image in content["images"]:
            pixels = np.asarray(Image.open(tmp_path / "one" / split / image["file_name"]))
            assert pixels.shape == (192, 192, 3)
            boxes = [a["bbox"] for a in content["annotations"] if a["image_id"] == image["id"]]
            covered = np.zeros((192, 192), int)
            for x, y, w, h in boxes:
                assert w > 0
                assert h > 0
                assert max(w, h) <= 140
                covered[y : y + h, x : x + w] += 1
            assert covered.max(initial=0) <= 1
    made = (tmp_path / "one" / "train.json").stat().st_mtime_ns
    digits.make_digits(tmp_path / "one", few)  # complete: left alone
    assert (tmp_path / "one" / "train.json").stat().st_mtime_ns == made


def test_digits_are_written_without_training(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    few = replace(digits.FEW, images={"train": 4, "val": 2, "test": 1})
    monkeypatch.setattr(digits_tool, "FEW", few)
    argv = ["--data", str(tmp_path / "digits")]
    digits_tool.main(argv)
    assert (
        "train.json (4 images), val.json (2 images), test.json (1 images)"
        in capsys.readouterr().out
    )
    for split, count in few.images.items():
        assert len(list((tmp_path / "digits" / split).glob("*.png"))) == count
    with pytest.raises(SystemExit, match="already exists: choose another folder"):
        digits_tool.main(argv)


def test_make_demo_prints_a_workers_message(monkeypatch):
    def fail(*_):
        raise OSError(
            "Caught OSError in DataLoader worker process 0.\nTraceback\nOSError: no a.png"
        )

    monkeypatch.setattr(digits_tool, "train_on_digits", fail)
    with pytest.raises(SystemExit, match=r"^error: no a\.png$"):
        digits_tool.main([])


def test_make_demo_trains_draws_and_resumes(tmp_path, monkeypatch, capsys):
    """With 12 images and 4 iterations. A second run finds it complete; a third that lost its last
    checkpoint resumes from the one before."""
    pytest.importorskip("sklearn")
    config = tmp_path / "demo.yaml"
    config.write_text(
        f"_BASE_: {ROOT}/configs/demo.yaml\n"
        "SOLVER: {MAX_ITER: 4, IMS_PER_BATCH: 2, CHECKPOINT_PERIOD: 2}\n"
        "TEST: {EVAL_PERIOD: 2}\nDATALOADER: {NUM_WORKERS: 0}\n"
        "INPUT: {MIN_SIZE_TRAIN: [96], MIN_SIZE_TEST: 96}\n"
        "MODEL: {FPN: {OUT_CHANNELS: 64}, ATSS: {SCORE_THRESH_TEST: 0.0}}\n"
    )
    root = tmp_path / "demo"
    few = replace(digits.DEMO, images={"train": 12, "test": 8})
    monkeypatch.setattr(digits_tool, "DEMO", few)
    monkeypatch.setattr(digits_tool, "CONFIG", config)
    monkeypatch.setattr(digits_tool, "ROOT", root)

    def run_demo():
        digits_tool.main([])
        for name in ("digits_train", "digits_test"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        return capsys.readouterr().out

    first = run_demo()
    assert "Starting a new demo of 4 iterations" in first
    assert "AP50" in first
    for name in ("detections.png", "training.png", "metrics.json"):
        assert (root / name).is_file()
    assert "is trained: evaluating it again" in run_demo()
    (root / "last_checkpoint").write_text("model_0000001.pth")
    assert "at iteration 2" in run_demo()
