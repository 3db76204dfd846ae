"""Published weights give the outputs of the authors' code and of mmdet."""

import json
import pickle
import re
import runpy
from pathlib import Path
from pprint import pformat

import convert_checkpoint
import numpy as np
import others
import pytest
import recipe
import torch
from conftest import GOLDEN, ROOT, make_cfg, make_input
from detections import compare
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from PIL import Image
from torch import nn

from atss import add_atss_config, load_config
from atss.checkpoints import (
    ConversionError,
    SafeCheckpointer,
    TrainingCheckpointer,
    config_for,
    convert,
    load,
    mmdet_config,
    to_mmdet,
)
from atss.checkpoints.inputs import ENTRY, refuse_others
from atss.config.inputs import PIXELS, values_in
from atss.data.mapper import Mapper
from atss.weights import WeightsError

OFFICIAL_SHAPES = json.loads((GOLDEN / "official_atss_r50_shapes.json").read_text())
MMDET_SHAPES = json.loads((GOLDEN / "mmdet_atss_r50_shapes.json").read_text())
# Without class names.
SMALL = "ATSS_R_18_FPN_small.yaml"
DETECTOR = {"official": None, "mmdet": "atss"}
MAP = json.loads((GOLDEN / "checkpoint_map_d2.json").read_text())


def tensors(shapes):
    return {k: torch.from_numpy(v) for k, v in recipe.weights(shapes).items()}


@pytest.fixture(scope="module")
def weights():
    """Random weights in the format of either code."""
    return {"official": tensors(OFFICIAL_SHAPES), "mmdet": tensors(MMDET_SHAPES)}


@pytest.fixture(scope="module", params=["box", "point"])
def official(request, weights):
    """The authors' model with random weights, converted: model, input, the authors' results."""
    suffix = "" if request.param == "box" else "_point"
    reference = np.load(GOLDEN / f"official_atss_r50{suffix}.npz")
    state = dict(weights["official"])
    adjustments = (reference[f"adjust_{part}"] for part in ("keys", "mul", "add"))
    for key, mul, add in zip(*adjustments, strict=True):
        state[key] = state[key] * float(mul) + float(add)
    converted = convert({f"module.{k}": v for k, v in state.items()}, "official")
    cfg = config_for(converted, "official", request.param)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    model.load_state_dict(converted)
    # Legacy boxes contain their last pixel.
    boxes = reference["gt_boxes"] + np.array([0, 0, 1, 1], np.float32)
    example = make_input(boxes, reference["gt_labels"] - 1, (160, 224))
    example["image"] = torch.from_numpy(reference["image"])
    return model, example, reference, request.param


def outputs(model, example):
    with torch.no_grad():
        images = model.preprocess_image([example])
        features = model.backbone(images.tensor)
        return model.head([features[name] for name in model.head_in_features])


def test_head_outputs_equal_the_authors(official):
    model, example, reference, regression = official
    output = outputs(model, example)
    if regression == "point":
        output = output._replace(
            box_regression=output.box_regression.relu()
        )  # our ReLU is in decoding
    for name, ours in zip(("cls", "box", "ctr"), output[:3], strict=True):
        maps = [reference[f"{name}_{level}"] for level in range(5)]
        expected = np.concatenate([x.reshape(x.shape[-3], -1).T for x in maps])
        ours = ours[0].reshape(len(expected), -1).numpy()
        assert np.abs(ours - expected).max() <= 1e-3 * np.abs(expected).max()


def test_losses_equal_the_authors_on_continuous_boxes(official, monkeypatch):
    """The authors' losses are of legacy boxes, without the last pixel in GIoU and centerness; the
    reference is the same network and formulas on boxes that are half a pixel larger on each
    side."""
    model, _, reference, _ = official
    boxes = reference["gt_boxes"] + np.array([-0.5, -0.5, 0.5, 0.5], np.float32)
    example = make_input(boxes, reference["gt_labels"] - 1, (160, 224))
    example["image"] = torch.from_numpy(reference["image"])
    model.train()
    with pytest.raises(ValueError, match=r"LEGACY_PIXELS True is for inference .* set it to False"):
        model([example])
    monkeypatch.setattr(model, "box_coder", model.box_coder.code)
    losses = [x.item() for x in model([example]).values()]
    model.eval()
    np.testing.assert_allclose(losses, reference["halfpixel_losses"], rtol=1e-3)
    theirs = [float(reference[f"loss_{name}"]) for name in ("cls", "reg", "centerness")]
    np.testing.assert_allclose(losses[0], theirs[0], rtol=1e-5)
    np.testing.assert_allclose(losses[1:], theirs[1:], rtol=0.021)  # 0.8 and 2.0 % on this image


