"""mmdet's detectors with random weights, converted: outputs equal those of mmdet 3.3.0, and weights
convert back."""

import json
import runpy
import shutil
from functools import partial
from importlib.util import find_spec

import convert_checkpoint
import demo
import numpy as np
import pytest
import recipe
import torch
from benchmarks.peers import import_mmdet
from conftest import GOLDEN, make_cfg, make_input
from detections import compare
from detectron2.modeling import build_model
from PIL import Image
from torch import nn
from torchvision.ops import DeformConv2d, deform_conv2d

from atss import load_config
from atss.checkpoints import (
    ConversionError,
    config_for,
    convert,
    load,
    mmdet_config,
    to_mmdet,
)
from atss.checkpoints.detectors import DETECTORS, detector_of
from atss.checkpoints.names import mmdet_rules, rename

SHAPES = json.loads((GOLDEN / "mmdet_successors_r50_shapes.json").read_text())
# Heads whose output differs from ours: (classes, box regression, ...) as in mmdet.
OUTPUTS = {"vfnet": lambda found: (found["fine"].classes, found["fine"].box_regression.exp())}
LOSSES = {
    "loss_box_reg": "loss_bbox",
    "loss_overlap": "loss_iou",
    "box/loss_box_reg": "loss_bbox",
    "box/loss_overlap": "loss_iou",
}
OF_VFNET = {"coarse/loss_box_reg": "loss_bbox", "loss_box_reg": "loss_bbox_rf"}
TEXT = "model = dict(type='{0}', bbox_head=dict(\n    type='{0}Head', num_classes=80))"


def weights_of(detector):
    """Return the weights of the reference: except for the key, the same numbers for each
    detector."""
    state = {k: torch.from_numpy(v) for k, v in recipe.weights(SHAPES[detector]).items()}
    theirs = DETECTORS[detector].predictors["cls_score"]
    state[f"bbox_head.{theirs}.bias"] -= 2
    return state


def reference_of(name):
    """Return mmdet's results by name."""
    found = np.load(GOLDEN / "mmdet_successors_r50.npz")
    prefix = f"{name}/"
    return {k.removeprefix(prefix): found[k] for k in found if k.startswith(prefix)}


@pytest.fixture(scope="module", params=SHAPES)
def converted(request, tmp_path_factory):
    """Convert a file with the tool, which finds the detector: the folder with ours.pth and
    ours.yaml; the model; mmdet's results; the detector."""
    detector, folder = request.param, tmp_path_factory.mktemp("converted")
    text = TEXT.format(DETECTORS[detector].head.removesuffix("Head"))
    if detector.startswith("tood"):
        text += f"anchor_type='anchor_{'based' if detector == 'tood_anchor' else 'free'}'"
    content = {"state_dict": weights_of(detector), "meta": {"cfg": text}}
    torch.save(content, folder / "theirs.pth")
    paths = [str(folder / name) for name in ("theirs.pth", "ours.pth")]
    convert_checkpoint.main(["--from", "mmdet", *paths])
    (folder / "theirs.pth").unlink()
    cfg = load_config(folder / "ours.yaml")
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    model.load_state_dict(load(paths[1]))
    found = np.load(GOLDEN / "mmdet_successors_r50.npz")
    example = make_input(found["gt_boxes"], found["gt_classes"], (160, 224))
    example["image"] = torch.from_numpy(found["image_rgb"])
    yield folder, model, example, reference_of(detector), detector
    shutil.rmtree(folder)


def test_head_outputs_equal_mmdets(converted):
    _, model, example, reference, detector = converted
    with torch.no_grad():
        images = model.preprocess_image([example])
        features = model.backbone(images.tensor)
        output = model.head([features[name] for name in model.head_in_features])
    parts = OUTPUTS.get(detector, lambda found: found[:3])(output)
    ours = [x for x in parts if x is not None]
    kinds = {k.split("_")[0] for k in reference if k.startswith("out")}
    assert len(ours) == len(kinds)
    for j, x in enumerate(ours):
        maps = [reference[f"out{j}_{level}"] for level in range(5)]
        expected = np.concatenate([m.reshape(len(m), -1).T for m in maps])
        found = x[0].reshape(len(expected), -1).numpy()
        assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


