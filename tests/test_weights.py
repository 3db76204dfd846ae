"""Weights that cannot be loaded or contain code: demo.py and train_net.py print the message of
docs/broken_input.md, and execute nothing."""

import functools
import hashlib
import io
import itertools
import os
import pickle
import sys
from pathlib import PurePosixPath

import demo
import numpy as np
import pytest
import torch
from broken_page import check_faults, check_sentence
from conftest import GOLDEN, TINY, make_cfg
from detectron2.modeling import build_model
from others import WRAPPERS, HistoryBuffer, saved, wrapped
from torch import nn

import atss.engine.run as way_in
from atss.checkpoints import SafeCheckpointer, TrainingCheckpointer
from atss.engine.launch import launch
from atss.predictor import Predictor
from atss.weights import (
    WeightsError,
    find_weights,
    fit_names,
    load_weights,
    unwrapped,
    verify_download,
)

MODEL = (*(x for item in TINY.items() for x in item), "MODEL.ATSS.NUM_CLASSES", 2)


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


TOUCH = Calls(os.system, "touch exploded")
EVAL = Calls(eval, "open('exploded', 'w')")
LOAD = Calls(np.load, "exploded.npy", None, True)
PATH = Calls(PurePosixPath, TOUCH)
JOIN = Calls(os.path.join, "a", "b")
PARTIAL = functools.partial(os.system, "touch exploded")
SUBCLASSES = Calls(getattr, object, "__subclasses__")


class Method:
    """An object whose pickle looks up an attribute of a class, as a HistoryBuffer does."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, "min")

    def __call__(self):
        """Pickle accepts only functions that can be called."""


def pickled(content, protocol=2):
    return pickle.dumps(content, protocol)


def without_zip(content):
    return saved(content, _use_new_zipfile_serialization=False)


def bytes_for_torch():
    """Pickle a tensor as outside torch.save: bytes that torch.load opens unrestricted."""
    return Calls(torch.storage._load_from_bytes, saved({"a": TOUCH}))


def objects_from_numbers(write):
    """Pickle an array of objects whose addresses are numbers of the file."""
    return write({"a": np.zeros(1, np.int64)}).replace(b"X\2\0\0\0i8", b"X\2\0\0\0O8")


def filled_twice():
    """Pickle an array whose memory is freed while a tensor uses it."""
    array = pickled(np.zeros(1000))  # ends with: remember the state as number n, use it, stop
    return array[:-1] + b"h" + array[-3:-2] + b"b."


def spoiled(content):
    """Change a byte in the middle."""
    middle = len(content) // 2
    return content[:middle] + b"\1" + content[middle + 1 :]


FEW = {"a": torch.zeros(1000)}
# {defect: (ending of the file, bytes)}.
CASES = {
    "nothing there": (".pth", None),
    "an empty .pth": (".pth", b""),
    "an empty .pkl": (".pkl", b""),
    "a truncated .pth": (".pth", saved({"model": FEW})[:2000]),
    "a truncated .pkl": (".pkl", pickled({"a": np.zeros(1000)})[:2000]),
    "a .pth with a wrong number": (".pth", spoiled(saved({"model": FEW}))),
    "a web page as .pth": (".pth", b"<html>not found</html>"),
    "a web page as .pkl": (".pkl", b"<html>not found</html>"),
    "a .pth that runs a command": (".pth", saved({"model": TOUCH})),
    "a pickle called .pth that runs a command": (".pth", pickled({"model": TOUCH})),
    "a .pth that evaluates Python": (".pth", saved({"model": FEW, "trainer": EVAL})),
    "a .pyth that runs a command": (".pyth", saved({"model_state": TOUCH})),
    "a .pth of a whole model": (".pth", saved(nn.Linear(1, 1))),
    "a log that runs a command": (".pth", saved({"model": FEW, "log": HistoryBuffer(TOUCH, 1)})),
    "a path that runs a command": (
        ".pth",
        saved({"model": FEW, "path": PATH}),
    ),
    "a path that has others joined": (".pth", saved({"model": FEW, "path": JOIN})),
    "a function with arguments": (".pth", saved({"model": FEW, "path": PARTIAL})),
    "an attribute of any class": (".pth", saved({"model": FEW, "log": SUBCLASSES})),
    "an attribute that is called": (".pth", saved({"model": FEW, "log": Calls(Method(), "a")})),
    "a .pth with addresses for objects": (".pth", objects_from_numbers(without_zip)),
    "a .pkl that runs a command": (".pkl", pickled({"model": TOUCH, "__author__": "x"})),
    "a .pkl that evaluates Python": (".pkl", pickled({"blobs": EVAL})),
    "a .pkl that has numpy open a file": (".pkl", pickled({"a": LOAD})),
    "a .pkl that has torch open bytes": (".pkl", pickled({"a": bytes_for_torch()})),
    "a .pkl with an array of objects": (".pkl", pickled({"a": np.array([TOUCH])})),
    "a .pkl with addresses for objects": (".pkl", objects_from_numbers(pickled)),
    "a .pkl with an array filled twice": (".pkl", filled_twice()),
    "a .pkl of tensors": (".pkl", pickled({"a": torch.zeros(1)})),
    "a list in a .pth": (".pth", saved([torch.zeros(1)])),
    "a list in a .pkl": (".pkl", pickled([np.zeros(1)])),
    "no tensors": (".pth", saved({"model": {"a": 1}})),
    "no weights at all": (".pth", saved({"model": {}})),
    "names of classes that are none": (".pth", saved({"model": FEW, "class_names": {0: "a"}})),
    "mmdet's, not converted": (".pth", saved({"meta": {}, "state_dict": FEW})),
    "the authors', not converted": (".pth", saved({"model": {"module.rpn.head.a": FEW["a"]}})),
}


def weights(case, tmp_path):
    ending, content = CASES[case]
    file = tmp_path / f"weights{ending}"
    if content is not None:
        file.write_bytes(content)
    return file


def test_page_lists_the_cases():
    check_faults("Weights", list(CASES))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A small config as train_net.py writes it."""
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    cfg = make_cfg()
    cfg.merge_from_list(list(MODEL))
    file.write_text(cfg.dump())
    return file