@pytest.mark.parametrize("which", ["det", "low"])
def test_detections_equal_the_authors(official, which):
    """As sets: the authors' are not sorted. "low" has fewer than 100, so that the filter
    decides."""
    model, example, reference, _ = official
    shift = float(reference["low_shift"]) if which == "low" else 0.0
    with torch.no_grad():
        model.head.cls_score.bias += shift
        found = model([example])[0]["instances"]
        model.head.cls_score.bias -= shift
    compare(
        *(found.pred_boxes.tensor.numpy(), found.scores.numpy(), found.pred_classes.numpy() + 1),
        *(reference[f"{which}_boxes"] + np.array([0, 0, 1, 1]), reference[f"{which}_scores"]),
        reference[f"{which}_labels"],
    )


def test_boxes_keep_their_last_pixel_when_resized(official):
    """On an image half as large as the input, a box (x1, x2) with its last pixel becomes (x1 / 2,
    (x2 - 1) / 2 + 1)."""
    model, example, _, _ = official
    with torch.no_grad():
        same = model([example])[0]["instances"].pred_boxes.tensor
        half = model([example | {"height": 80, "width": 112}])[0]["instances"].pred_boxes.tensor
    expected = same / 2
    expected[:, 2:] += 0.5
    expected[:, 2] = expected[:, 2].clamp(max=112)
    expected[:, 3] = expected[:, 3].clamp(max=80)
    torch.testing.assert_close(half, expected)


@pytest.mark.parametrize("original", [(160, 112), (80, 224)], ids=["narrower", "lower"])
def test_each_side_keeps_its_own_last_pixel(official, original):
    """On an image half as wide, or half as high, as the input."""
    model, example, _, _ = official
    height, width = original
    with torch.no_grad():
        same = model([example])[0]["instances"].pred_boxes.tensor
        other = model([example | {"height": height, "width": width}])[0]["instances"]
    zoom = torch.tensor([width / 224, height / 160] * 2)
    expected = same * zoom
    expected[:, 2:] += 1 - zoom[2:]
    expected[:, 2:] = expected[:, 2:].minimum(torch.tensor([width, height]))
    torch.testing.assert_close(other.pred_boxes.tensor, expected)


def test_mmdets_detections_through_the_tool(weights, tmp_path):
    """The image is read as in training and evaluation, with the config's order of channels."""
    reference = np.load(GOLDEN / "mmdet_atss_r50.npz")
    state = dict(weights["mmdet"])
    state["bbox_head.atss_cls.bias"] = state["bbox_head.atss_cls.bias"] - 2
    converted = convert(state, "mmdet", "atss")
    cfg = config_for(converted, "mmdet", detector="atss")
    cfg.MODEL.DEVICE = "cpu"
    cfg.INPUT.MIN_SIZE_TEST = 160
    model = build_model(cfg).eval()
    model.load_state_dict(converted)
    file = tmp_path / "image.png"
    Image.fromarray(reference["image_rgb"].transpose(1, 2, 0)).save(file)
    example = make_input(reference["gt_boxes"], reference["gt_classes"], (160, 224))
    example["image"] = Mapper(cfg, is_train=False)({"file_name": str(file)})["image"]
    with torch.no_grad():
        found = model([example])[0]["instances"]
    compare(
        *(found.pred_boxes.tensor.numpy(), found.scores.numpy(), found.pred_classes.numpy()),
        *(reference["det_boxes"], reference["det_scores"], reference["det_classes"]),
    )
    model.train()
    losses = [x.item() for x in model([example]).values()]
    np.testing.assert_allclose(losses, reference["loss_values"], rtol=1e-3)


@pytest.mark.parametrize("source", ["official", "mmdet"])
def test_every_name_is_mapped(weights, source):
    converted = convert(weights[source], source, DETECTOR[source])
    expected = {old: new for old, new in MAP[f"{source}_to_d2"].items() if new is not None}
    biases = {f"head.{t}_subnet.{i}.bias" for t in ("cls", "bbox") for i in (0, 3, 6, 9)}
    absent = biases if source == "mmdet" else set()
    assert set(converted) == set(MAP["target_shapes"]) - absent
    for old, new in expected.items():
        value = weights[source][old].reshape(converted[new].shape)
        if source == "official" and new.endswith("running_var"):
            value = value - 1e-5
        assert torch.equal(converted[new], value), new


def test_to_mmdet_and_back(weights):
    converted = convert(weights["mmdet"], "mmdet", "atss")
    back = to_mmdet(converted, config_for(converted, "mmdet", detector="atss"))
    assert set(back) == set(weights["mmdet"])
    for name, value in weights["mmdet"].items():
        assert torch.equal(back[name].flatten(), value.flatten()), name
    cfg = make_cfg(config="ATSS_R_50_FPN_1x.yaml")
    with pytest.raises(
        ConversionError, match=r"no biases, but head\.cls_subnet\.0\.bias .*TOWER_B"
    ):
        to_mmdet(convert(weights["official"], "official"), cfg)


