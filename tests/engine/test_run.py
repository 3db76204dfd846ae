"""Preparation of runs: folders, checks, and data sets in the config."""

import json
import shutil
import socket
import sys
from contextlib import nullcontext

import pytest
import yaml
from conftest import ROOT, make_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from fsspec.registry import known_implementations
from processes import FORKED
from trainings import forget

import atss.engine.run as way_in
from atss import load_config
from atss.checkpoints import TrainingCheckpointer
from atss.data import datasets
from atss.engine.best import best_metric
from atss.engine.launch import ENVIRONMENT
from atss.engine.sources import recall, shorten_paths


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

    names = set(DatasetCatalog.list())
    yield make
    forget(*set(DatasetCatalog.list()) - names)


@pytest.fixture
def variant(squares, tmp_path):
    """variant(name, change): the option that registers the squares with a changed json."""

    def make(name, change):
        content = json.loads((squares / "annotations.json").read_text())
        change(content)
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return "--register", f"{name}={tmp_path}/{name}.json:{squares}/images"

    return make


def without_annotations(content):
    del content["annotations"]


def crowds_alone(content):
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1


def at_addresses(content):
    for image in content["images"]:
        image["file_name"] = f"https://example.org/{image['file_name']}"


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """Return the configs that start() would have run."""
    runs = []
    monkeypatch.setattr(way_in, "launch", lambda run, args, cfg: runs.append(cfg))
    return runs


def error_of(args) -> str:
    with pytest.raises(SystemExit) as caught:
        way_in.start(args)
    return str(caught.value)


def test_new_training_does_not_replace_another(arguments, launched, tmp_path):
    way_in.start(arguments())
    (tmp_path / "out" / "last_checkpoint").write_text("model_final.pth")
    sentence = error_of(arguments())
    assert sentence.startswith(
        f"error: OUTPUT_DIR {tmp_path}/out already contains a run: pass --res"
    )
    way_in.start(arguments("--resume"))
    way_in.start(arguments("--eval-only"))
    assert len(launched) == 3


def hold(folder, connection):
    """Lock the folder until a message comes."""
    lock = way_in.lock_folder(folder)
    connection.send("locked")
    connection.recv()
    lock.close()


def test_config_file_is_required():
    args = way_in.make_parser().parse_args([])
    assert error_of(args).startswith("error: --config-file is missing")


def test_missing_annotations_of_coco_are_named(monkeypatch, tmp_path):
    known = vars(MetadataCatalog.get("coco_2017_train"))
    monkeypatch.setitem(known, "json_file", str(tmp_path / "train.json"))
    args = way_in.make_parser().parse_args(
        ["--config-file", str(ROOT / "configs" / "ATSS_R_18_FPN_small.yaml")]
    )
    sentence = r"DATASETS.TRAIN names coco_2017_train, whose annotations .*train.json do not exist"
    with pytest.raises(ValueError, match=sentence):
        way_in.prepare(args)


def test_folder_is_locked_by_a_run(arguments, launched, tmp_path):
    (tmp_path / "out").mkdir()
    left = tmp_path / "out" / f"{TrainingCheckpointer.UNFINISHED}_123"
    left.touch()
    here, there = FORKED.Pipe()
    other = FORKED.Process(target=hold, args=(str(tmp_path / "out"), there), daemon=True)
    other.start()
    assert here.recv() == "locked"
    assert not left.exists()  # a killed run left it
    refused = error_of(arguments())
    assert f"{tmp_path}/out is in use by process {other.pid} on {socket.gethostname()}: " in refused
    assert refused.endswith(f"if that machine is gone, remove {tmp_path}/out/lock")
    way_in.start(arguments("--eval-only"))
    here.send("end")
    other.join()
    way_in.start(arguments())
    way_in.start(arguments())  # the first one has ended
    assert len(launched) == 3


def test_evaluation_and_failed_resumption_keep_config_yaml(arguments, tmp_path, monkeypatch):
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


