"""mmdet's detectors with made-up weights, from its files through the converter to our models: what
mmdet 3.3.0 computes with them, and the way back."""

import json
import runpy
import shutil

import convert_checkpoint
import demo
import numpy as np
import pytest
import recipe
import torch
from conftest import GOLDEN, make_cfg, make_input
from detectron2.modeling import build_model
from PIL import Image
from test_convert import compare

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
# Heads whose output is another than ours: (classes, numbers, ...) as mmdet has them.
SAID = {"vfnet": lambda found: (found["fine"].classes, found["fine"].numbers.exp())}
LOSSES = {
    "loss_box_reg": "loss_bbox",
    "loss_overlap": "loss_iou",
    "box/loss_box_reg": "loss_bbox",
    "box/loss_overlap": "loss_iou",
}
OF_VFNET = {"coarse/loss_box_reg": "loss_bbox", "loss_box_reg": "loss_bbox_rf"}
TEXT = "model = dict(type='{0}', bbox_head=dict(\n    type='{0}Head', num_classes=80))"


def weights_of(detector):
    """As its reference has them: but for the key, the same numbers for each."""
    state = {k: torch.from_numpy(v) for k, v in recipe.weights(SHAPES[detector]).items()}
    theirs = DETECTORS[detector].predictors["cls_score"]
    state[f"bbox_head.{theirs}.bias"] -= 2
    return state


def reference_of(name):
    """What mmdet computed, by what it is."""
    found = np.load(GOLDEN / "mmdet_successors_r50.npz")
    prefix = f"{name}/"
    return {k.removeprefix(prefix): found[k] for k in found if k.startswith(prefix)}


@pytest.fixture(scope="module", params=SHAPES)
def converted(request, tmp_path_factory):
    """From a file, by the tool, which finds out whose weights these are: the folder with ours.pth
    and ours.yaml; the model; what mmdet computed; its name."""
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
    said = SAID.get(detector, lambda found: found[:3])(output)
    ours = [x for x in said if x is not None]
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


def test_what_teaches_before_task_alignment_is_mmdets(converted):
    """TOOD's first epochs, which the config of its weights has no more."""
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
    """The same numbers under the same names, and a config from which their kind can be told."""
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


def test_the_demo_draws_what_they_find(converted, tmp_path):
    folder, _, example, reference, _ = converted
    Image.fromarray(example["image"].numpy().transpose(1, 2, 0)).save(tmp_path / "image.png")
    argv = ["--config-file", str(folder / "ours.yaml"), "--weights", str(folder / "ours.pth")]
    argv += ["--input", str(tmp_path / "image.png")]
    argv += ["--output", str(tmp_path / "out"), "--score-threshold", "0.0"]
    demo.main([*argv, "INPUT.MIN_SIZE_TEST", "160"])
    records = json.loads((tmp_path / "out" / "detections.json").read_text())
    scores = sorted((x["score"] for x in records), reverse=True)
    np.testing.assert_allclose(scores, np.sort(reference["det_scores"])[::-1], atol=1e-3)


def test_names_tell_the_detector_or_the_config_in_the_file_does():
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
    with pytest.raises(
        ConversionError, match=r"\['atss_cls', 'atss_mask', 'atss_reg'\], as in none"
    ):
        detector_of(strange, TEXT.format("ATSS"))


def test_one_detectors_weights_are_not_anothers(tmp_path):
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
        with pytest.raises(SystemExit, match=f"these are weights of mmdet's .*, not of {given}"):
            convert_as(detector, "--detector", given)
    with pytest.raises(SystemExit, match=r"config in the file says .* mmdet's atss, not paa"):
        convert_as("paa", "--detector", "paa", config=TEXT.format("ATSS"))
    with pytest.raises(SystemExit, match="say it by --detector"):
        convert_as("paa")
    assert [x.name for x in tmp_path.iterdir()] == ["in.pth"]
    for given, config in ((("--detector", "paa"), ""), ((), TEXT.format("PAA"))):
        node = convert_as("paa", *given, config=config)
        assert (node.SUPPRESSION, node.SCORE) == ("score_vote", "sqrt")
        assert node.NORMALISER_PER_IMAGE
        assert node.BOX_NORMALISER_LEAST < 1
    node = convert_as("paa", "--detector", "atss")
    assert (node.SUPPRESSION, node.SCORE) == ("nms", "product")
    assert not node.NORMALISER_PER_IMAGE
    assert node.BOX_NORMALISER_LEAST == 1


@pytest.mark.parametrize("name", ["VFNet_dcnv2_R_50_FPN_2x", "TOOD_dcnv2_R_101_FPN_2x"])
def test_deformable_layers_of_heads_go_there_and_back(name):
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


def test_in_python_too_somebody_has_to_say_which():
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
        with pytest.raises(ConversionError, match=r"--detector|\['atss'|mmdet's weights alone"):
            call()


def test_what_mmdet_can_do_as_well(converted):
    """Without score voting PAA is still mmdet's; with the threshold on another score it is not."""
    folder, _, _, _, detector = converted
    weights, cfg = load(folder / "ours.pth"), load_config(folder / "ours.yaml")
    cfg.MODEL.ATSS.SUPPRESSION = "nms"
    cfg.MODEL.ATSS.QUALITY = "centerness"  # which inference does not look at
    found = {}
    exec(mmdet_config(cfg, weights), found)
    head = found["model"]["bbox_head"]
    assert head["type"] == DETECTORS[detector].head
    assert head.get("score_voting") == (False if detector == "paa" else None)
    assert head.get("reg_max") == (16 if detector == "gfl" else None)
    if detector == "paa":
        cfg.MODEL.ATSS.SCORE = "product"
        with pytest.raises(ConversionError, match=r"PAAHead has nothing like .*SCORE 'product'"):
            mmdet_config(cfg, weights)


def test_options_of_the_other_direction_are_refused(capsys):
    for argv, said in (
        (["--from", "official", "--detector", "gfl"], "--detector is for --from mmdet"),
        (["--to", "mmdet", "--detector", "gfl"], "--detector is for --from mmdet"),
        (["--from", "mmdet", "--regression", "point"], "--regression is for --from official"),
    ):
        with pytest.raises(SystemExit):
            convert_checkpoint.main([*argv, "in.pth", "out.pth"])
        assert said in capsys.readouterr().err


def test_distributions_may_reach_another_distance():
    """mmdet's reg_max is not in the names, but in the shapes."""
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