def test_trained_model_becomes_mmdets(tmp_path, capsys):
    """Names and shapes equal those of mmdet's R-50, and the config has all settings that are not
    mmdet's defaults."""
    opts = ("MODEL.ATSS.TOWER_BIAS", False, "MODEL.ATSS.NUM_CLASSES", 80)
    cfg = make_cfg(*opts, config="ATSS_R_50_FPN_1x.yaml")
    model = build_model(cfg)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sum(model([make_input([[20, 20, 90, 80]], [1])]).values()).backward()
    optimizer.step()
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    paths = [str(tmp_path / name) for name in ("model_final.pth", "for_mmdet.pth")]
    convert_checkpoint.main(["--to", "mmdet", *paths])
    converted = load(paths[1])
    assert {k: tuple(v.shape) for k, v in converted.items()} == {
        k: tuple(v) for k, v in MMDET_SHAPES.items()
    }
    printed = capsys.readouterr().out
    theirs = runpy.run_path(str(tmp_path / "for_mmdet.py"))["model"]
    assert pformat(theirs, sort_dicts=False) in printed
    assert theirs["bbox_head"]["anchor_generator"]["center_offset"] == 0.5
    assert theirs["neck"]["relu_before_extra_convs"] is True
    assert theirs["backbone"]["style"] == "caffe"
    assert theirs["data_preprocessor"]["bgr_to_rgb"] is False
    assert theirs["data_preprocessor"]["mean"] == [102.9801, 115.9465, 122.7717]

    back = convert(converted, "mmdet", "atss")
    for name, value in model.state_dict().items():
        assert torch.equal(back[name], value), name


def test_lower_levels_become_mmdets():
    """An FPN on res2 to res4: mmdet counts its levels from zero, and P5 and P6 are its third and
    fourth."""
    levels = ["res2", "res3", "res4"]
    opts = ("MODEL.FPN.IN_FEATURES", levels, "MODEL.RESNETS.OUT_FEATURES", levels)
    opts += ("MODEL.ATSS.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"], "MODEL.FPN.NORM", "")
    opts += ("MODEL.ATSS.TOWER_BIAS", False, "MODEL.ATSS.NUM_CONVS", 1)
    cfg = make_cfg(*opts, config=SMALL)
    state = build_model(cfg).state_dict()
    converted = to_mmdet(state, cfg)
    pairs = {"lateral_convs.0": "fpn_lateral2", "lateral_convs.2": "fpn_lateral4"}
    pairs |= {"fpn_convs.1": "fpn_output3", "fpn_convs.3": "top_block.p6"}
    for theirs, ours in (pairs | {"fpn_convs.4": "top_block.p7"}).items():
        weight = converted[f"neck.{theirs}.conv.weight"]
        assert torch.equal(weight, state[f"backbone.{ours}.weight"])
    model = {}
    exec(mmdet_config(cfg, state), model)
    neck = model["model"]["neck"]
    assert (neck["start_level"], neck["in_channels"]) == (0, [64, 128, 256])
    assert model["model"]["backbone"]["out_indices"] == (0, 1, 2)
    assert model["model"]["bbox_head"]["anchor_generator"]["strides"] == [4, 8, 16, 32, 64]


def test_unsupported_configs_are_refused():
    opts = ("MODEL.ATSS.TOWER_BIAS", False, "MODEL.FPN.NORM", "", "MODEL.ATSS.NUM_CONVS", 1)
    cfg = make_cfg(*opts, config=SMALL)
    state = build_model(cfg).state_dict()
    assert len(to_mmdet(state, make_cfg(*opts, "MODEL.ATSS.NUM_CLASSES", -1, config=SMALL))) > 100
    for missing in ("head.ctrness.weight", "head.scales.4.scale", "backbone.top_block.p7.weight"):
        part = {k: v for k, v in state.items() if k != missing}
        with pytest.raises(ConversionError, match=rf"missing: {missing}"):
            to_mmdet(part, cfg)
    with pytest.raises(ConversionError, match=r"unexpected: head\.surprise"):
        to_mmdet(state | {"head.surprise": torch.zeros(1)}, cfg)
    with pytest.raises(ConversionError, match=r"missing: head\.cls_subnet\.3\.weight"):
        to_mmdet(state, make_cfg(*opts[:-1], 2, config=SMALL))  # another run's config
    for key, value in (
        ("ATSS.REGRESSION", "point"),
        ("ATSS.LEGACY_PIXELS", True),
        ("ATSS.NORM", "BN"),
        ("FPN.FUSE_TYPE", "avg"),
        ("RESNETS.RES5_DILATION", 2),
        ("FPN.NORM", "BN"),
    ):
        with pytest.raises(ConversionError, match=rf"only MODEL\.{key} .*, got {value!r}"):
            mmdet_config(make_cfg(*opts, f"MODEL.{key}", value, config=SMALL), state)
    with pytest.raises(ConversionError, match=r"only INPUT\.FORMAT BGR and RGB, got planes"):
        mmdet_config(make_cfg(*opts, "INPUT.FORMAT", "planes", config=SMALL), state)
    with pytest.raises(ConversionError, match="one anchor per location"):
        mmdet_config(make_cfg(config="tables/atss_A9.yaml"), state)


