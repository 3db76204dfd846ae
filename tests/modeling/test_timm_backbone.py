"""Backbones of timm: maps, weights, frozen parts, messages."""

import argparse
import io
import logging
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_cfg, make_input
from detectron2.modeling import build_backbone, build_model
from PIL import Image
from torch.nn.modules.batchnorm import _BatchNorm

from atss import load_config
from atss.checkpoints import SafeCheckpointer
from atss.modeling import pretrained, timm_backbone
from atss.modeling.timm_backbone import TimmBackbone, pixels_of

timm = pytest.importorskip("timm")
safetensors_torch = pytest.importorskip("safetensors.torch")

RECIPE = "ATSS_lite0_FPN_fine_tune.yaml"
MODELS = {
    "tf_efficientnet_lite0": (40, 112, 320),
    "resnet18": (128, 256, 512),
    "convnext_atto": (80, 160, 320),
    "mobilenetv3_small_100": (24, 48, 576),
    "mobilenetv2_w1": (32, 96, 320),
    "swin_tiny_patch4_window7_224": (192, 384, 768),
}


@pytest.fixture(scope="module")
def lite0() -> dict[str, torch.Tensor]:
    return pretrained.load_pretrained("tf_efficientnet_lite0")


def random_weights(name: str) -> dict[str, torch.Tensor]:
    """Random weights of the whole model."""
    torch.manual_seed(1)
    state = timm.create_model(name).state_dict()
    return {k: torch.rand_like(v) + 0.5 if v.is_floating_point() else v for k, v in state.items()}


def statistics(module: torch.nn.Module) -> list[torch.Tensor]:
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    return [x.clone() for m in norms for x in (m.running_mean, m.running_var)]


