"""Folders of runs: whose they are, and what stays in them."""

import pytest
import yaml
from conftest import ROOT
from detectron2.data import DatasetCatalog, MetadataCatalog
from processes import FORKED

import atss.engine.run as way_in
from atss.checkpoints import TrainingCheckpointer


@pytest.fixture
def arguments(squares, tmp_path):
    def make(*options, **opts):
        defaults = {
            "DATASETS.TRAIN": "('squares',)",
            "DATASETS.TEST": "('squares',)",
            "MODEL.DEVICE": "cpu",
            "OUTPUT_DIR": tmp_path / "out",
        }
        pairs = [str(x) for pair in (defaults | opts).items() for x in pair]
        register = f"squares={squares}/annotations.json:{squares}/images"
        config = str(ROOT / "configs/ATSS_R_18_FPN_small.yaml")
        argv = ["--config-file", config, "--register", register, *options, *pairs]
        return way_in.make_parser().parse_args(argv)

    yield make
    for name in ("squares", "bare"):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@pytest.fixture
def launched(monkeypatch):
    """What start() would have run, and how often."""
    runs = []
    monkeypatch.setattr(way_in, "launch", lambda run, args, cfg: runs.append(cfg))
    return runs


def said_by(args) -> str:
    with pytest.raises(SystemExit) as caught:
        way_in.start(args)
    return str(caught.value)


def test_a_new_training_does_not_replace_another(arguments, launched, tmp_path):
    way_in.start(arguments())
    (tmp_path / "out" / "last_checkpoint").write_text("model_final.pth")
    sentence = said_by(arguments())
    assert sentence.startswith(f"error: OUTPUT_DIR {tmp_path}/out holds a training already: --res")
    way_in.start(arguments("--resume"))
    way_in.start(arguments("--eval-only"))
    assert len(launched) == 3


def hold(folder, connection):
    """Locks the folder until there is a message."""
    lock = way_in.lock_folder(folder)
    connection.send("locked")
    connection.recv()
    lock.close()


def test_no_arguments_at_all():
    args = way_in.make_parser().parse_args([])
    assert said_by(args).startswith("error: --config-file is missing")


def test_coco_may_not_be_there(monkeypatch, tmp_path):
    known = vars(MetadataCatalog.get("coco_2017_train"))
    monkeypatch.setitem(known, "json_file", str(tmp_path / "train.json"))
    args = way_in.make_parser().parse_args(
        ["--config-file", str(ROOT / "configs" / "ATSS_R_18_FPN_small.yaml")]
    )
    sentence = r"DATASETS.TRAIN names coco_2017_train, whose annotations .*train.json do not exist"
    with pytest.raises(ValueError, match=sentence):
        way_in.prepare(args)


def test_two_runs_cannot_share_a_folder(arguments, launched, tmp_path):
    (tmp_path / "out").mkdir()
    left = tmp_path / "out" / f"{TrainingCheckpointer.UNFINISHED}_123"
    left.touch()
    here, there = FORKED.Pipe()
    other = FORKED.Process(target=hold, args=(str(tmp_path / "out"), there))
    other.start()
    assert here.recv() == "locked"
    assert not left.exists()  # of a run that was killed
    assert f"{tmp_path}/out is in use by another run" in said_by(arguments())
    way_in.start(arguments("--eval-only"))
    here.send("end")
    other.join()
    way_in.start(arguments())
    way_in.start(arguments())  # the one before has ended
    assert len(launched) == 3


def test_an_evaluation_or_failed_resumption_leaves_the_config(arguments, tmp_path, monkeypatch):
    config = tmp_path / "out" / "config.yaml"
    config.parent.mkdir()
    config.write_text("of the training")
    cfg = way_in.prepare(arguments())
    for options in (["--eval-only"], ["--resume"]):
        new = way_in._set_up(arguments(*options), cfg)
        assert config.read_text() == "of the training"
        assert b"OUTPUT_DIR" in new
    assert b"OUTPUT_DIR" in way_in._set_up(arguments(), cfg)
    assert "OUTPUT_DIR" in config.read_text()

    config.write_text("of the training")

    def fail(cfg, args):
        config.write_text("half")
        raise OSError("no log")

    monkeypatch.setattr(way_in, "default_setup", fail)
    with pytest.raises(OSError, match="no log"):
        way_in._set_up(arguments("--eval-only"), cfg)
    assert config.read_text() == "of the training"


def test_images_of_the_test_data_are_looked_for_first(arguments, squares, launched, tmp_path):
    spec = f"bare={squares}/annotations.json:{tmp_path}"
    args = arguments("--register", spec, **{"DATASETS.TEST": "('bare',)"})
    sentence = said_by(args)
    assert sentence == (
        f"error: data set bare: 8 of 8 images do not exist, such as {tmp_path}/0.png"
    )
    assert not launched


def test_the_small_config_writes_checkpoints(arguments):
    """After each pass over the images: of 8, in batches of 4, without the one that is empty."""
    cfg = way_in.prepare(arguments())
    assert (cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.CHECKPOINTS_TO_KEEP) == (2, 2)
    assert (
        "CHECKPOINT_EPOCHS" in yaml.safe_load((ROOT / "configs/small.yaml").read_text())["SOLVER"]
    )