def deformable(weights, source):
    """The same with deformable convolutions in c3 to c5 and in the towers."""
    state = dict(weights[source])
    if source == "official":
        stage, offset, plain = "backbone.body.layer", "offset", "conv2.conv.weight"
        towers = ["rpn.head.cls_tower.9", "rpn.head.bbox_tower.9"]
    else:
        stage, offset, plain = "backbone.layer", "conv_offset", "conv2.weight"
        towers = ["bbox_head.cls_convs.3.conv", "bbox_head.reg_convs.3.conv"]
    for name in list(state):
        if name.startswith(tuple(f"{stage}{i}" for i in (2, 3, 4))) and "conv2.weight" in name:
            block, value = name.removesuffix("conv2.weight"), state.pop(name)
            state[block + plain] = value
            state[f"{block}conv2.{offset}.weight"] = torch.zeros(27, value.shape[1], 3, 3)
            state[f"{block}conv2.{offset}.bias"] = torch.zeros(27)
    for tower in towers:
        for kind in ("weight", "bias"):
            if source == "official":
                state[f"{tower}.conv.{kind}"] = state.pop(f"{tower}.{kind}")
        state[f"{tower}.{offset}.weight"] = torch.zeros(27, 256, 3, 3)
        state[f"{tower}.{offset}.bias"] = torch.zeros(27)
    return state


@pytest.mark.parametrize("source", ["official", "mmdet"])
def test_strides_are_in_each_codes_layer(weights, source):
    """The authors' plain ResNets have the stride in the 1 x 1 convolution, other codes in the 3 x
    3."""

    def strides(state):
        cfg = config_for(
            convert(state, source, DETECTOR[source]), source, detector=DETECTOR[source]
        )
        cfg.MODEL.DEVICE = "meta"
        with torch.device("meta"):
            block = build_model(cfg).backbone.bottom_up.res3[0]
        return *block.conv1.stride, *block.conv2.stride

    wide = {}  # ResNeXt-50, 32 x 8d
    for name, value in weights[source].items():
        stage = re.match(r"(backbone\.(?:body\.)?layer)(\d)\.\d+\.(conv|bn)([123])", name)
        if stage and (stage[3], stage[4]) != ("bn", "3"):
            width = 256 * 2 ** (int(stage[2]) - 1)
            shape = list(value.shape)
            if stage[4] in "12" and shape:
                shape[0] = width
            if stage[3] == "conv" and stage[4] != "1":
                shape[1] = width // 32 if stage[4] == "2" else width
            value = torch.zeros(shape)
        wide[name] = value
    in_1x1 = source == "official"
    assert strides(weights[source]) == ((2, 2, 1, 1) if in_1x1 else (1, 1, 2, 2))
    assert strides(wide) == (1, 1, 2, 2)


@pytest.mark.parametrize("source", ["official", "mmdet"])
def test_deformable_weights(weights, source):
    state = deformable(weights, source)
    converted = convert(state, source, DETECTOR[source])
    cfg = config_for(converted, source, detector=DETECTOR[source])
    assert cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE == [False, True, True, True]
    assert cfg.MODEL.RESNETS.DEFORM_MODULATED
    assert cfg.MODEL.ATSS.DEFORM_TOWER == "v2"
    plain = convert(weights[source], source, DETECTOR[source])
    assert torch.equal(
        converted["head.cls_subnet.9.conv.weight"], plain["head.cls_subnet.9.weight"]
    )
    assert "backbone.bottom_up.res3.0.conv2_offset.weight" in converted
    if source == "mmdet":  # its ATSS has no towers with a deformable last convolution
        with pytest.raises(ConversionError, match="DEFORM_TOWER '', got 'v2'"):
            to_mmdet(converted, cfg)


def test_misfits_are_listed(weights):
    state = dict(weights["official"])
    del state["backbone.fpn.fpn_inner2.bias"]
    state["rpn.head.centerness.bias"] = torch.zeros(7)
    state["rpn.head.surprise"] = torch.zeros(1)
    with pytest.raises(ConversionError) as caught:
        convert(state, "official")
    lines = str(caught.value).splitlines()[1:]
    assert lines == [
        "  unexpected: rpn.head.surprise",
        "  missing: backbone.fpn_lateral3.bias",
        "  wrong shape: head.ctrness.bias must be (1,), got (7,)",
    ]
    with pytest.raises(ConversionError, match="unknown predictors"):
        convert(weights["official"], "mmdet")
    with pytest.raises(ConversionError, match="only detectors with a ResNet"):
        convert(weights["mmdet"], "official")


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