@pytest.mark.parametrize("name", MODELS)
def test_maps_of_every_family(name):
    """Strides and channels as they say, whatever the layout inside and the size of the image;
    gradients reach the first layer."""
    backbone = TimmBackbone(name)
    image = torch.randn(2, 3, 96, 160)
    maps = backbone(image)
    shapes = backbone.output_shape()
    assert list(maps) == list(shapes) == ["s8", "s16", "s32"]
    for (key, x), stride, channels in zip(maps.items(), (8, 16, 32), MODELS[name], strict=True):
        assert shapes[key].stride == stride
        assert x.shape == (2, shapes[key].channels, 96 // stride, 160 // stride)
        assert shapes[key].channels == channels
    sum(x.square().mean() for x in maps.values()).backward()
    assert next(backbone.parameters()).grad.abs().max() > 0
    assert backbone.size_divisibility == 32


def test_nhwc_maps_have_the_right_axes():
    """The left of a Swin's map is the left of the image."""
    backbone = TimmBackbone("swin_tiny_patch4_window7_224").eval()
    left, right = torch.zeros(1, 3, 64, 448), torch.zeros(1, 3, 64, 448)
    left[..., :32] = 3.0
    right[..., -32:] = 3.0
    with torch.no_grad():
        plain = backbone(torch.zeros(1, 3, 64, 448))["s8"]
        changed = [
            (backbone(x)["s8"] - plain).abs().sum(dim=(0, 1, 2)).argmax() for x in (left, right)
        ]
    assert changed[0] < 28 <= changed[1]


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_100", "resnet18"])
def test_weights_of_a_file_are_loaded(name, tmp_path):
    weights = random_weights(name)
    file = tmp_path / "w.safetensors"
    safetensors_torch.save_file(weights, file)
    backbone = TimmBackbone(name, weights=pretrained.load_pretrained(name, str(file))).eval()
    whole = timm.create_model(name).eval()
    whole.load_state_dict(weights)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = whole.forward_intermediates(image, intermediates_only=True)[-1]
        found = backbone(image)["s32"]
    # mobilenetv3's last map is taken before the head of its classifier.
    if found.shape == wanted.shape:
        torch.testing.assert_close(found, wanted)
    stem, stem_of_whole = next(backbone.parameters()), next(whole.parameters())
    assert torch.equal(stem, stem_of_whole)


def test_weights_of_a_package_need_no_hub(lite0, real_data):
    """Its names differ from timm's, its order does not: jellyfish are jellyfish (class 107)."""
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(lite0)
    root = real_data / "aquarium" / "valid"
    found = []
    for labels in sorted(root.glob("labels/*.txt")):
        if {line.split()[0] for line in labels.read_text().splitlines()} == {"1"}:
            image = Image.open(root / "images" / f"{labels.stem}.jpg").resize((256, 256))
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
            with torch.no_grad():
                found.append(int(model(pixels[None]).argmax()))
    assert found.count(107) > len(found) / 2


def test_a_missing_weight_is_named(lite0):
    without = {k: v for k, v in lite0.items() if k != "blocks.3.1.bn2.running_var"}
    with pytest.raises(
        ValueError, match=r"1 of .* are not in the file, such as blocks\.3\.1\.bn2\.run"
    ):
        TimmBackbone("tf_efficientnet_lite0", weights=without)


def test_weights_of_other_names_are_refused(lite0):
    """timm would ignore them and train from scratch."""
    foreign = {f"encoder.{k}": v for k, v in random_weights("resnet18").items()}
    with pytest.raises(ValueError, match="are not in the file, such as"):
        TimmBackbone("tf_efficientnet_lite0", weights=foreign)


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_files_are_read_without_executing_code(tmp_path, capfd):
    torch.save({"conv_stem.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth contains more than weights \(it asks for p"):
        pretrained.read_pretrained(str(tmp_path / "evil.pth"))
    assert "executed" not in capfd.readouterr().out
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0")
    with pytest.raises(ValueError, match=r"cut\.safetensors is no checkpoint, or is damaged"):
        pretrained.read_pretrained(str(tmp_path / "cut.safetensors"))


@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
def test_a_checkpoint_of_timm_training_is_read(prefix, tmp_path):
    weights = random_weights("resnet18")
    args = argparse.Namespace(model="resnet18", output=Path("output"))
    theirs = {f"{prefix}{name}": x for name, x in weights.items()}
    content = {"state_dict": theirs, "epoch": 3, "args": args, "metric": np.float64(0.7)}
    torch.save(content, tmp_path / "w.pth")
    backbone = TimmBackbone("resnet18", weights=pretrained.read_pretrained(str(tmp_path / "w.pth")))
    for name, x in backbone.net.state_dict().items():
        assert torch.equal(x, weights[name]), name


def test_without_network_the_error_names_the_key(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"timm/resnet18\.a1_in1k are not on this machine and can"):
        pretrained.find_pretrained("resnet18.a1_in1k")


def test_hf_hub_offline_makes_no_request(monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *x, **how: asked.append(x))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", asked.append)
    with pytest.raises(ValueError, match=r"cannot be downloaded from \S+ \(HF_HUB_OFFLINE is"):
        pretrained.find_pretrained("resnet18.a1_in1k")
    assert not asked


def test_a_missing_file_and_an_unknown_model_are_named():
    with pytest.raises(ValueError, match=r"MODEL\.TIMM\.WEIGHTS nowhere\.pth does not exist"):
        pretrained.find_pretrained("resnet18", "nowhere.pth")
    with pytest.raises(ValueError, match=r"'resnet_18': timm has no such model; did you mean"):
        TimmBackbone("resnet_18")


def test_a_plain_vit_is_refused():
    with pytest.raises(ValueError, match=r"maps of strides \[16\], not of \[8, 32\]: choose a mo"):
        TimmBackbone("vit_tiny_patch16_224")


def test_missing_timm_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"needs timm: pip install 'atss-detectron2\[timm\]'"):
        TimmBackbone("resnet18")


@pytest.mark.parametrize("kept", [True, False])
def test_statistics_are_kept_or_measured(lite0, kept):
    """Scales and shifts are trained either way, and `train` after `eval` changes nothing."""
    backbone = TimmBackbone("tf_efficientnet_lite0", weights=lite0, freeze_statistics=kept)
    backbone.eval().train()
    before = statistics(backbone)
    backbone(torch.randn(2, 3, 64, 64))["s32"].sum().backward()
    after = statistics(backbone)
    assert all(map(torch.equal, before, after)) == kept
    assert backbone.net.bn1.weight.grad is not None


def test_layers_before_a_stride_are_frozen(lite0):
    backbone = TimmBackbone("tf_efficientnet_lite0", weights=lite0, freeze_at=2)
    frozen = {n for n, p in backbone.net.named_parameters() if not p.requires_grad}
    starts = ("conv_stem", "bn1", "blocks.0", "blocks.1")
    assert frozen == {n for n, _ in backbone.net.named_parameters() if n.startswith(starts)}
    before = statistics(backbone.net.blocks[1]), statistics(backbone.net.blocks[2])
    backbone(torch.randn(2, 3, 64, 64))
    assert all(map(torch.equal, before[0], statistics(backbone.net.blocks[1])))
    assert not any(map(torch.equal, before[1], statistics(backbone.net.blocks[2])))
    with pytest.raises(ValueError, match=r"FREEZE_AT 1 needs a map of stride 2, but the maps"):
        TimmBackbone("convnext_atto", freeze_at=1)


def test_the_recipe_loads_and_detects():
    cfg = make_cfg(config=RECIPE)
    model = build_model(cfg).train()
    losses = model([make_input([[20, 20, 90, 80]], [1])])
    sum(losses.values()).backward()
    assert model.pixel_mean.flatten().tolist() == [127.5] * 3
    assert model.input_format == "RGB"
    wanted = pretrained.load_pretrained("tf_efficientnet_lite0")
    assert torch.equal(model.backbone.bottom_up.net.conv_stem.weight, wanted["conv_stem.weight"])


def test_weights_of_a_whole_detector_come_first(monkeypatch):
    """Then the hub is not asked, be it there or not; statistics stay kept."""
    monkeypatch.setattr(pretrained, "load_pretrained", None)
    cfg = make_cfg("MODEL.WEIGHTS", "model_final.pth", config=RECIPE)
    backbone = build_backbone(cfg).train()
    assert not backbone.bottom_up.net.bn1.training


def test_random_weights_are_trained_whatever_the_config_says(caplog):
    """Norms with the statistics that they begin with would normalise nothing."""
    cfg = make_cfg("MODEL.TIMM.PRETRAINED", False, config=RECIPE)
    with caplog.at_level(logging.WARNING):
        backbone = build_backbone(cfg).train()
    assert backbone.bottom_up.net.bn1.training
    assert all(p.requires_grad for p in backbone.parameters())
    assert "begins with random weights" in caplog.text


def test_pixel_mean_and_std_are_from_timm():
    assert pixels_of("resnet18")[0] == "RGB"
    assert pixels_of("resnet18")[1] == pytest.approx([123.675, 116.28, 103.53])
    cfg = load_config(f"configs/{RECIPE}", opts=["MODEL.TIMM.NAME", "resnet18"])
    found = cfg.MODEL.PIXEL_STD
    assert found == pytest.approx([58.395, 57.12, 57.375])


def test_other_pixels_are_refused():
    cfg = make_cfg("INPUT.FORMAT", "BGR", config=RECIPE)
    with pytest.raises(
        ValueError, match=r"MODEL\.TIMM\.PIXELS True requires INPUT\.FORMAT RGB, MODEL\.PI"
    ):
        build_backbone(cfg)
    cfg.MODEL.TIMM.PIXELS = False
    build_backbone(cfg)


def test_maps_are_named_by_strides():
    cfg = make_cfg("MODEL.FPN.IN_FEATURES", ["res3", "s16"], config=RECIPE)
    with pytest.raises(ValueError, match=r"names \['res3'\]: name maps of timm by stride"):
        build_backbone(cfg)


def test_unused_classifier_weights_give_no_warning(lite0, caplog):
    TimmBackbone("tf_efficientnet_lite0", weights=lite0)
    assert "conv_head" not in caplog.text


def test_a_hub_that_answers_404_is_used(monkeypatch):
    """The root of a mirror may answer 404."""

    def answer(url, timeout):
        raise urllib.error.HTTPError(url, 404, "Not Found", {}, io.BytesIO())

    asked = []
    monkeypatch.setattr(urllib.request, "urlopen", answer)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *x: asked.append(x) or "file")
    path, credit = pretrained.find_pretrained("resnet18.a1_in1k")
    assert (path, asked) == ("file", [("timm/resnet18.a1_in1k", "model.safetensors")])
    assert credit == "weights timm/resnet18.a1_in1k, licence apache-2.0"


