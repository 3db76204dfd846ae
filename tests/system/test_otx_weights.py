"""OTX's ATSS with random weights, converted: outputs equal those of getitune 0.4.0."""

import functools
import io
import json
import operator
import os
import re
import subprocess

import convert_checkpoint
import export
import numpy as np
import others
import pytest
import recipe
import torch
from conftest import GOLDEN, ROOT
from detections import compare
from detectron2.modeling import build_model
from trainings import forget

import atss.engine.run as way_in
import atss_runner
from atss import Predictor, load_config
from atss.checkpoints import load
from atss.config import input_size
from atss.data.datasets import classes_of

pytest.importorskip("timm")

SHAPES = json.loads((GOLDEN / "otx_atss_shapes.json").read_text())
SMALL = "atss_mobilenetv2"
# Of a part of the class logits' bias, so that few detections remain.
SHIFTS = {SMALL: 3.6, "atss_resnext101": 3.2}
ORIGINAL = {SMALL: (48, 100), "atss_resnext101": (48, 75)}


def weights_of(name, classes=80):
    shapes = {k: [classes, *v[1:]] if "atss_cls" in k else v for k, v in SHAPES[name].items()}
    state = {k: torch.from_numpy(v) for k, v in recipe.weights(shapes).items()}
    state["bbox_head.atss_cls.bias"] -= SHIFTS[name]
    if name == SMALL:
        state["backbone.features.init_block.bn.weight"] *= 8  # so that ReLU6 cuts off
    return state


def getitune(weights, names):
    """Return the content of a checkpoint after a training by getitune."""
    content = others.lightning(weights)
    content["hyper_parameters"]["label_info"] = {"label_names": names, "label_ids": names}
    return content


def convert(content, folder, *options):
    """Convert with the tool: the config, and the names in the file."""
    (folder / "theirs.pth").write_bytes(others.saved(content))
    paths = [str(folder / name) for name in ("theirs.pth", "ours.pth")]
    convert_checkpoint.main(["--from", "otx", *options, *paths])
    names = torch.load(folder / "ours.pth", weights_only=True)["class_names"]
    return load_config(folder / "ours.yaml"), names


def refusal(content, folder):
    with pytest.raises(SystemExit) as caught:
        convert(content, folder)
    assert {x.name for x in folder.iterdir()} <= {"theirs.pth"}
    return caught.value.code