@pytest.mark.parametrize("kind", ["code", "truncated", "text", "absent", "no tensors"])
def test_files_without_weights_are_refused(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "weights.pth"
    if kind == "code":
        file.write_bytes(pickle.dumps({"model": Bomb()}))
    elif kind == "truncated":
        torch.save({"model": {"a": torch.zeros(1000)}}, file)
        file.write_bytes(file.read_bytes()[:2000])
    elif kind == "text":
        file.write_text("<html>not found</html>")
    elif kind == "no tensors":
        torch.save({"model": {"a": 1}}, file)
    with pytest.raises(WeightsError, match=r"weights\.pth") as caught:
        load(file)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def load_into(model, file):
    """Load weights as MODEL.WEIGHTS, and return the names that did not match."""

    class Recording(SafeCheckpointer):
        def _load_model(self, checkpoint):
            self.left = super()._load_model(checkpoint)
            return self.left

    checkpointer = Recording(model)
    checkpointer.load(str(file))
    return checkpointer.left


def test_checkpointer_loads_converted_weights(weights, tmp_path, caplog):
    """With as many classes everything loads; with others, all but the class layer, which is
    logged."""
    converted = convert(weights["official"], "official")
    torch.save({"model": converted}, tmp_path / "converted.pth")
    cfg = config_for(converted, "official")
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    left = load_into(model, tmp_path / "converted.pth")
    assert not left.missing_keys
    assert not left.unexpected_keys
    assert torch.equal(model.head.cls_score.weight, converted["head.cls_score.weight"])
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    cfg.MODEL.ATSS.NUM_CLASSES = 3
    model = build_model(cfg)
    with caplog.at_level("WARNING"):
        SafeCheckpointer(model).load(str(tmp_path / "converted.pth"))
    skipped = [r.getMessage() for r in caplog.records if "Skip loading" in r.getMessage()]
    assert len(skipped) == 2
    assert all("head.cls_score" in message for message in skipped)
    assert torch.equal(model.head.bbox_pred.weight, converted["head.bbox_pred.weight"])


@pytest.mark.parametrize(("count", "first"), [(80, ["person", "bicycle"]), (3, [])])
def test_eighty_classes_have_cocos_names(weights, tmp_path, count, first):
    state = {k: v[:count] if "atss_cls" in k else v for k, v in weights["mmdet"].items()}
    torch.save({"state_dict": state}, tmp_path / "theirs.pth")
    paths = [str(tmp_path / name) for name in ("theirs.pth", "ours.pth")]
    convert_checkpoint.main(["--from", "mmdet", "--detector", "atss", *paths])
    names = torch.load(tmp_path / "ours.pth", weights_only=True)["class_names"]
    assert names[:2] == first
    assert len(names) == (count if first else 0)


def test_tool_writes_weights_and_config(weights, tmp_path, capsys):
    torch.save({"model": weights["official"], "iteration": 3}, tmp_path / "theirs.pth")
    out = tmp_path / "new" / "ours.pth"
    paths = [str(tmp_path / "theirs.pth"), str(out)]
    convert_checkpoint.main(["--from", "official", "--regression", "point", *paths])
    assert "ours.yaml" in capsys.readouterr().out
    cfg = get_cfg()
    add_atss_config(cfg)
    cfg.merge_from_file(str(out.with_suffix(".yaml")))
    assert cfg.MODEL.ATSS.REGRESSION == "point"
    assert str(out) == cfg.MODEL.WEIGHTS
    cfg.MODEL.DEVICE = "cpu"
    left = load_into(build_model(cfg), cfg.MODEL.WEIGHTS)
    assert not left.missing_keys
    assert not left.unexpected_keys

    mmdet = tmp_path / "theirs_too.pth"
    compiled = {f"_orig_mod.{name}": x for name, x in weights["mmdet"].items()}
    mmdet.write_bytes(others.saved(others.mmdet(compiled)))
    paths = [str(mmdet), str(tmp_path / "from_mmdet.pth")]
    convert_checkpoint.main(["--from", "mmdet", "--detector", "atss", *paths])
    back = tmp_path / "back.pth"
    paths = [str(tmp_path / "from_mmdet.pth"), str(back)]
    with pytest.raises(SystemExit, match=r"error: cannot read the config .*config\.yaml"):
        convert_checkpoint.main(["--to", "mmdet", *paths])
    config = str(tmp_path / "from_mmdet.yaml")
    convert_checkpoint.main(["--to", "mmdet", "--config-file", config, *paths])
    assert set(load(back)) == set(weights["mmdet"])


def test_config_finds_weights_from_any_folder(weights, tmp_path, monkeypatch):
    torch.save({"model": weights["official"]}, tmp_path / "theirs.pth")
    monkeypatch.chdir(tmp_path)
    convert_checkpoint.main(["--from", "official", "theirs.pth", "new/ours.pth"])
    assert str(tmp_path / "new" / "ours.pth") == load_config("new/ours.yaml").MODEL.WEIGHTS


def test_fine_tuning_recipe_overrides_written_config(weights, tmp_path):
    """It trains these weights, with their preprocessing, on any classes."""
    torch.save({"model": weights["official"]}, tmp_path / "theirs.pth")
    paths = [str(tmp_path / name) for name in ("theirs.pth", "ours.pth")]
    convert_checkpoint.main(["--from", "official", *paths])
    recipe_file = ROOT / "configs" / "fine_tune_coco.yaml"
    (tmp_path / "tune.yaml").write_text(f"_BASE_: [ours.yaml, {recipe_file}]\n")
    cfg, given = load_config(tmp_path / "tune.yaml"), load_config(tmp_path / "ours.yaml")
    assert paths[1] == cfg.MODEL.WEIGHTS
    assert (given.MODEL.ATSS.NUM_CLASSES, given.MODEL.ATSS.LEGACY_PIXELS) == (80, True)
    assert (cfg.MODEL.ATSS.NUM_CLASSES, cfg.MODEL.ATSS.LEGACY_PIXELS) == (-1, False)
    for key in ("PIXEL_MEAN", "PIXEL_STD", "RESNETS", "ANCHOR_GENERATOR", "FPN"):
        assert cfg.MODEL[key] == given.MODEL[key]
    assert given.INPUT.FORMAT == cfg.INPUT.FORMAT


def test_weights_refuse_other_pixel_values(weights, tmp_path, monkeypatch):
    """Those of mmdet's config load into the zoo's, but would get other pixels and strides."""
    torch.save({"state_dict": weights["mmdet"]}, tmp_path / "theirs.pth")
    monkeypatch.chdir(tmp_path)
    convert_checkpoint.main(["--from", "mmdet", "--detector", "atss", "theirs.pth", "ours.pth"])
    (tmp_path / "tune.yaml").write_text("_BASE_: [ours.yaml, fine_tune_coco.yaml]\n")
    for config, sentence in (
        ("tune.yaml", None),
        ("ATSS_R_50_FPN_fine_tune", r"INPUT\.FORMAT RGB.*STRIDE_IN_1X1 False.*has BGR.*set these"),
    ):
        cfg = load_config(config, opts=["DATASETS.TRAIN", (), "DATASETS.TEST", ()])
        values = values_in(cfg)
        load = TrainingCheckpointer(nn.Linear(1, 1), str(tmp_path), trained_with=values).load
        with pytest.raises(WeightsError, match=sentence or "no weights in .* fit"):
            load("ours.pth")
    stored = torch.load("ours.pth", weights_only=True)[ENTRY]
    cfg.INPUT.FORMAT = "planes"
    assert values.keys() - values_in(cfg).keys() == {*PIXELS}
    refuse_others(stored, {"INPUT.FORMAT": "RGB"}, "ours.pth")
    with pytest.raises(WeightsError, match=r"with INPUT\.FORMAT RGB, the config has BGR"):
        refuse_others(stored, {"INPUT.FORMAT": "BGR"}, "ours.pth")
    refuse_others(None, values, "ours.pth")  # of older versions


def test_tool_writes_nothing_if_weights_do_not_fit(weights, tmp_path):
    state = {k: v for k, v in weights["official"].items() if "centerness" not in k}
    torch.save({"model": state}, tmp_path / "theirs.pth")
    for argv, sentence in (
        (["--from", "official", "theirs.pth", "ours.pth"], r"missing: head\.ctrness\.weight"),
        (["--from", "official", "absent.pth", "ours.pth"], "cannot read .*absent"),
        (["--from", "official", "theirs.pth", "ours.pkl"], "must end in .pth"),
        (["--from", "official", "theirs.pth", "theirs.pth"], "must not be IN"),
    ):
        paths = [str(tmp_path / p) for p in argv[2:]]
        with pytest.raises(SystemExit, match=f"error: (.|\n)*{sentence}"):
            convert_checkpoint.main([*argv[:2], *paths])
        assert [p.name for p in tmp_path.iterdir()] == ["theirs.pth"]


def test_imagenet_weights_of_detectron2s_catalogue(tmp_path):
    """A file with the names of MSRA/R-50.pkl (Caffe2's) fills the backbone; FPN, the levels above
    it and the head stay random."""
    cfg = make_cfg(config="ATSS_R_50_FPN_1x.yaml")
    model = build_model(cfg)
    blobs = {}
    for name, value in model.backbone.bottom_up.state_dict().items():
        if "running" in name:
            continue  # folded into scale and bias there
        parts, _, kind = name.rpartition(".")
        suffix = {"weight": "w", "bias": "b"}[kind]
        if parts.endswith(".norm"):
            parts, suffix = parts.removesuffix(".norm"), {"weight": "bn_s", "bias": "bn_b"}[kind]
        if parts == "stem.conv1":
            theirs = "conv1" if suffix == "w" else "res_conv1"
        else:
            stage, block, layer = parts.split(".")
            branch = {"conv1": "2a", "conv2": "2b", "conv3": "2c", "shortcut": "1"}[layer]
            theirs = f"{stage}_{block}_branch{branch}"
        blobs[f"{theirs}_{suffix}"] = recipe.tensor(name, value.shape)
    file = tmp_path / "R-50.pkl"
    file.write_bytes(pickle.dumps({"blobs": blobs}))
    missing = load_into(model, file).missing_keys
    allowed = ("backbone.fpn_", "backbone.top_block.", "head.", "anchor_generator")
    assert all(name.startswith(allowed) for name in missing)
    filled = model.backbone.bottom_up.res4[2].conv2
    expected = recipe.tensor("res4.2.conv2.weight", filled.weight.shape)
    torch.testing.assert_close(filled.weight.detach(), torch.from_numpy(expected))
    expected = recipe.tensor("res4.2.conv2.norm.bias", filled.norm.bias.shape)
    torch.testing.assert_close(filled.norm.bias, torch.from_numpy(expected))


def test_failed_write_leaves_nothing(weights, tmp_path, monkeypatch):
    torch.save({"model": weights["official"]}, tmp_path / "theirs.pth")
    argv = ["--from", "official", str(tmp_path / "theirs.pth")]

    def full(content, path):
        path.write_bytes(b"x" * 100)
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RuntimeError("unexpected pos 64") from error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        SystemExit, match=r"error: cannot write .*new\.pth: No space left on device"
    ):
        convert_checkpoint.main([*argv, str(tmp_path / "new.pth")])
    monkeypatch.undo()
    monkeypatch.setattr(Path, "write_text", lambda path, text: full(text, path))
    with pytest.raises(SystemExit, match=r"error: cannot write .*new\.pth: No space left"):
        convert_checkpoint.main([*argv, str(tmp_path / "new.pth")])
    assert [x.name for x in tmp_path.iterdir()] == ["theirs.pth"]