def test_each_weight_matches_one_tensor():
    """Untrained statistics are all equal."""
    torch.manual_seed(0)
    fresh = timm.create_model("resnet18").state_dict()
    without = {k: v for k, v in fresh.items() if k != "layer2.0.bn1.running_var"}
    with pytest.raises(ValueError, match=r"1 of .* are not in the file"):
        TimmBackbone("resnet18", weights=without)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("resnet18.typo", r"Invalid pretrained tag .*choose from \[.*'a1_in1k'"),
        (
            "inception_v4",
            r"maps of inception_v4 for an image of 352 x 352 must .* got \[\(41, 41\)",
        ),
        ("maxvit_tiny_tf_224", r"does not accept all image sizes, such as 352 x 352: height"),
    ],
)
def test_unsuitable_models_are_refused(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        TimmBackbone(name)


def test_unused_parameters_are_frozen():
    """Processes would wait for its gradients."""
    backbone = TimmBackbone("hrnet_w18_small")
    sum(x.sum() for x in backbone(torch.randn(2, 3, 64, 64)).values()).backward()
    trained = [p for p in backbone.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    assert len(trained) < len([*backbone.parameters()])


@pytest.mark.parametrize(
    ("name", "share"),
    [("tf_efficientnet_lite0", 0.24), ("hrnet_w18_small", 0.65)],
)
def test_unused_modules_are_removed(name, share):
    """Maps stay as they are to the last bit, and older checkpoints, which hold it, are loaded."""
    reductions = timm.create_model(name, features_only=True).feature_info.reduction()
    indices = [reductions.index(stride) for stride in (8, 16)]
    whole = timm.create_model(name, features_only=True, out_indices=indices)
    state = whole.state_dict()
    for value in state.values():
        value.copy_(torch.rand(value.shape))
    backbone = TimmBackbone(name, (8, 16))
    backbone.load_state_dict({f"net.{k}": v for k, v in state.items()})
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps, wanted = backbone.eval()(image).values(), whole.eval()(image)
    assert all(map(torch.equal, maps, wanted))
    held, before = (sum(x.numel() for x in m.parameters()) for m in (backbone, whole))
    assert held < share * before
    with pytest.raises(RuntimeError, match=r"Unexpected key.*net\.other"):
        backbone.load_state_dict({**backbone.state_dict(), "net.other": torch.zeros(1)})


class Doubling(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return 2 * x


class DoubledMaps(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.doubling = torch.nn.Conv2d(3, 4, 8, stride=8), Doubling()
        self.unused = torch.nn.Conv2d(4, 4, 1)

    def forward(self, image):
        return [self.doubling(self.stem(image))]


def test_a_module_that_a_map_depends_on_stays():
    """Even if no map depends on its parameters."""
    with torch.device("meta"):
        net = DoubledMaps()
    needed = timm_backbone._try(net, "doubled maps", [8])
    assert needed == {"stem.weight", "stem.bias"}
    assert timm_backbone._prune(net, needed, "doubled maps", [8]) == ["unused"]


def test_weights_of_a_detector_with_another_backbone_are_refused(tmp_path):
    """Frozen parts without weights would stay random."""
    other = ("MODEL.TIMM.NAME", "resnet18", "MODEL.TIMM.PRETRAINED", False)
    cfg = make_cfg(*other, "MODEL.TIMM.PIXELS", False, config=RECIPE)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "resnet.pth")
    cfg = make_cfg("MODEL.WEIGHTS", str(tmp_path / "resnet.pth"), config=RECIPE)
    checkpointer = SafeCheckpointer(build_model(cfg))
    with pytest.raises(ValueError, match=r"resnet\.pth has no weights for \d+ parts of the backb"):
        checkpointer.load(cfg.MODEL.WEIGHTS)


def test_pixels_that_were_typed_are_not_overwritten():
    with pytest.raises(ValueError, match=r"MODEL\.TIMM\.PIXELS True requires INPUT\.FORMAT RGB"):
        load_config(f"configs/{RECIPE}", opts=["INPUT.FORMAT", "BGR"])
    load_config(f"configs/{RECIPE}", opts=["INPUT.FORMAT", "RGB"])