def assert_learns_as(model, example, reference, detector):
    losses = model.train()([example])
    values = dict(zip(reference["loss_names"], reference["loss_values"], strict=True))
    names = OF_VFNET if detector == "vfnet" else LOSSES
    assert {names.get(name, name) for name in losses} == {*values}
    for name, value in losses.items():
        assert value.item() == pytest.approx(values[names.get(name, name)], rel=1e-3)

    model.zero_grad()
    sum(losses.values()).backward()
    parameters = dict(model.named_parameters())
    ours, unknown = rename([*reference["grad_names"]], mmdet_rules(DETECTORS[detector].predictors))
    assert not unknown
    for key, norm in zip(reference["grad_names"], reference["grad_norms"], strict=True):
        name = ours[key]
        if name not in parameters:  # of a deformable layer
            name = name.replace(".weight", ".conv.weight")
        found = parameters[name].grad.norm().item()
        assert found == pytest.approx(norm, rel=1e-2, abs=1e-5), key


def test_losses_and_gradients_equal_mmdets(converted):
    _, model, example, reference, detector = converted
    assert_learns_as(model, example, reference, detector)


def test_warm_up_losses_equal_mmdets(converted):
    """TOOD's first epochs, which the config of its weights lacks."""
    folder, _, example, _, detector = converted
    reference = reference_of(f"{detector}_first")
    if not reference:
        pytest.skip("learns in one way from its beginning to its end")
    row = make_cfg(config=f"{DETECTORS[detector].row}.yaml").MODEL.ATSS
    cfg = load_config(folder / "ours.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ATSS.PHASES, cfg.MODEL.ATSS.BRANCH = row.PHASES, row.BRANCH
    young = build_model(cfg)
    assert len(young.branches["main"].phases) == 2
    young.load_state_dict(load(folder / "ours.pth"))
    assert_learns_as(young, example, reference, detector)


def test_detections_equal_mmdets(converted):
    _, model, example, reference, _ = converted
    with torch.no_grad():
        found = model.eval()([example])[0]["instances"]
    compare(
        *(found.pred_boxes.tensor.numpy(), found.scores.numpy(), found.pred_classes.numpy()),
        *(reference[f"det_{x}"] for x in ("boxes", "scores", "classes")),
    )


def test_back_to_mmdet(converted, tmp_path):
    """Same numbers under the same names, and a config that identifies the detector."""
    folder, _, _, _, detector = converted
    argv = ["--to", "mmdet", "--config-file", str(folder / "ours.yaml")]
    convert_checkpoint.main([*argv, str(folder / "ours.pth"), str(tmp_path / "back.pth")])
    back, theirs = load(tmp_path / "back.pth"), weights_of(detector)
    settings = runpy.run_path(str(tmp_path / "back.py"))["model"]["bbox_head"]
    layers = {x.split(".")[2] for x in theirs if "cls_convs" in x or "inter_convs" in x}
    assert settings["stacked_convs"] == len(layers)
    assert {*back} == {*theirs}
    for name, value in theirs.items():
        assert torch.equal(back[name], value), name
    convert_checkpoint.main(
        ["--from", "mmdet", *map(str, (tmp_path / "back.pth", tmp_path / "x.pth"))]
    )
    again, ours = load(tmp_path / "x.pth"), load(folder / "ours.pth")
    assert {*again} == {*ours}
    assert all(torch.equal(again[k], ours[k]) for k in ours)
    first, second = ((p / n).read_text() for p, n in ((folder, "ours.yaml"), (tmp_path, "x.yaml")))
    assert first.replace(str(folder / "ours.pth"), "") == second.replace(
        str(tmp_path / "x.pth"), ""
    )


def test_demo_draws_their_detections(converted, tmp_path):
    folder, _, example, reference, _ = converted
    Image.fromarray(example["image"].numpy().transpose(1, 2, 0)).save(tmp_path / "image.png")
    argv = ["--config-file", str(folder / "ours.yaml"), "--weights", str(folder / "ours.pth")]
    argv += ["--input", str(tmp_path / "image.png")]
    argv += ["--output", str(tmp_path / "out"), "--score-threshold", "0.0"]
    demo.main([*argv, "INPUT.MIN_SIZE_TEST", "160"])
    records = json.loads((tmp_path / "out" / "detections.json").read_text())
    scores = sorted((x["score"] for x in records), reverse=True)
    np.testing.assert_allclose(scores, np.sort(reference["det_scores"])[::-1], atol=1e-3)


def test_detector_follows_from_names_or_config():
    assert detector_of(SHAPES["gfl"]) == "gfl"
    assert detector_of(SHAPES["gfl"], TEXT.format("ATSS")) == "gfl"
    assert detector_of(SHAPES["paa"], TEXT.format("PAA")) == "paa"
    assert detector_of(SHAPES["paa"], TEXT.format("ATSS")) == "atss"
    assert detector_of(SHAPES["paa"], "{'bbox_head': {'type': \"PAAHead\"}}") == "paa"
    assert detector_of(SHAPES["paa"], "[model.bbox_head]\ntype = 'ATSSHead'") == "atss"
    lazy = "type='mmdet.models.dense_heads.paa_head.PAAHead'"
    assert detector_of(SHAPES["paa"], lazy) == "paa"
    both = TEXT.format("ATSS") + TEXT.format("PAA")
    for text in ("", both, "model = dict(type='RetinaNet')"):
        with pytest.raises(ConversionError, match=r"atss and paa have the same names, .*--dete"):
            detector_of(SHAPES["paa"], text)
    strange = [x.replace("atss_centerness", "atss_mask") for x in SHAPES["paa"]]
    with pytest.raises(ConversionError, match=r"unknown predictors \['atss_cls', 'atss_mask', 'at"):
        detector_of(strange, TEXT.format("ATSS"))


def test_weights_of_another_detector_are_refused(tmp_path):
    def convert_as(detector, *given, config=""):
        content = {"state_dict": weights_of(detector), "meta": {"config": config}}  # as of mmdet 2
        torch.save(content, tmp_path / "in.pth")
        paths = [str(tmp_path / "in.pth"), str(tmp_path / "out.pth")]
        convert_checkpoint.main(["--from", "mmdet", *given, *paths])
        cfg = load_config(tmp_path / "out.yaml")
        for name in ("out.pth", "out.yaml"):
            (tmp_path / name).unlink()
        return cfg.MODEL.ATSS

    for detector, given in (("gfl", "atss"), ("gfl", "paa"), ("paa", "gfl")):
        with pytest.raises(SystemExit, match=f"expected weights of {given}, got names of mmdet's"):
            convert_as(detector, "--detector", given)
    with pytest.raises(SystemExit, match="expected weights of paa, got mmdet's atss in the file"):
        convert_as("paa", "--detector", "paa", config=TEXT.format("ATSS"))
    with pytest.raises(SystemExit, match="choose one with --detector"):
        convert_as("paa")
    assert [x.name for x in tmp_path.iterdir()] == ["in.pth"]
    for given, config in ((("--detector", "paa"), ""), ((), TEXT.format("PAA"))):
        node = convert_as("paa", *given, config=config)
        assert (node.SUPPRESSION, node.SCORE) == ("score_vote", "sqrt")
        assert node.NORMALISER_PER_IMAGE
        assert node.BOX_NORMALISER_MIN < 1
    node = convert_as("paa", "--detector", "atss")
    assert (node.SUPPRESSION, node.SCORE) == ("nms", "product")
    assert not node.NORMALISER_PER_IMAGE
    assert node.BOX_NORMALISER_MIN == 1


def config_for_mmdet(cfg, classes=80):
    """Evaluate the printed Python; the number of classes comes from the weights."""
    found = {}
    exec(mmdet_config(cfg, {"head.cls_score.bias": torch.zeros(classes)}), found)
    return found["model"]


def test_config_for_mmdet_has_every_value():
    """For a model in which no two values are equal."""
    opts = ("MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0], "MODEL.PIXEL_STD", [4.0, 5.0, 6.0])
    opts += ("INPUT.FORMAT", "RGB", "MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, False, True])
    opts += ("MODEL.RESNETS.DEFORM_NUM_GROUPS", 2, "MODEL.FPN.OUT_CHANNELS", 128)
    opts += ("MODEL.ATSS.NUM_CONVS", 3, "MODEL.ATSS.RELU_BEFORE_P7", False)
    opts += ("MODEL.ATSS.ANCHOR_SCALES", [6.0], "MODEL.ATSS.ANCHOR_RATIOS", [0.25])
    opts += ("MODEL.ANCHOR_GENERATOR.OFFSET", 0.125)
    opts += ("MODEL.ATSS.BBOX_REG_WEIGHTS", (8.0, 16.0, 4.0, 2.0), "MODEL.ATSS.DEFORM_TOWER", "")
    opts += ("MODEL.ATSS.TOPK_CANDIDATES_TEST", 345, "MODEL.ATSS.SCORE_THRESH_TEST", 0.07)
    opts += ("MODEL.ATSS.NMS_THRESH_TEST", 0.55, "TEST.DETECTIONS_PER_IMAGE", 77)
    cfg = make_cfg(*opts, config="ATSS_dcnv2_X_101_32x8d_FPN_2x.yaml")
    assert config_for_mmdet(cfg, 7) == {
        "data_preprocessor": {
            "mean": [1.0, 2.0, 3.0],
            "std": [4.0, 5.0, 6.0],
            "bgr_to_rgb": True,
        },
        "backbone": {
            "type": "ResNeXt",
            "depth": 101,
            "num_stages": 4,
            "strides": (1, 2, 2, 2),
            "dilations": (1, 1, 1, 1),
            "out_indices": (0, 1, 2, 3),
            "style": "pytorch",
            "init_cfg": None,
            "groups": 32,
            "base_width": 8,
            "dcn": {"type": "DCNv2", "deform_groups": 2, "fallback_on_stride": False},
            "stage_with_dcn": (False, True, False, True),
        },
        "neck": {
            "in_channels": [256, 512, 1024, 2048],
            "out_channels": 128,
            "start_level": 1,
            "add_extra_convs": "on_output",
            "relu_before_extra_convs": False,
            "num_outs": 5,
        },
        "bbox_head": {
            "type": "ATSSHead",
            "num_classes": 7,
            "in_channels": 128,
            "feat_channels": 128,
            "stacked_convs": 3,
            "anchor_generator": {
                "type": "AnchorGenerator",
                "ratios": [0.25],
                "octave_base_scale": 6.0,
                "scales_per_octave": 1,
                "strides": [8, 16, 32, 64, 128],
                "center_offset": 0.125,
            },
            "bbox_coder": {"target_stds": [0.125, 0.0625, 0.25, 0.5]},
        },
        "test_cfg": {
            "nms_pre": 345,
            "score_thr": 0.07,
            "nms": {"type": "nms", "iou_threshold": 0.55},
            "max_per_img": 77,
        },
    }


# Values of mmdet 3.3.0's configs of these detectors that differ between them.
STDS = {"bbox_coder": {"target_stds": [0.1, 0.1, 0.2, 0.2]}}
OF_VFNET_HEAD = {
    "type": "VFNetHead",
    "stacked_convs": 3,
    "dcn_on_last_conv": False,
    "strides": [8, 16, 32, 64, 128],
    "regress_ranges": ((-1, 64), (64, 128), (128, 256), (256, 512), (512, 1e8)),
}
OF_TOOD_HEAD = {"type": "TOODHead", "stacked_convs": 6, "num_dcn": 0}
FREE, BASED = {"anchor_type": "anchor_free"}, {"anchor_type": "anchor_based"}
DCN = {"dcn": {"type": "DCNv2", "deform_groups": 1, "fallback_on_stride": False}}
DCN["stage_with_dcn"] = (False, True, True, True)
PUBLISHED = {
    "ATSS_R_50_FPN_1x": ({"type": "ATSSHead", "stacked_convs": 4} | STDS, {}),
    "ATSS_R_101_FPN_1x": ({"type": "ATSSHead", "stacked_convs": 4} | STDS, {"depth": 101}),
    "successors/PAA_R_50_FPN_1x": (
        {"type": "PAAHead", "stacked_convs": 4, "score_voting": True} | STDS,
        {},
    ),
    "successors/GFL_R_50_FPN_1x": ({"type": "GFLHead", "stacked_convs": 4, "reg_max": 16}, {}),
    "successors/VFNet_R_50_FPN_1x": (OF_VFNET_HEAD, {}),
    "successors/VFNet_dcnv2_R_50_FPN_2x": (OF_VFNET_HEAD | {"dcn_on_last_conv": True}, DCN),
    "successors/TOOD_R_50_FPN_1x": (OF_TOOD_HEAD | FREE, {}),
    "successors/TOOD_anchor_R_50_FPN_1x": (OF_TOOD_HEAD | BASED | STDS, {}),
    "successors/TOOD_dcnv2_R_101_FPN_2x": (
        OF_TOOD_HEAD | FREE | {"num_dcn": 2},
        DCN | {"depth": 101},
    ),
    "successors/DDOD_R_50_FPN_1x": ({"type": "DDODHead", "stacked_convs": 4} | STDS, {}),
}


@pytest.mark.parametrize("row", PUBLISHED)
def test_configs_for_mmdet_equal_its_own(row):
    """Head and backbone, and pixels, strides and anchors, of mmdet's published weights."""
    opts = ("INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53])
    opts += ("MODEL.PIXEL_STD", [58.395, 57.12, 57.375], "MODEL.ANCHOR_GENERATOR.OFFSET", 0.0)
    opts += ("MODEL.RESNETS.STRIDE_IN_1X1", False)
    head, backbone = PUBLISHED[row]
    model = config_for_mmdet(make_cfg(*opts, config=f"{row}.yaml"))
    shared = {"num_classes": 80, "in_channels": 256, "feat_channels": 256}
    shared["anchor_generator"] = {
        "type": "AnchorGenerator",
        "ratios": [1.0],
        "octave_base_scale": 8,
        "scales_per_octave": 1,
        "strides": [8, 16, 32, 64, 128],
        "center_offset": 0.0,
    }
    assert model["bbox_head"] == shared | head
    plain = {"type": "ResNet", "depth": 50, "num_stages": 4, "out_indices": (0, 1, 2, 3)}
    plain |= {"strides": (1, 2, 2, 2), "dilations": (1, 1, 1, 1), "style": "pytorch"}
    assert model["backbone"] == plain | {"init_cfg": None} | backbone
    assert model["data_preprocessor"]["std"] == [58.395, 57.12, 57.375]


class Deformable(DeformConv2d):
    """mmcv's DCN and, with masks, DCNv2, which mmcv-lite lacks."""

    transposed, output_padding = False, (0, 0)  # mmcv requires it of a convolution

    def __init__(self, *args, deform_groups=1, masks=False, padding=1, **kwargs):
        super().__init__(*args, padding=padding, **kwargs)
        count = deform_groups * (27 if masks else 18)
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation)
        self.masks, self.conv_offset = masks, nn.Conv2d(self.in_channels, count, *geometry)

    def forward(self, x):
        offset = self.conv_offset(x)
        if not self.masks:
            return super().forward(x, offset)
        *offsets, mask = offset.chunk(3, dim=1)
        return super().forward(x, torch.cat(offsets, dim=1), mask.sigmoid())


@pytest.fixture
def mmdets(monkeypatch):
    """mmdet's registry of models, with operators of torchvision if mmcv has none."""
    pytest.importorskip("mmdet", reason="mmdet is not installed: pip install -e '.[peers]'")
    import_mmdet()
    from mmdet.models.dense_heads import tood_head, vfnet_head
    from mmdet.registry import MODELS

    if find_spec("mmcv._ext") is None:
        MODELS.register_module("DCN", force=True, module=Deformable)
        MODELS.register_module("DCNv2", force=True, module=partial(Deformable, masks=True))
        monkeypatch.setattr(vfnet_head, "DeformConv2d", partial(DeformConv2d, bias=False))
        monkeypatch.setattr(tood_head, "deform_conv2d", lambda *x: deform_conv2d(*x[:3]))
    return MODELS


# mmdet's config of each detector.
NAMED = {
    "atss": "atss/atss_r50_fpn_1x_coco",
    "paa": "paa/paa_r50_fpn_1x_coco",
    "gfl": "gfl/gfl_r50_fpn_1x_coco",
    "vfnet": "vfnet/vfnet_r50_fpn_1x_coco",
    "tood": "tood/tood_r50_fpn_1x_coco",
    "tood_anchor": "tood/tood_r50_fpn_anchor-based_1x_coco",
    "ddod": "ddod/ddod_r50_fpn_1x_coco",
}


@pytest.mark.slow
@pytest.mark.parametrize("detector", NAMED)
@pytest.mark.parametrize("levels", ["res2 res3 res4", "res3 res4 res5"])
def test_mmdet_builds_the_printed_config(mmdets, detector, levels):
    """mmdet's config of the detector with the printed changes detects as our model does: with
    pixels, anchors, box weights, stages and thresholds that are no defaults."""
    from mmdet.structures import DetDataSample
    from mmengine.hub import get_config
    from mmengine.registry import DefaultScope

    stages = [int(x[-1]) for x in levels.split()]
    opts = ("MODEL.FPN.IN_FEATURES", levels.split(), "MODEL.RESNETS.OUT_FEATURES", levels.split())
    opts += ("MODEL.ATSS.IN_FEATURES", [f"p{stages[0] + i}" for i in range(5)])
    opts += ("MODEL.PIXEL_MEAN", [90.0, 110.0, 130.0], "MODEL.PIXEL_STD", [50.0, 60.0, 70.0])
    opts += ("INPUT.FORMAT", "BGR", "MODEL.FPN.OUT_CHANNELS", 64, "MODEL.ATSS.TOWER_BIAS", False)
    opts += ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, False, True])
    opts += ("MODEL.RESNETS.DEFORM_MODULATED", True, "MODEL.RESNETS.NUM_GROUPS", 32)
    opts += ("MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.RESNETS.STRIDE_IN_1X1", False)
    opts += ("MODEL.ATSS.NUM_CONVS", 2, "MODEL.ATSS.RELU_BEFORE_P7", True)
    opts += ("MODEL.ANCHOR_GENERATOR.OFFSET", 0.5, "MODEL.ATSS.ANCHOR_RATIOS", [1.5])
    opts += ("MODEL.ATSS.BBOX_REG_WEIGHTS", (8.0, 16.0, 4.0, 2.0))
    opts += ("MODEL.ATSS.HEADS.TOODHead.NUM_DEFORM", 1, "MODEL.ATSS.TOPK_CANDIDATES_TEST", 60)
    opts += ("MODEL.ATSS.SCORE_THRESH_TEST", 0.1, "MODEL.ATSS.NMS_THRESH_TEST", 0.4)
    opts += ("TEST.DETECTIONS_PER_IMAGE", 30, "MODEL.ATSS.NUM_CLASSES", 5)
    theirs = DETECTORS[detector]
    opts += tuple(x for item in theirs.values.items() for x in item)
    cfg = make_cfg(*opts, config=f"{theirs.row}.yaml")
    model = build_model(cfg).eval()
    state = model.state_dict()
    state |= {
        k: torch.from_numpy(recipe.tensor(k, x.shape))
        for k, x in state.items()
        if x.is_floating_point() and "project" not in k
    }
    model.load_state_dict(state)

    config = get_config(f"mmdet::{NAMED[detector]}.py")
    config.merge_from_dict({"model": config_for_mmdet(cfg, 5)})
    with DefaultScope.overwrite_default_scope("mmdet"):
        other = mmdets.build(config.model).eval()
    weights = to_mmdet(state, cfg)
    assert {*other.state_dict()} == {*weights}
    other.load_state_dict(weights)
    example = make_input(hw=(160, 224))
    sample = DetDataSample(metainfo={"img_shape": (160, 224), "ori_shape": (160, 224)})
    sample.set_metainfo({"scale_factor": (1.0, 1.0)})
    batch = {"inputs": [example["image"]], "data_samples": [sample]}
    with torch.no_grad():
        ours = model([example])[0]["instances"]
        found = other(**other.data_preprocessor(batch), mode="predict")[0].pred_instances
    assert len(ours) > 5
    compare(
        *(ours.pred_boxes.tensor.numpy(), ours.scores.numpy(), ours.pred_classes.numpy()),
        *(found.bboxes.numpy(), found.scores.numpy(), found.labels.numpy()),
    )


def test_levels_of_vfnet_become_mmdets():
    """Its strides and ranges are arguments of their own."""
    levels = ["res2", "res3", "res4", "res5"]
    opts = ("MODEL.FPN.IN_FEATURES", levels, "MODEL.RESNETS.OUT_FEATURES", levels)
    opts += ("MODEL.ATSS.IN_FEATURES", [f"p{i}" for i in range(2, 8)])
    opts += ("MODEL.ATSS.TOWER_BIAS", False)
    cfg = make_cfg(*opts, config="successors/VFNet_R_50_FPN_1x.yaml")
    head = config_for_mmdet(cfg)["bbox_head"]
    assert head["strides"] == head["anchor_generator"]["strides"] == [4, 8, 16, 32, 64, 128]
    ends = [32, 64, 128, 256, 512]
    assert head["regress_ranges"] == (*zip([-1, *ends], [*ends, 1e8], strict=True),)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        theirs = to_mmdet(build_model(cfg).state_dict(), cfg)
    assert sum(".scales" in name for name in theirs) == 12


@pytest.mark.parametrize("name", ["VFNet_dcnv2_R_50_FPN_2x", "TOOD_dcnv2_R_101_FPN_2x"])
def test_deformable_layers_convert_both_ways(name):
    cfg = make_cfg(
        *("MODEL.ATSS.TOWER_BIAS", False, "MODEL.ATSS.NUM_CLASSES", 80),
        config=f"successors/{name}.yaml",
    )
    state = build_model(cfg).state_dict()
    theirs = to_mmdet(state, cfg)
    detector = "vfnet" if name.startswith("VFNet") else "tood"
    offsets = [x for x in theirs if x.startswith("bbox_head") and "conv_offset.weight" in x]
    assert len(offsets) == 2
    back = convert(theirs, "mmdet", detector)
    assert {*back} == {*state}
    assert all(torch.equal(back[k], state[k]) for k in state)
    wanted = config_for(back, "mmdet", detector=detector).MODEL
    assert wanted.ATSS.DEFORM_TOWER == cfg.MODEL.ATSS.DEFORM_TOWER
    assert wanted.ATSS.HEADS.TOODHead.NUM_DEFORM == cfg.MODEL.ATSS.HEADS.TOODHead.NUM_DEFORM
    assert wanted.RESNETS.DEFORM_ON_PER_STAGE == cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE


def test_ambiguous_weights_need_a_detector():
    state = weights_of("paa")
    ours = convert(state, "mmdet", "paa")
    for call in (
        lambda: convert(state, "mmdet"),
        lambda: convert(state, "mmdet", "gflv2"),
        lambda: config_for(ours, "mmdet"),
        lambda: config_for(ours, "mmdet", detector="gflv2"),
        lambda: config_for(ours, "official", detector="paa"),
        lambda: convert(state, "official", "paa"),
    ):
        with pytest.raises(ConversionError, match=r"--detector|\['atss'|mmdet's weights only"):
            call()


def test_alternatives_that_mmdet_supports(converted):
    """PAA without score voting is mmdet's; with the threshold on another score it is not."""
    folder, _, _, _, detector = converted
    weights, cfg = load(folder / "ours.pth"), load_config(folder / "ours.yaml")
    cfg.MODEL.ATSS.SUPPRESSION = "nms"
    cfg.MODEL.ATSS.QUALITY = "centerness"  # unused in inference
    found = {}
    exec(mmdet_config(cfg, weights), found)
    head = found["model"]["bbox_head"]
    assert head["type"] == DETECTORS[detector].head
    assert head.get("score_voting") == (False if detector == "paa" else None)
    assert head.get("reg_max") == (16 if detector == "gfl" else None)
    if detector == "paa":
        cfg.MODEL.ATSS.SCORE = "product"
        with pytest.raises(ConversionError, match=r"PAAHead has only .*SCORE .*, got 'product'"):
            mmdet_config(cfg, weights)


def test_options_of_the_other_direction_are_refused(capsys):
    for argv, message in (
        (["--from", "official", "--detector", "gfl"], "--detector is for --from mmdet"),
        (["--to", "mmdet", "--detector", "gfl"], "--detector is for --from mmdet"),
        (["--from", "mmdet", "--regression", "point"], "--regression is for --from official"),
    ):
        with pytest.raises(SystemExit):
            convert_checkpoint.main([*argv, "in.pth", "out.pth"])
        assert message in capsys.readouterr().err


def test_reg_max_follows_from_shapes():
    """mmdet's reg_max is in the shapes, not in the names."""
    state = weights_of("gfl")
    for kind in ("weight", "bias"):
        state[f"bbox_head.gfl_reg.{kind}"] = state[f"bbox_head.gfl_reg.{kind}"][:36]
    state["bbox_head.integral.project"] = torch.linspace(0, 8, 9)
    ours = convert(state, "mmdet", "gfl")
    cfg = config_for(ours, "mmdet", detector="gfl")
    assert cfg.MODEL.ATSS.REGRESSIONS.distribution.REG_MAX == 8
    back = to_mmdet(ours, cfg)
    assert torch.equal(back["bbox_head.integral.project"], state["bbox_head.integral.project"])
    del ours["head.bbox_pred.weight"]
    with pytest.raises(ConversionError, match=r"head\.bbox_pred\.weight.* is missing"):
        config_for(ours, "mmdet", detector="gfl")