@pytest.mark.parametrize("way", [["--from", "official"], ["--from", "mmdet"], ["--to", "mmdet"]])
@pytest.mark.parametrize("there", [".pth", "settings"])
def test_no_output_is_replaced(way, there, tmp_path):
    """Checked before IN is read."""
    ending = {"--from": ".yaml", "--to": ".py"}[way[0]] if there == "settings" else there
    file = tmp_path / f"out{ending}"
    file.write_text("mine")
    config = ROOT / "configs" / "ATSS_R_50_FPN_1x.yaml"
    way = [*way, "--config-file", str(config)] if way[0] == "--to" else way
    sentence = rf"error: .*out\{ending} already exists: choose another OUT"
    with pytest.raises(SystemExit, match=sentence):
        convert_checkpoint.main([*way, "theirs.pth", str(tmp_path / "out.pth")])
    assert file.read_text() == "mine"
    assert [*tmp_path.iterdir()] == [file]


# As mmdet 2 writes it: img_norm_cfg and pipelines at the top level.
MMDET_2 = """
img_norm_cfg = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='MultiScaleFlipAug', img_scale=(1000, 600), transforms=[
        dict(type='Resize', keep_ratio=True), dict(type='Normalize', **img_norm_cfg),
        dict(type='Normalize', mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)])]
model = dict(
    type='ATSS',
    backbone=dict(type='ResNet', depth=50, style='caffe'),
    bbox_head=dict(type='ATSSHead', anchor_generator=dict(
        type='AnchorGenerator', ratios=[1.0], octave_base_scale=6, scales_per_octave=1,
        strides=[8, 16, 32, 64, 128])))
train_cfg = dict(assigner=dict(type='ATSSAssigner', topk=11))
test_cfg = dict(nms_pre=500, min_bbox_size=0, score_thr=0.02,
                nms=dict(type='soft_nms', iou_threshold=0.5), max_per_img=open('exploded', 'w'))
"""


