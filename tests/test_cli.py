"""The command ``atss``, whose options become those of the tools."""

import json
import shutil
import subprocess
import sys

import demo
import pytest
from conftest import TINY

from atss import cli, load_config
from atss.errors import UserError

PAIRS = [str(x) for item in TINY.items() for x in item]


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Arguments of the trainings that were started, in a folder with a d.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.yaml").write_text("train: a\nvalid: b\n")
    calls = []
    monkeypatch.setattr(cli, "start", calls.append)
    return calls


@pytest.fixture
def tools(monkeypatch):
    """[command, arguments] of the tools that were called."""
    calls = []

    class Tool:
        def __init__(self, name):
            self.name = name

        def main(self, argv):
            calls.append([self.name, argv])
            return 0

    monkeypatch.setattr(cli, "_tool", Tool)
    return calls


def train(started, *words):
    cli.main(["train", *map(str, words)])
    return started.pop()


def test_pairs_of_the_config_are_found_anywhere():
    words = ["a.jpg", "SOLVER.MAX_ITER", "5", "--batch", "2", "SEED", "-1", "--x", "SOLVER.GAMMA"]
    words += ["-1e-3", "MODEL.ATSS.ASSIGNERS.OTA.TOP_K", "3"]
    pairs, rest = cli.split_pairs(words)
    assert pairs == ["SOLVER.MAX_ITER", "5", "SEED", "-1", "SOLVER.GAMMA", "-1e-3", *words[-2:]]
    assert rest == ["a.jpg", "--batch", "2", "--x"]


@pytest.mark.parametrize(
    "words",
    [
        ["TEST.json:TEST/images", "--output", "TEST.out.json"],
        ["--output", "TEST", "--resume"],
        ["out", "TEST", "photos"],
        ["out", "INPUT.JPG", "b.jpg"],
        ["SOLVER.EPOCHS", "--output", "out"],
    ],
)
def test_files_named_like_groups_are_no_keys(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "INPUT.JPG").touch()
    assert cli.split_pairs(words) == ([], words)


def test_values_may_begin_with_a_dash(started):
    args = train(started, "--data", "d.yaml", "--output", "o", "SOLVER.GAMMA", "-1e-3")
    assert args.opts[-2:] == ["SOLVER.GAMMA", "-1e-3"]


def test_train_takes_the_recipe_and_both_splits(started):
    args = train(started, "--data", "d.yaml", "SOLVER.EPOCHS", 3, "--output", "out")
    assert args.config_file == cli.RECIPE
    assert args.register == ["train=d.yaml:train", "val=d.yaml:val"]
    expected = {
        "DATASETS.TRAIN": "('train',)",
        "DATASETS.TEST": "('val',)",
        "OUTPUT_DIR": "out",
        "SOLVER.EPOCHS": "3",
    }
    assert dict(zip(args.opts[::2], args.opts[1::2], strict=True)) == expected


def test_train_takes_detectron2s_name_of_the_config(started):
    words = ("--data", "d.yaml", "--output", "out", "--config-file", "z")
    assert train(started, *words).config_file == "z"


def test_val_none_trains_without_validation(started):
    args = train(started, "--train", "a.json:i", "--val", "none", "--output", "o")
    assert args.register == ["train=a.json:i"]
    assert args.opts[args.opts.index("DATASETS.TEST") + 1] == "()"


def test_train_passes_every_option_on(started):
    words = ["--data", "d.yaml", "--val", "v:w", "--output", "o", "--config", "tables/atss_k17"]
    words += ["--classes", "a,b=c", "--first-pixel", "0", "--import", "m.py", "--num-gpus", "2"]
    args = train(started, *words)
    assert args.register == ["train=d.yaml:train", "val=v:w"]
    assert (args.config_file, args.classes) == ("tables/atss_k17", "a,b=c")
    assert (args.first_pixel, args.imports, args.num_gpus) == (0, ["m.py"], 2)
    assert not args.resume