@pytest.mark.parametrize(("key", "count"), [("TRAIN", 7), ("TEST", 8)])
def test_missing_images_are_named_before_a_run(arguments, squares, launched, tmp_path, key, count):
    """An image without objects is evaluated, but not trained on."""
    spec = f"bare={squares}/annotations.json:{tmp_path}"
    args = arguments("--register", spec, **{f"DATASETS.{key}": "('bare',)"})
    assert error_of(args) == (
        f"error: data set bare: {count} of {count} images do not exist, such as {tmp_path}/0.png"
    )
    assert not launched


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_addresses_of_images_are_refused(arguments, variant, key):
    args = arguments(*variant("web", at_addresses), **{f"DATASETS.{key}": "('web',)"})
    sentence = error_of(args)
    assert sentence.startswith("error: data set web: ")
    assert "/https://example.org/0.png; addresses are not fetched: download the im" in sentence


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("https://x.org/a.png", ""),
        ("memory://nowhere/a.png", "data set remote: 1 of 1 images do not exist, such as memory:"),
        ("nothing://x/a.png", "data set remote: 1 of 1 images do not exist, such as nothing://x"),
        ("zzz://x/a.png", "the image zzz://x/a.png cannot be opened: it needs package zzzfs"),
    ],
)
def test_address_scheme_needs_a_handler(address, sentence):
    """Detectron2's PathManager fetches https; fsspec has others, if their package is installed."""
    known = {"class": "zzzfs.FileSystem", "err": "it needs package zzzfs"}
    known_implementations["zzz"] = known
    DatasetCatalog.register("remote", lambda: [{"file_name": address}])
    try:
        with pytest.raises(ValueError, match=sentence) if sentence else nullcontext():
            datasets.refuse_missing_images(["remote"])
    finally:
        forget("remote")
        del known_implementations["zzz"]


def test_images_are_checked_once_per_machine(arguments, monkeypatch):
    """Under torchrun by the first process of a machine, after all have started."""
    looked_for = []
    monkeypatch.setattr(datasets, "refuse_missing_images", lambda *x: looked_for.append(x[0]))
    monkeypatch.setattr(way_in, "_set_up", lambda *_: 1 / 0)
    args = arguments()
    cfg = way_in.prepare(args)
    both = [cfg.DATASETS.TRAIN, cfg.DATASETS.TEST]
    assert looked_for == both
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.get(name, "0"))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    for rank, expected in ((0, both), (1, [])):
        looked_for.clear()
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert way_in.prepare(arguments())
        assert not looked_for
        with pytest.raises(ZeroDivisionError):
            way_in.run(args, cfg)
        assert looked_for == expected


@pytest.mark.parametrize("change", [without_annotations, crowds_alone])
def test_best_metric_is_of_a_test_set_with_objects(arguments, variant, change):
    """If none has objects, PATIENCE is an error only on the command line."""
    bare, opts = variant("bare", change), {"TEST.EVAL_PERIOD": 2, "TEST.EVAL_EPOCHS": 0}
    both = {"DATASETS.TEST": "('bare', 'squares')"}
    assert best_metric(way_in.prepare(arguments(*bare, **opts, **both))) == "squares/bbox/AP"
    alone = {"DATASETS.TEST": "('bare',)"}
    assert best_metric(way_in.prepare(arguments(*bare, **opts, **alone))) == ""
    for key, value in (("PATIENCE", 3), ("BEST_METRIC", "bbox/AP50")):
        sentence = error_of(arguments(*bare, **opts, **alone, **{f"TEST.{key}": value}))
        expected = f"error: TEST.{key} {value} needs objects in DATASETS.TEST: bare has none"
        assert sentence == expected
    named = {"TEST.BEST_METRIC": "bare/bbox/AP"}
    sentence = error_of(arguments(*bare, **opts, **both, **named))
    assert sentence == "error: TEST.BEST_METRIC is 'bare/bbox/AP', but data set bare has no objects"


@pytest.mark.parametrize(
    ("annotations", "found"),
    [
        ([], False),
        ([{"iscrowd": 1}], False),
        ([{"iscrowd": 1}, {"iscrowd": 0}], True),
        ([{}], True),
    ],
)
def test_has_objects_without_register(annotations, found):
    DatasetCatalog.register("plain", lambda: [{}, {"annotations": annotations}])
    try:
        assert datasets.has_objects("plain") == found
    finally:
        forget("plain")