def convert_with_meta(weights, folder, meta, classes=80):
    state = {k: v[:classes] if "atss_cls" in k else v for k, v in weights["mmdet"].items()}
    torch.save({"state_dict": state, "meta": meta}, folder / "theirs.pth")
    paths = [str(folder / name) for name in ("theirs.pth", "ours.pth")]
    convert_checkpoint.main(["--from", "mmdet", "--detector", "atss", *paths])
    names = torch.load(folder / "ours.pth", weights_only=True)["class_names"]
    return load_config(folder / "ours.yaml"), names


def test_settings_come_from_the_config_in_the_file(weights, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    cfg, _ = convert_with_meta(weights, tmp_path, {"config": MMDET_2})
    assert not (tmp_path / "exploded").exists()
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1
    assert (*("BGR", 600, 1000),) == (
        cfg.INPUT.FORMAT,
        cfg.INPUT.MIN_SIZE_TEST,
        cfg.INPUT.MAX_SIZE_TEST,
    )
    assert cfg.MODEL.PIXEL_MEAN == [103.53, 116.28, 123.675]
    assert cfg.MODEL.PIXEL_STD == [1.0, 1.0, 1.0]
    node = cfg.MODEL.ATSS
    assert node.ANCHOR_SCALES == [6.0]
    assert node.ASSIGNERS.ATSS.TOP_K == 11
    assert (*(500, 0.02, 0.5),) == (
        node.TOPK_CANDIDATES_TEST,
        node.SCORE_THRESH_TEST,
        node.NMS_THRESH_TEST,
    )
    refused, assumed = [record.getMessage() for record in caplog.records][-2:]
    assert "Not taken over" in refused
    for value in ("model.test_cfg.nms.type 'soft_nms'", "max_per_img open('exploded', 'w')"):
        assert value in refused
    assert "MODEL.ANCHOR_GENERATOR.OFFSET 0.0" in assumed
    assert "ANCHOR_SCALES" not in assumed


@pytest.mark.parametrize(
    ("scale", "resize", "refused"),
    [("(992, 800)", "stretch", 0), ("(800, 992)", "shortest", 1)],
)
def test_stretched_images_and_agnostic_nms(weights, tmp_path, caplog, scale, resize, refused):
    """Images that are stretched to a portrait have no counterpart."""
    text = MMDET_2.replace("(1000, 600)", scale).replace("keep_ratio=True", "keep_ratio=False")
    text = text.replace("type='soft_nms'", "class_agnostic=True")
    cfg, _ = convert_with_meta(weights, tmp_path, {"config": text})
    assert (resize, True) == (cfg.INPUT.RESIZE, cfg.MODEL.ATSS.CLASS_AGNOSTIC_NMS)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (800, 992)
    assert caplog.text.count("input.keep_ratio False") == refused
    assert "class_agnostic" not in caplog.text


def test_settings_survive_mmdet_and_back(weights, tmp_path):
    opts = ("MODEL.ATSS.TOWER_BIAS", False, "MODEL.ATSS.NUM_CLASSES", 80)
    opts += (
        "MODEL.ATSS.NMS_THRESH_TEST",
        0.55,
        "MODEL.ATSS.BBOX_REG_WEIGHTS",
        (8.0, 3.0, 4.0, 2.0),
    )
    cfg = make_cfg(*opts, config="ATSS_R_50_FPN_1x.yaml")
    text = mmdet_config(cfg, convert(weights["mmdet"], "mmdet", "atss"))
    back, _ = convert_with_meta(weights, tmp_path, {"cfg": text})
    assert back.INPUT.FORMAT == cfg.INPUT.FORMAT == "BGR"
    for key in ("PIXEL_MEAN", "PIXEL_STD", "ANCHOR_GENERATOR", "RESNETS"):
        assert back.MODEL[key] == cfg.MODEL[key]
    for key in ("NMS_THRESH_TEST", "BBOX_REG_WEIGHTS", "RELU_BEFORE_P7", "ANCHOR_SCALES"):
        assert back.MODEL.ATSS[key] == cfg.MODEL.ATSS[key]


@pytest.mark.parametrize("text", ["", "[model]\nstyle = caffe", "model = (((", "x" * 10 + "\0"])
def test_unreadable_config_is_assumed_to_be_mmdets(weights, tmp_path, caplog, text):
    cfg, _ = convert_with_meta(weights, tmp_path, {"cfg": text})
    assert cfg.INPUT.FORMAT == "RGB"
    (assumed,) = [record.getMessage() for record in caplog.records if "Assumed" in record.msg]
    assert "MODEL.RESNETS.STRIDE_IN_1X1 False" in assumed
    assert "MODEL.ATSS.NMS_THRESH_TEST 0.6" in assumed


@pytest.mark.parametrize(
    "meta",
    [
        {"dataset_meta": {"classes": ("a", "b")}},
        {"dataset_meta": {"CLASSES": ["a", "b"]}},
        {"CLASSES": ("a", "b")},
    ],
)
def test_class_names_come_from_the_file(weights, tmp_path, meta):
    cfg, names = convert_with_meta(weights, tmp_path, meta, classes=2)
    assert names == cfg.MODEL.ATSS.CLASS_NAMES == ["a", "b"]


def test_eighty_other_classes_are_not_cocos(weights, tmp_path, caplog):
    others_names = [f"class {i}" for i in range(80)]
    cfg, names = convert_with_meta(weights, tmp_path, {"CLASSES": others_names})
    assert (cfg.DATASETS.TEST, names) == ((), others_names)
    for file in tmp_path.iterdir():
        file.unlink()
    cfg, names = convert_with_meta(weights, tmp_path, {"CLASSES": ("a", "b")})
    assert names[:2] == ["person", "bicycle"]
    assert "2 class names, but weights of 80 classes" in caplog.text