@pytest.mark.parametrize("case", CASES)
def test_demo_prints_the_message(case, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = weights(case, tmp_path)
    (tmp_path / "image.png").touch()
    argv = ["demo.py", "--config-file", str(config), "--weights", str(file)]
    monkeypatch.setattr(sys, "argv", [*argv, "--input", "image.png", "--output", "out"])
    with pytest.raises(SystemExit) as caught:
        demo.main()
    check_sentence("Weights", case, caught.value.code.removeprefix("error: "))
    assert file.name in caught.value.code
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("case", [x for x in CASES if "runs a command" in x])
@pytest.mark.parametrize("flags", [[], ["--eval-only"]])
def test_train_net_executes_nothing(case, flags, config, squares, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = weights(case, tmp_path)
    argv = ["--config-file", str(config), *flags]
    argv += ["--register", f"squares_weights={squares}/annotations.json:{squares}/images"]
    argv += ["DATASETS.TRAIN", "('squares_weights',)", "DATASETS.TEST", "('squares_weights',)"]
    argv += ["MODEL.WEIGHTS", str(file), "OUTPUT_DIR", str(tmp_path / "out")]
    args = way_in.make_parser().parse_args(argv)
    with pytest.raises(SystemExit) as caught:
        launch(way_in.run, args, way_in.prepare(args))
    check_sentence("Weights", case, caught.value.code.removeprefix("error: "))
    assert not (tmp_path / "exploded").exists()


def test_pickle_executes_the_cases(tmp_path, monkeypatch):
    """Otherwise the tests above would show nothing."""
    monkeypatch.chdir(tmp_path)
    for case in ("a .pkl that runs a command", "a .pkl that evaluates Python"):
        pickle.loads(CASES[case][1])
        (tmp_path / "exploded").unlink()
    torch.load(io.BytesIO(CASES["a .pth that runs a command"][1]), weights_only=False)
    assert (tmp_path / "exploded").exists()


DOORS = {
    "MODEL.WEIGHTS": lambda cfg, file: begin(cfg, file, TrainingCheckpointer),
    "--eval-only": lambda cfg, file: begin(cfg, file, SafeCheckpointer, whole=True),
    "Predictor": lambda cfg, file: Predictor(cfg, file).model,
}


def begin(cfg, file, checkpointer, **options):
    model = build_model(cfg)
    checkpointer(model, "", **options).resume_or_load(str(file), resume=False)
    return model


@pytest.mark.parametrize(
    ("wrapper", "door"),
    [
        *((wrapper, "MODEL.WEIGHTS") for wrapper in WRAPPERS),
        *(("lightning", x) for x in [*DOORS][1:]),
    ],
)
def test_other_projects_checkpoints_are_loaded(wrapper, door, tmp_path):
    """With logs, paths, arguments and numbers beside the weights, and with prefixes."""
    cfg = make_cfg(*MODEL)
    torch.manual_seed(1)
    trained = build_model(cfg)
    (tmp_path / "theirs.ckpt").write_bytes(saved(wrapped(trained)[wrapper]))
    model = DOORS[door](cfg, tmp_path / "theirs.ckpt")
    torch.testing.assert_close(model.state_dict(), trained.state_dict(), rtol=0, atol=0)


def test_safetensors_are_loaded(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    model = build_model(make_cfg(*MODEL))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    loaded = begin(make_cfg(*MODEL), tmp_path / "weights.safetensors", SafeCheckpointer, whole=True)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_files_without_checksums_are_loaded(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        without = saved({"model": FEW})
    finally:
        torch.serialization.set_crc32_options(True)
    for i, content in enumerate((without, without_zip({"model": FEW}))):
        (tmp_path / f"{i}.pth").write_bytes(content)
        assert torch.equal(load_weights(tmp_path / f"{i}.pth")["model"]["a"], FEW["a"])


def test_prefix_of_some_names_stays(tmp_path):
    """As if a LightningModule has a loss with weights."""
    model = build_model(make_cfg(*MODEL))
    weights = wrapped(model)["lightning"]
    weights["state_dict"]["loss.weight"] = torch.zeros(1)
    (tmp_path / "theirs.ckpt").write_bytes(saved(weights))
    sentence = (
        r"no weights in .*theirs\.ckpt fit the model: it has names such as model\.backbone\.\S+, "
        r"the model backbone\.\S+; convert weights of"
    )
    with pytest.raises(WeightsError, match=sentence):
        SafeCheckpointer(model).load(str(tmp_path / "theirs.ckpt"))


@pytest.mark.parametrize(
    "prefix",
    [
        "".join(f"{x}." for x in order)
        for count in range(4)
        for order in itertools.permutations(("module", "_orig_mod", "model"), count)
    ],
)
def test_prefixes_in_any_order_are_removed(prefix):
    weights = {f"{prefix}{name}": torch.zeros(1) for name in ("a.model.b", "modules.c")}
    *_, found = unwrapped(weights)
    assert list(found) == ["a.model.b", "modules.c"]


def test_checkpoint_of_mmengine_is_read():
    """epoch_1.pth of mmengine 0.10.7, with its logs, optimizer, schedulers and averages."""
    content = load_weights(GOLDEN / "mmengine_epoch_1.pth")
    assert {"message_hub", "optimizer", "param_schedulers"} <= content.keys()
    assert content["meta"]["dataset_meta"]["classes"] == ("ant", "bee")
    weights = find_weights(content, "epoch_1.pth")
    assert weights["backbone.0.weight"].shape == (2, 3, 1, 1)
    last = content["ema_state_dict"]
    assert last.keys() == {"steps", *(f"module.{name}" for name in weights)}
    assert not torch.equal(last["module.backbone.0.weight"], weights["backbone.0.weight"])


def test_prefix_of_the_model_stays():
    weights = {"module.model.a": torch.zeros(1), "module.model.b": torch.zeros(1)}
    assert fit_names(weights, {"model.a"}).keys() == {"model.a", "model.b"}
    assert fit_names(weights, {"c"}) == weights
    assert fit_names({}, {"c"}) == {}


def test_versions_of_modules_follow_their_names(tmp_path):
    """torch and Detectron2 complete older versions of a module."""
    model = nn.Sequential(nn.BatchNorm2d(1))
    (tmp_path / "theirs.pth").write_bytes(saved(nn.DataParallel(model).state_dict()))
    weights = find_weights(load_weights(tmp_path / "theirs.pth"), "theirs.pth")
    found = fit_names(weights, model.state_dict().keys())
    assert found._metadata["0"] == model.state_dict()._metadata["0"] == {"version": 2}


@pytest.mark.parametrize("protocol", range(6))
def test_model_zoo_files_are_read(protocol, tmp_path):
    content = {
        "rows": np.arange(6, dtype=np.float32).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "one": np.array(5),
        "big-endian": np.arange(3, dtype=">f4"),
        "flags": np.array([True, False]),
        "scalar": np.float32(3.5),
        "others": [1, 2.5, "text", ("a", None), {"b": True}],
    }
    file = tmp_path / "zoo.pkl"
    file.write_bytes(pickle.dumps(content, protocol))
    # Files of model zoos are of NumPy 1.
    for renamed in (file.read_bytes(), file.read_bytes().replace(b"numpy._core", b"numpy.core")):
        if protocol < 4:  # newer protocols prefix names by their lengths
            file.write_bytes(renamed)
        found = load_weights(file)
        assert found["others"] == content["others"]
        for name in content.keys() - {"others"}:
            np.testing.assert_array_equal(found[name], content[name])
            assert found[name].dtype.newbyteorder("=") == content[name].dtype.newbyteorder("=")
        assert torch.from_numpy(found["rows"]).tolist() == content["rows"].tolist()


def test_text_of_python_2_is_read_as_bytes(tmp_path):
    """Caffe2's files: an array's bytes are a str of Python 2."""
    file = tmp_path / "old.pkl"
    pickle_of_2 = (
        b"(dS'a'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        b"(I1\n(I2\ntcnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
        b"I00\nS'\\x00\\x00\\x80?\\x00\\x00\\x00@'\ntbs."
    )
    file.write_bytes(pickle_of_2)
    assert load_weights(file)["a"].tolist() == [1.0, 2.0]


class Downloads:
    """A path manager whose addresses are files of a folder."""

    def __init__(self, folder):
        self.folder = folder

    def get_local_path(self, path):
        return str(self.folder / path.rpartition("/")[2])


def test_download_is_compared_with_checksum_in_name(tmp_path):
    model = build_model(make_cfg(*MODEL))
    content = saved(model.state_dict())
    digest = hashlib.sha256(content).hexdigest()[:8]
    for name in (f"model-{digest}.pth", "model-00000000.pth", "model.pth"):
        (tmp_path / name).write_bytes(content)
    checkpointer = SafeCheckpointer(model)
    checkpointer.path_manager = Downloads(tmp_path)
    checkpointer.load(f"https://somewhere/model-{digest}.pth")
    checkpointer.load("https://somewhere/model.pth")
    with pytest.raises(WeightsError, match=rf"begins with 00000000, .* got {digest}; delete /"):
        checkpointer.load("https://somewhere/model-00000000.pth")
    checkpointer.load(str(tmp_path / "model-00000000.pth"))  # no download


def test_missing_names_are_logged(tmp_path, caplog):
    model = build_model(make_cfg(*MODEL))
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("head.ctrness")}
    torch.save({"model": state}, tmp_path / "part.pth")
    with caplog.at_level("WARNING"):
        SafeCheckpointer(model).load(str(tmp_path / "part.pth"))
    text = caplog.text
    assert "not found in the checkpoint" in text
    assert "head.ctrness" in text


def test_date_in_name_is_no_checksum(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"something")
    verify_download("https://example.org/cells-20261124.pth", file)
    with pytest.raises(WeightsError, match="expected a SHA-256 that begins with 20269924"):
        verify_download("https://example.org/cells-20269924.pth", file)
