"""The recipe for fine-tuning, in whole runs on coloured squares."""

import json

import pytest
import torch
from conftest import ROOT
from detectron2.data import DatasetCatalog, MetadataCatalog
from trainings import assert_equal

import atss.engine.run as way_in
from atss.checkpoints import TrainingCheckpointer
from atss.modeling.pretrained import load_pretrained
from atss.predictor import Predictor

safetensors_torch = pytest.importorskip("safetensors.torch")
pytest.importorskip("timm")

# Eight images are four iterations per epoch.
SMALL = {
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.WARMUP_ITERS": 2,
    "SOLVER.MIN_ITER": 0,
    "SOLVER.EPOCHS": 2.0,
    "TEST.EVAL_EPOCHS": 1.0,
    "MODEL.FPN.OUT_CHANNELS": 64,
    "MODEL.ATSS.NUM_CONVS": 1,
    "MODEL.ATSS.SCORE_THRESH_TEST": 0.0,
    "INPUT.SCALE_JITTER_SIZE": 96,
    "INPUT.MIN_SIZE_TRAIN": (96,),
    "INPUT.MIN_SIZE_TEST": 96,
    "INPUT.MOSAIC": 0.5,
    "DATALOADER.NUM_WORKERS": 0,
    "SEED": 1,
}


@pytest.fixture(scope="module")
def tune(squares):
    """tune(output, *options, KEY=VALUE): a short run of the recipe, in this process."""
    names = set(DatasetCatalog.list())

    def run(output, *options, **opts):
        config = ROOT / "configs" / "ATSS_lite0_FPN_fine_tune.yaml"
        values = {"DATASETS.TRAIN": ("squares",), "DATASETS.TEST": ("squares",)}
        values |= SMALL | {"OUTPUT_DIR": output} | opts
        flat = [str(x) for item in values.items() for x in item]
        register = f"squares={squares}/annotations.json:{squares}/images"
        argv = ["--config-file", str(config), "--register", register, *options, *flat]
        args = way_in.make_parser().parse_args(argv)
        return way_in.run(args, way_in.prepare(args))

    yield run
    for name in set(DatasetCatalog.list()) - names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture(scope="module")
def tuned(tune, tmp_path_factory):
    """Return the folder of a run of the unchanged recipe."""
    output = tmp_path_factory.mktemp("tuned")
    assert tune(output).keys() == {"bbox", "bbox_EMA"}  # the last evaluation
    for path in output.glob("model_0*.pth"):
        path.unlink()
    return output


def final(output):
    return torch.load(output / "model_final.pth", weights_only=True)


def test_resumes_bit_for_bit_without_pretrained_weights(tune, tuned, tmp_path, monkeypatch):
    """With averages, best weights and mosaics. The checkpoint contains the backbone."""
    file = tmp_path / "lite0.safetensors"
    weights = load_pretrained("tf_efficientnet_lite0")
    safetensors_torch.save_file({k: v.contiguous() for k, v in weights.items()}, file)
    own = {"MODEL.TIMM.WEIGHTS": str(file)}
    # After 6 of 8 iterations, between two evaluations.
    steps = {"SOLVER.CHECKPOINT_EPOCHS": 1.5}
    save = TrainingCheckpointer.save

    def save_and_stop(self, name, **about):
        save(self, name, **about)
        if name == "model_0000005":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingCheckpointer, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            tune(tmp_path / "cut", **own, **steps)
    file.unlink()
    tune(tmp_path / "cut", "--resume", **own, **steps)
    whole, cut = final(tuned), final(tmp_path / "cut")
    assert whole["iteration"] == cut["iteration"] == 7
    assert_equal(whole, cut)
    with pytest.raises(ValueError, match=r"MODEL\.TIMM\.WEIGHTS .*lite0\.safetensors does not exi"):
        tune(tmp_path / "anew", **own)


def test_output_folder_is_self_contained(tuned):
    """config.yaml and model_best.pth suffice for evaluation. Raw and averaged weights were
    evaluated."""
    lines = [json.loads(line) for line in (tuned / "metrics.json").read_text().splitlines()]
    evaluated = {line["iteration"] for line in lines if "bbox/AP" in line and "bbox_EMA/AP" in line}
    assert evaluated == {3, 8}
    predictor = Predictor(
        str(tuned / "config.yaml"),
        str(tuned / "model_best.pth"),
        ["MODEL.TIMM.WEIGHTS", "gone.safetensors"],
    )
    assert predictor.names == ["blue", "orange"]
    log = (tuned / "log.txt").read_text()
    assert "Backbone: ImageNet weights of EfficientNet-Lite0 by Google" in log


def test_frozen_layers_and_statistics_stay_pretrained(tuned):
    after, before = final(tuned)["model"], load_pretrained("tf_efficientnet_lite0")
    prefix = "backbone.bottom_up.net."
    changed = {
        name
        for name, value in before.items()
        if prefix + name in after and not torch.equal(after[prefix + name], value)
    }
    assert not any(n.endswith(("running_mean", "running_var")) for n in changed)
    assert not any(n.startswith(("conv_stem", "bn1", "blocks.0", "blocks.1")) for n in changed)
    assert {"blocks.2.0.conv_pw.weight", "blocks.6.0.bn3.weight"} <= changed