@pytest.mark.parametrize("objects", [without_annotations, None])
def test_patience_of_a_recipe_needs_no_test_set(arguments, variant, tmp_path, objects):
    """No test set, or one without objects; a yaml sets PATIENCE."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"_BASE_: {ROOT}/configs/ATSS_R_18_FPN_small.yaml\nTEST: {{PATIENCE: 3}}\n")
    bare = variant("bare", objects) if objects else ()
    test = "('bare',)" if objects else "()"
    opts = {"DATASETS.TEST": test, "TEST.EVAL_EPOCHS": 1.0}
    way_in.prepare(arguments("--config-file", str(recipe), *bare, **opts))
    sentence = error_of(arguments(**{"DATASETS.TEST": "()", "TEST.PATIENCE": 3}))
    assert sentence.startswith("error: TEST.PATIENCE 3 ends training by its evaluations")


@pytest.mark.parametrize("metric", ["AP", "segm/AP", "bbox_EMA/AP", "squares/bbox/AP"])
def test_unknown_metric_is_refused_before_a_run(arguments, metric):
    opts = {"TEST.EVAL_PERIOD": 2, "TEST.EVAL_EPOCHS": 0}
    sentence = error_of(arguments(**opts, **{"TEST.BEST_METRIC": metric}))
    assert sentence.startswith(
        f"error: unknown TEST.BEST_METRIC {metric!r}: choose from ['bbox/AP', 'bbo"
    )
    for known in ("bbox/AP75", "bbox/AP-blue"):
        way_in.prepare(arguments(**opts, **{"TEST.BEST_METRIC": known}))
    forget("squares")
    one = arguments("--classes", "blue", **opts, **{"TEST.BEST_METRIC": "bbox/AP-blue"})
    assert error_of(one).startswith(
        "error: unknown TEST.BEST_METRIC 'bbox/AP-blue': choose from ['bbox/"
    )


@pytest.mark.parametrize(
    ("expected", "sentence"),
    [
        ("[['bbox', 'AP', 38.0]]", "TEST.EXPECTED_RESULTS takes [task, metric, value, tolerance]"),
        ("[['segm', 'AP', 38.0, 1.0]]", "TEST.EXPECTED_RESULTS takes [task, metric, value, tole"),
        ("[['bbox', 'mAP', 38.0, 1.0]]", "TEST.EXPECTED_RESULTS takes [task, metric, value, tol"),
    ],
)
def test_malformed_expected_results_are_refused(arguments, expected, sentence):
    assert error_of(arguments(**{"TEST.EXPECTED_RESULTS": expected})).startswith(
        f"error: {sentence}"
    )


def test_expected_results_need_one_test_set(arguments, squares):
    """With several, Detectron2 would look up the task among data sets."""
    other = ("--register", f"other={squares}/annotations.json:{squares}/images")
    opts = {"DATASETS.TEST": "('squares', 'other')"}
    expected = {"TEST.EXPECTED_RESULTS": "[['bbox', 'AP', 38.0, 1.0]]"}
    sentence = error_of(arguments(*other, **opts, **expected))
    assert sentence == "error: TEST.EXPECTED_RESULTS needs one data set in DATASETS.TEST, got 2"


def test_unused_data_sets_are_named(arguments, squares, capsys):
    source = f"{squares}/annotations.json:{squares}/images"
    way_in.prepare(arguments("--register", f"unused={source}"))
    err = capsys.readouterr().err
    assert "--register unused: not used, because neither DATASETS.TRAIN ('squares',) nor" in err
    assert "--register squares" not in err


@pytest.mark.parametrize("place", ["inference", "ema/inference/squares"])
def test_unwritable_folder_of_results_is_refused(arguments, tmp_path, place):
    """A file has the folder's name."""
    file = tmp_path / "out" / place
    file.parent.mkdir(parents=True)
    file.touch()
    assert error_of(arguments()) == f"error: cannot write into OUTPUT_DIR {file}: Not a directory"