def test_resume_reads_the_config_of_the_folder(started, tmp_path):
    (tmp_path / "config.yaml").write_text("")
    args = train(started, "--output", tmp_path, "--resume")
    assert args.config_file == str(tmp_path / "config.yaml")
    assert (args.resume, args.register) == (True, [])
    assert args.opts == ["OUTPUT_DIR", str(tmp_path)]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "no training data: pass --data SOURCE"),
        (["--resume"], "no training data"),
        (["--train", "a:b"], "no validation data: pass --val SOURCE, or --val none"),
        (["--val", "a:b"], "no training data"),
    ],
)
def test_missing_data_is_named(words, sentence, tmp_path):
    with pytest.raises(SystemExit, match=f"^error: {sentence}"):
        cli.main(["train", "--output", str(tmp_path), *words])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data", "nowhere"], "--data nowhere does not exist"),
        (["--data", "t.yaml:train"], "--data t.yaml:train .*: --data takes t.yaml itself"),
        (["--data", "t.yaml"], "--data t.yaml has no split 'val': pass --val .*, or --val none"),
    ],
)
def test_unusable_data_is_named_with_its_option(started, words, sentence, tmp_path):
    (tmp_path / "t.yaml").write_text("train: a\nnames: [x]\n")
    with pytest.raises(SystemExit, match=f"^error: {sentence}"):
        train(started, "--output", "o", *words)
    train(started, "--output", "o", "--data", "t.yaml", "--val", "none")


def test_home_folder_and_numbers_are_outputs(started, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "7").mkdir()
    (tmp_path / "7/config.yaml").touch()
    args = train(started, "--output=~/7", "--resume")
    assert args.config_file == str(tmp_path / "7/config.yaml")
    assert args.opts == ["OUTPUT_DIR", str(tmp_path / "7")]
    assert load_config("tables/atss_k3", opts=["OUTPUT_DIR", "7"]).OUTPUT_DIR == "7"


@pytest.mark.parametrize("best", [True, False])
def test_predict_finds_the_best_weights(tools, tmp_path, best):
    for name in ("model_final.pth", *["model_best.pth"] * best):
        (tmp_path / name).touch()
    weights = str(tmp_path / ("model_best.pth" if best else "model_final.pth"))
    cli.main(["predict", str(tmp_path), "MODEL.DEVICE", "cpu", "a.jpg", "b", "--batch", "2"])
    expected = ["--config-file", str(tmp_path / "config.yaml"), "--weights", weights]
    expected += ["--output", str(tmp_path / "predictions"), "--batch", "2", "--format", "coco"]
    expected += ["--input", "a.jpg", "b", "--", "MODEL.DEVICE", "cpu"]
    assert tools == [["predict", expected]]


def test_predict_passes_every_option_on(tools):
    words = [
        "--weights",
        "w",
        "--output",
        "o",
        "--score-threshold",
        "0.3",
        "--thresholds",
        "r.json",
    ]
    words += ["--batch", "2", "--format", "yolo", "csv", "--import", "m.py"]
    cli.main(["predict", "ATSS_R_50_FPN_1x", "0", "rtsp://a/b", *words])
    args = demo.make_parser().parse_intermixed_args(tools[0][1])
    assert (args.weights, str(args.output), args.imports) == ("w", "o", ["m.py"])
    assert (args.score_threshold, args.thresholds, args.batch) == (0.3, "r.json", 2)
    assert (args.format, args.input) == (["yolo", "csv"], ["0", "rtsp://a/b"])


def test_predict_takes_a_config_and_weights(tools):
    cli.main(["predict", "ATSS_R_50_FPN_1x", "a.jpg", "--weights", "w.pth", "--output", "o"])
    assert tools[0][1][:6] == [
        *("--config-file", "ATSS_R_50_FPN_1x", "--weights", "w.pth", "--output", "o")
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["{folder}", "a.jpg"], "contains neither model_best.pth nor model_final.pth"),
        (["ATSS_R_50_FPN_1x", "a.jpg"], "is not the folder of a training"),
        (["ATSS_R_50_FPN_1x", "a.jpg", "--weights", "w"], "--output is missing"),
    ],
)
def test_predict_names_what_is_missing(words, sentence, tmp_path):
    with pytest.raises(SystemExit, match=f"^error: .*{sentence}"):
        cli.main(["predict", *(x.format(folder=tmp_path) for x in words)])


def test_predict_after_an_interruption_names_the_checkpoint(tmp_path):
    for number in (3, 19):
        (tmp_path / f"model_{number:07d}.pth").touch()
    with pytest.raises(SystemExit, match=r"by --resume, or pass --weights \S+/model_0000019.pth$"):
        cli.main(["predict", str(tmp_path), "a.jpg"])


