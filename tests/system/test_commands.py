"""The commands and the Python of README.md and the quick start, in their order, on small data."""

import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT, photograph
from pages import read_shell, run_page
from processes import Script

import atss

PAGES = ("README.md", "docs/quick_start.md")
# First words of a command -> files that it writes, and a part of its output. {folder} is the value
# of --output or OUTPUT_DIR, or the second argument.
TRAINED = [f"{{folder}}/{x}" for x in ("config.yaml", "metrics.json", "model_best.pth")]
DETECTED = ["{folder}/predictions/detections.json", "{folder}/predictions/0000.png"]
EVALUATED = ["{folder}/log.txt", "{folder}/inference/my_test/coco_instances_results.json"]
RUN = {
    "atss demo --data": (["digits/train.json", "digits/val.json", "digits/test/0049.png"], ""),
    "atss check": ([], "No errors"),
    "atss train": (TRAINED, ""),
    "atss predict": (DETECTED, ""),
    "atss report": (["out/report.html"], "AP"),
    "atss export": (["{folder}"], "Written: "),
    "atss-runner": (["{folder}/detections.json", "{folder}/0000.png"], "detections: "),
    "tools/train_net.py": (EVALUATED, "AP"),
}
NOT_RUN = {
    "make env": "downloads packages",
    "make demo": "trains for minutes",
    "make test": "runs tests",
    ". .venv/bin/activate": "needs the environment of `make env`",
    "pip install -e .[demo]": "downloads packages",
    ".venv/bin/pip install jupyterlab ipywidgets": "downloads packages",
    "mkdir -p output/notebook && cp docs/quickstart.ipynb output/notebook": "for Jupyter",
    ".venv/bin/jupyter lab output/notebook/quickstart.ipynb": "starts Jupyter",
    "pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2.git": (
        "downloads Detectron2"
    ),
}
# Over each training of a page.
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.FPN.OUT_CHANNELS": 64,
    "MODEL.ATSS.NUM_CONVS": 1,
    "SOLVER.EPOCHS": 0,  # 30 in README's Python
    "SOLVER.MAX_ITER": 2,
    "SOLVER.IMS_PER_BATCH": 2,
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MIN_SIZE_TEST": 64,
    "DATALOADER.NUM_WORKERS": 0,
}
PAIRS = [str(x) for item in SMALL.items() for x in item]


def read_commands(page: str) -> list[list[str]]:
    """Return the words of each command of a page."""
    lines = read_shell(page).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def expectation(words: list[str]) -> tuple[list[str], str]:
    """Return the entry of a command in RUN, with its folder."""
    command = " ".join(words)
    matching = [x for start, x in RUN.items() if command.startswith(start)]
    assert len(matching) == 1, f"{command}: neither in RUN nor in NOT_RUN"
    files, output = matching[0]
    named = [words[i + 1] for i, x in enumerate(words) if x in ("--output", "OUTPUT_DIR")]
    return [x.format(folder=(named or words[2:])[0]) for x in files], output


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a user's photographs, and labels in YOLO's layout."""
    for i, split in enumerate(("train", "val")):
        for kind in ("images", "labels"):
            (tmp_path / split / kind).mkdir(parents=True)
        for j in range(6):
            photograph(10 * i + j).save(tmp_path / split / "images" / f"{j}.png")
            (tmp_path / split / "labels" / f"{j}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    yaml = "{train: train/images, val: val/images, names: [thing]}"
    (tmp_path / "data.yaml").write_text(yaml)
    (tmp_path / "photos").mkdir()
    for name in ("photo.jpg", "photos/0000.png"):
        photograph(99).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_is_run_or_listed():
    commands = [words for page in PAGES for words in read_commands(page)]
    assert len(commands) > 15
    listed = {" ".join(words) for words in commands} & {*NOT_RUN}
    assert listed == {*NOT_RUN}, "NOT_RUN lists a command that no page contains"
    for words in commands:
        if " ".join(words) not in NOT_RUN:
            expectation(words)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands_and_python_of_the_page_run(page, folder, monkeypatch):
    for words in read_commands(page):
        command = " ".join(words)
        if command in NOT_RUN:
            continue
        begins = words[1] == "train" and "--resume" not in words
        installed = words[0] in ("atss", "atss-runner")
        script = Path(sys.executable).with_name(words[0]) if installed else ROOT / words[0]
        argv = [script, *words[1:], *(PAIRS if begins else [])]
        text, code = Script(argv, folder).communicate(timeout=1800)
        assert code == 0, f"{command}\n{text}"
        files, output = expectation(words)
        assert output in text, command
        for file in files:
            assert (folder / file).is_file(), f"{command} wrote no {file}"

    train = atss.train

    def train_small(*args, opts=()):
        return train(*args, opts=[*opts, *PAIRS])

    monkeypatch.setattr(atss, "train", train_small)
    if page == "README.md":
        (folder / "out").rename(folder / "before")  # its Python trains `out` again
    with run_page(page):
        pass


def test_pairs_of_the_quick_start_are_accepted():
    text = (ROOT / "docs/quick_start.md").read_text()
    table = text.partition("| aim | pairs |")[2].partition("\n\n")[0]
    rows = [shlex.split(row.split("`")[-2]) for row in table.splitlines()[2:]]
    assert len(rows) > 5
    for pairs in rows:
        atss.load_config("ATSS_lite0_FPN_fine_tune", opts=pairs)