# ------------------------------------------------------------------------------------------------
# Data sets in the config
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(squares, tmp_path, monkeypatch):
    """Return the folder of a project with a copy of the squares and the config of a run, from a
    command with relative paths."""
    project = tmp_path / "project"
    shutil.copytree(squares, project / "data")
    (project / "data/d.yaml").write_text("train: images\nval: images\nnames: [blue]\n")
    monkeypatch.chdir(project)
    argv = ["--config-file", str(ROOT / "configs/ATSS_R_18_FPN_small.yaml")]
    argv += ["--register", "a=data/annotations.json:data/images", "--classes", "orange"]
    argv += ["--register", "b=data/annotations.json:data/images", "MODEL.DEVICE", "cpu"]
    argv += ["DATASETS.TRAIN", "('a',)", "DATASETS.TEST", "('b',)", "OUTPUT_DIR", "runs/1"]
    cfg = way_in.prepare(way_in.make_parser().parse_args(argv))
    (project / "runs/1/config.yaml").write_text(cfg.dump())
    forget("a", "b")
    yield project
    forget(*{"a", "b", "c"} & set(DatasetCatalog.list()))


def recalled(config, *options):
    args = way_in.make_parser().parse_args(["--config-file", str(config), *options])
    return way_in.prepare(args), args


def test_config_registers_its_data_sets(trained, tmp_path, monkeypatch):
    """Also after data and runs have moved together; only used data sets are read."""
    config = yaml.safe_load((trained / "runs/1/config.yaml").read_text())["DATASETS"]
    paths = "../../data/annotations.json:../../data/images"
    assert config["REGISTER"] == [f"a={paths}", f"b={paths}"]
    assert (config["CLASSES"], config["FIRST_PIXEL"]) == ("orange", 1)
    trained.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    cfg, _ = recalled("moved/runs/1/config.yaml", "--eval-only")
    assert "a" not in DatasetCatalog
    assert MetadataCatalog.get("b").thing_classes == ["orange"] == cfg.MODEL.ATSS.CLASS_NAMES
    assert DatasetCatalog.get("b")[0]["file_name"] == f"{tmp_path}/moved/data/images/0.png"
    recalled("moved/runs/1/config.yaml", "--resume")
    assert "a" in DatasetCatalog


def test_command_line_has_precedence(trained, tmp_path, squares):
    """Data of the config may be missing, and a test set may lack a class."""
    shutil.rmtree(trained / "data")
    config = trained / "runs/1/config.yaml"
    content = json.loads((squares / "annotations.json").read_text())
    content["categories"] = content["categories"][1:]
    content["annotations"] = [x for x in content["annotations"] if x["category_id"] == 6]
    (tmp_path / "orange.json").write_text(json.dumps(content))
    text = config.read_text().replace("CLASSES: orange", "CLASSES: blue,orange")
    config.write_text(text.replace("NUM_CLASSES: 1", "NUM_CLASSES: 2"))
    register = ("--register", f"b={tmp_path}/orange.json:{squares}/images")
    test = ("DATASETS.TEST", "('b',)", "MODEL.ATSS.CLASS_NAMES", "['blue','orange']")
    cfg, _ = recalled(config, "--eval-only", *register, *test)
    assert MetadataCatalog.get("b").thing_classes == ["blue", "orange"]
    assert len(cfg.DATASETS.REGISTER) == 2
    forget("b")
    with pytest.raises(ValueError, match=r"project/data/images does not exist"):
        recalled(config, "--eval-only")


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("{root}/x.json:{root}/images", "../data/x.json:../data/images"),
        ("{root}/x.yaml:val", "../data/x.yaml:val"),
        ("{root}/images:trainval", "../data/images:trainval"),
        ("/x.json:/images", "/x.json:/images"),
        ("{root}/x:y.json:{root}/images", "../data/x:y.json:../data/images"),
        ("{root}/x:y.json:s3://some/images", "../data/x:y.json:s3://some/images"),
    ],
)
def test_paths_become_relative_if_possible(tmp_path, source, place):
    """Also a name with a colon; a split is not a path."""
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    (root / "x:y.json").touch()
    (tmp_path / "out").mkdir()
    cfg = load_config(opts=["OUTPUT_DIR", str(tmp_path / "out")])
    spec = f"a={source.format(root=root)}"
    cfg.DATASETS.REGISTER = [spec]
    shorten_paths(cfg)
    assert list(cfg.DATASETS.REGISTER) == [f"a={place}"]
    args = way_in.make_parser().parse_args(["--config-file", f"{tmp_path}/out/config.yaml"])
    recall(args, cfg)
    assert list(cfg.DATASETS.REGISTER) == [spec]