@pytest.mark.parametrize("command", [x for x in cli.COMMANDS if x not in ("train", "predict")])
def test_other_commands_are_their_tools(command, tools):
    assert cli.main([command, "a", "--b", "SEED", "1"]) == 0
    assert tools == [[command, ["a", "--b", "--", "SEED", "1"]]]


def test_check_takes_the_config_of_train(started):
    args = train(started, "--data", "d.yaml", "--output", "out")
    check = cli._tool("check").make_parser().parse_args(["d.yaml:train"])
    assert check.config_file == args.config_file


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_of_a_screen(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["atss"])
    with pytest.raises(SystemExit) as leaving:
        cli.main([command, "--help"])
    assert not leaving.value.code
    text = capsys.readouterr().out
    assert text.startswith(f"usage: atss {command} ")
    assert f"\n    atss {command} " in text or f"\n  atss {command} " in text
    assert f"tools/{cli.COMMANDS[command][0]}.py" not in text
    assert len(text.splitlines()) <= 45


def test_trains_and_predicts(squares, tmp_path):
    """A finished training can be resumed."""
    source = f"{squares / 'annotations.json'}:{squares / 'images'}"
    words = ["--train", source, "--val", source, "--output", tmp_path / "out"]
    words += ["--config", "ATSS_R_18_FPN_small", "MODEL.DEVICE", "cpu", *PAIRS]
    words += ["SOLVER.MAX_ITER", 2, "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", 64]
    words += ["DATALOADER.NUM_WORKERS", 0, "MODEL.ATSS.SCORE_THRESH_TEST", 0.0]
    command = [sys.executable, "-W", "ignore", "-m", "atss.cli"]
    subprocess.run([*command, "train", *map(str, words)], check=True, capture_output=True)
    assert (tmp_path / "out/model_final.pth").is_file()
    resume = ["train", "--output", str(tmp_path / "out"), "--resume"]
    subprocess.run([*command, *resume], check=True, capture_output=True)
    shutil.copytree(squares / "images", tmp_path / "photos")
    predict = ["predict", str(tmp_path / "out"), str(tmp_path / "photos")]
    subprocess.run([*command, *predict, "--score-threshold", "0"], check=True, capture_output=True)
    records = json.loads((tmp_path / "out/predictions/detections.json").read_text())
    assert {x["file_name"] for x in records} <= {str(x) for x in (tmp_path / "photos").iterdir()}
    assert records


def test_python_trains_on_several_data_sets(squares, tmp_path, capsys):
    """It returns the results of each last evaluation, and each training has its own log.txt."""
    opts = ["MODEL.DEVICE", "cpu", *PAIRS, "SOLVER.MAX_ITER", 1, "DATALOADER.NUM_WORKERS", 0]
    opts += ["TEST.EVAL_PERIOD", 1]
    opts += ["INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64]
    shutil.copy(squares / "annotations.json", tmp_path / "other.json")
    for file in (squares / "annotations.json", tmp_path / "other.json"):
        source = f"{file}:{squares / 'images'}"
        names = {"train": source, "val": source, "config": "ATSS_R_18_FPN_small"}
        results = cli.train(tmp_path / file.stem, **names, opts=opts)
        assert "bbox" in results
    # The same folder again, as in a notebook.
    shutil.rmtree(tmp_path / "other")
    averaged = [*opts, "SOLVER.EMA_DECAY", 0.5]
    assert cli.train(tmp_path / "other", **names | {"val": "none"}, opts=averaged) == {}
    logs = [(tmp_path / x / "log.txt").read_text() for x in ("annotations", "other")]
    assert [x.count("Starting at iteration 0") for x in logs] == [1, 1]
    assert capsys.readouterr().out.count("Starting at iteration 0") == 3
    assert "One evaluation takes" in logs[0]
    assert "One evaluation takes" not in logs[1]
    assert "Evaluating the averaged" not in logs[1]


@pytest.mark.parametrize("opts", ["SOLVER.MAX_ITER 3", {"SOLVER.MAX_ITER": 3}])
def test_options_from_python_are_a_list(opts):
    kind = type(opts).__name__
    with pytest.raises(UserError, match=rf"must be a list such as .*, got a {kind}: [{{']+SOLVER"):
        cli.train("out", train="a.json:i", val="none", opts=opts)