@pytest.mark.parametrize(
    ("name", "most"),
    [(SMALL, 2000), pytest.param("atss_resnext101", 400, marks=pytest.mark.slow)],
)
def test_outputs_equal_getitunes(name, most, tmp_path):
    found = np.load(GOLDEN / "otx_atss.npz")
    cfg, names = convert({"state_dict": weights_of(name)}, tmp_path)
    assert names == list(classes_of("coco_2017_val"))
    pixels = (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    assert pixels == ("RGB", [0.0] * 3, [255.0] * 3)
    assert input_size(cfg) == (800, 992, True)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    model.load_state_dict(load(tmp_path / "ours.pth"))
    height, width = ORIGINAL[name]
    example = {"image": torch.from_numpy(found[f"{name}/image"]), "height": height, "width": width}
    with torch.no_grad():
        image = model.preprocess_image([example]).tensor
        fpn = model.backbone(image)
        output = model.head([fpn[level] for level in model.head_in_features])
        maps = {"backbone": [*model.backbone.bottom_up(image).values()], "fpn": [*fpn.values()]}
        detections = model([example])[0]["instances"]
    counts = [x[0, 0].numel() for x in maps["fpn"]]
    for kind, values in zip(("cls", "reg", "ctr"), output[:3], strict=True):
        maps[kind] = [x.reshape(len(x), -1).T for x in values[0].split(counts)]
    for kind, values in maps.items():
        for i, value in enumerate(values):
            flat = value.reshape(-1)
            key, step = f"{name}/{kind}_{i}", max(1, -(-len(flat) // most)) | 1
            np.testing.assert_allclose(flat[::step], found[key], atol=1e-4, rtol=0, err_msg=key)
            sums = [flat.double().sum().item(), flat.double().abs().sum().item()]
            np.testing.assert_allclose(sums, found[f"{key}_sum"], rtol=1e-4, atol=0.05)
    assert len(detections) > 5
    compare(
        *(detections.pred_boxes.tensor.numpy(), detections.scores.numpy()),
        detections.pred_classes.numpy(),
        *(found[f"{name}/det_{x}"] for x in ("boxes", "scores", "classes")),
    )


@pytest.fixture(scope="module")
def small():
    return weights_of(SMALL)


@pytest.mark.parametrize("kind", ["getitune", "OTX 2", "OTX 2.5"])
def test_own_classes_keep_their_names(kind, tmp_path):
    """After a training in half precision: dictionaries of getitune, an object of OTX 2."""
    weights = weights_of(SMALL, 2)
    half = {k: x.half() if x.is_floating_point() else x for k, x in weights.items()}
    content = {
        "getitune": lambda: getitune(half, ["ant", "bee"]),
        "OTX 2": lambda: others.otx_2(half, ["ant", "bee"], "otx.core"),
        "OTX 2.5": lambda: others.otx_2(half, ["ant", "bee"], "otx"),
    }[kind]()
    cfg, names = convert(content, tmp_path)
    assert names == cfg.MODEL.ATSS.CLASS_NAMES == ["ant", "bee"]
    assert (cfg.MODEL.ATSS.NUM_CLASSES, cfg.DATASETS.TRAIN) == (2, ())
    found = load(tmp_path / "ours.pth")["head.cls_score.weight"]
    assert found.dtype == torch.float32
    assert torch.equal(found, half["bbox_head.atss_cls.weight"].float())


def test_entry_selects_averaged_or_last_weights(small, tmp_path):
    """As mmengine's EMAHook names them."""
    last = {f"module.{k}": x + 1 for k, x in small.items()} | {"steps": torch.tensor(3)}
    content = {"state_dict": small, "ema_state_dict": last}
    for options, added in ((), 0), (("--entry", "ema_state_dict"), 1):
        convert(content, tmp_path, *options)
        bias = load(tmp_path / "ours.pth")["head.ctrness.bias"]
        assert torch.equal(bias, small["bbox_head.atss_centerness.bias"] + added)
        for file in tmp_path.iterdir():
            file.unlink()
    with pytest.raises(SystemExit, match=r"has no ema with weights: choose from \['state_dict'"):
        convert(content, tmp_path, "--entry", "ema")


def test_other_files_are_refused_in_a_sentence(small, tmp_path):
    one_less = dict(list(small.items())[1:])
    other = {k.replace("atss_cls", "gfl_cls"): x for k, x in small.items()}
    yolox = {
        "backbone.stem.conv.weight": torch.zeros(1),
        "bbox_head.multi_level_conv_cls.0.bias": 0,
    }
    for weights, sentence in (
        ({"model.x": small["neck.fpn_convs.0.conv.bias"], **small}, "unexpected: model.x"),
        (one_less, r"missing: backbone\.bottom_up\.net\.conv_stem\.weight|missing or unknown"),
        (other, "unknown predictors"),
        ({k: torch.zeros(1) for k in yolox}, r"unknown predictors \['multi_level_conv_cls'\]"),
        (
            small | {"bbox_head.atss_reg.weight": torch.zeros(8, 64, 3, 3)},
            "wrong shape: head.bbox_p",
        ),
    ):
        assert re.search(sentence, refusal({"state_dict": weights}, tmp_path))
    file = tmp_path / "theirs.pth"
    file.write_bytes(others.saved({"state_dict": small})[:100_000])
    with pytest.raises(SystemExit, match=r"theirs\.pth is no checkpoint, or is damaged"):
        convert_checkpoint.main(["--from", "otx", str(file), str(tmp_path / "ours.pth")])


PRECISE = ("MODEL.ATSS.PRECISION", "fp32")  # as the exported file


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments, state) if state else (function, arguments)

    def __reduce__(self):
        return self.call


LABELS = others.classes("otx.types.label", "LabelInfo")
TOUCH = Calls(os.system, "touch exploded")
HOSTILE = {
    "command": TOUCH,
    "process": Calls(subprocess.Popen, ["touch", "exploded"]),
    "code": Calls(exec, "open('exploded', 'w')"),
    "import": Calls(__import__, "antigravity"),
    "file": Calls(io.open, "exploded", "w"),
    "array": Calls(np.load, "exploded.npy", None, True),
    "partial": functools.partial(os.system, "touch exploded"),
    "getter": operator.attrgetter("__class__"),
    "labels": Calls(LABELS, state={"label_names": TOUCH}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_checkpoints_are_refused(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {"a": torch.zeros(1)}, "hyper_parameters": HOSTILE[kind]}
    sentence = refusal(content, tmp_path)
    assert re.fullmatch(
        r"error: \S+theirs\.pth contains more than weights \(.*\) and is not .*", sentence
    )


@pytest.mark.slow
def test_small_recipe_fine_tunes_and_exports(small, squares, tmp_path):
    """One class is COCO's, and keeps its row. The exported file resizes as the detector."""
    convert({"state_dict": small}, tmp_path)
    values = {"MODEL.WEIGHTS": tmp_path / "ours.pth", "DATASETS.TRAIN": ("tuned",)}
    values |= {"DATASETS.TEST": ("tuned",), "OUTPUT_DIR": tmp_path / "out", "TEST.REPORT": False}
    values |= {"SOLVER.MAX_ITER": 2, "DATALOADER.NUM_WORKERS": 0, "SOLVER.IMS_PER_BATCH": 2}
    values |= {f"INPUT.{x}_SIZE_TEST": side for x, side in (("MIN", 96), ("MAX", 160))}
    values |= {"INPUT.MIN_SIZE_TRAIN": (96,), "MODEL.ATSS.SCORE_THRESH_TEST": 0.0, "SEED": 1}
    config = str(ROOT / "configs" / "ATSS_mobilenetv2_FPN_fine_tune.yaml")
    argv = ["--config-file", config, "--register"]
    argv += [f"tuned={squares}/annotations.json:{squares}/images"]
    args = way_in.make_parser().parse_args([*argv, *(str(x) for i in values.items() for x in i)])
    assert np.isfinite(way_in.run(args, way_in.prepare(args))["bbox"]["AP"])
    forget("tuned")
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "Classes in the weights: orange (1 of 2); new: blue" in log
    assert "Skip loading" not in log
    images = sorted(map(str, (squares / "images").iterdir()))[:2]
    for resize in ("shortest", "stretch"):
        file, opts = tmp_path / f"{resize}.onnx", ["INPUT.RESIZE", resize, *PRECISE]
        export.main([str(tmp_path / "out"), "--output", str(file), *opts])
        predictor, runner = Predictor(tmp_path / "out", opts=opts), atss_runner.load(file)
        assert predictor.size == runner.size
        for ours, theirs in zip(predictor(images), runner(images), strict=True):
            np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)