def test_small_config_saves_every_epoch(arguments):
    """Batches of 4 from 7 images with objects."""
    cfg = way_in.prepare(arguments())
    assert (cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.CHECKPOINTS_TO_KEEP) == (2, 2)
    assert (
        "CHECKPOINT_EPOCHS" in yaml.safe_load((ROOT / "configs/small.yaml").read_text())["SOLVER"]
    )


def test_processes_must_share_the_checkpoint(monkeypatch, tmp_path):
    file = tmp_path / "model_0000001.pth"
    file.write_bytes(b"12345")
    monkeypatch.setattr(way_in.comm, "all_gather", lambda mine: [mine, mine])
    way_in.check_shared(str(file))
    for other in ("", f"{tmp_path}/model_0000000.pth (5 bytes)", f"{file} (4 bytes)"):
        monkeypatch.setattr(way_in.comm, "all_gather", lambda mine, other=other: [mine, other])
        with pytest.raises(ValueError, match="must be a folder that all machines share") as error:
            way_in.check_shared(str(file))
        assert str(error.value).endswith(
            " and ".join(sorted([f"{file} (5 bytes)", other or "none"]))
        )


# ------------------------------------------------------------------------------------------------
# Modules and loader processes
# ------------------------------------------------------------------------------------------------


def test_default_workers_are_limited_by_cores(monkeypatch):
    """A number other than Detectron2's default stays."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    cases = ((4, 1, 4), (4, 2, 3), (4, 8, 1), (2, 8, 2), (0, 1, 0), (16, 1, 16))
    for workers, processes, expected in cases:
        cfg = make_cfg("DATALOADER.NUM_WORKERS", workers)
        way_in.fit_workers(cfg, processes)
        assert expected == cfg.DATALOADER.NUM_WORKERS


def start_with(module):
    argv = ["--import", module, "--config-file", "x.yaml"]
    way_in.start(way_in.make_parser().parse_args(argv))


def test_missing_import_of_a_module_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lacks_one.py").write_text("import no_such_module")
    with pytest.raises(SystemExit, match=r"--import lacks_one: No module named '\w+'$"):
        start_with("lacks_one")


@pytest.mark.parametrize("place", ["./{}.py", "{}.py", "rules/{}.py", "~/{}.py", "../here/{}.py"])
def test_file_is_imported_under_its_name(monkeypatch, tmp_path, place):
    """It can import the modules beside it, and runs once per process."""
    here = tmp_path / "here"
    folder = here / "rules" if place.startswith("rules") else here
    folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setattr(sys, "path", [*sys.path])
    name, beside = f"own_{abs(hash(place))}", f"beside_{abs(hash(place))}"
    (folder / f"{beside}.py").write_text("loads = []")
    (folder / f"{name}.py").write_text(f"from {beside} import loads\nloads.append(1)\n")
    for _ in range(2):
        way_in.import_modules([place.format(name)])
    assert sys.modules[name].loads == [1]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("./gone.py", "--import ./gone.py: no such file"),
        ("rules/gone", "--import rules/gone: no such file"),
        (".gone", "--import .gone: no such file"),
        ("", "--import : no such file"),
        ("gone.module", "--import gone.module: No module named 'gone'; .*path/to/gone/module.py$"),
        ("json.py", "--import json.py: <module 'json' from .*> has the same name: rename the file"),
    ],
)
def test_unknown_module_is_named(monkeypatch, tmp_path, name, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "json.py").touch()
    with pytest.raises(SystemExit, match=f"^error: {sentence}"):
        start_with(name)


@pytest.mark.parametrize(
    ("code", "error"), [("1 / 0", ZeroDivisionError), ("open('gone.json')", RuntimeError)]
)
def test_bug_in_a_module_keeps_its_traceback(monkeypatch, tmp_path, code, error):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = f"buggy_{error.__name__}"
    (tmp_path / f"{name}.py").write_text(code)
    with pytest.raises(error):
        start_with(name)
