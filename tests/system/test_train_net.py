"""Whole runs of train_net.py on a data set of coloured squares."""

import json
import math
import os
import re
import socket
import traceback
from contextlib import suppress

import convert_checkpoint
import pytest
import recipe
import torch
from conftest import GOLDEN, ROOT, TINY
from detectron2.data import DatasetCatalog, build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.utils.events import EventStorage, get_event_storage
from processes import Script
from trainings import SMALL, forget

import atss.engine.run as way_in
from atss import load_config
from atss.assigners import ASSIGNER_REGISTRY, ATSS
from atss.data.mapper import Mapper
from atss.engine import Trainer
from atss.engine.launch import launch
from atss.modeling.detector import ATSSDetector

# Of large networks: small images, and a checkpoint at the end alone, of weights alone.
SHORT = {
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MIN_SIZE_TEST": 64,
    "SOLVER.MAX_ITER": 2,
    "SOLVER.CHECKPOINT_PERIOD": 100,
    "SOLVER.MOMENTUM": 0.0,
}


@pytest.fixture
def command(squares, tmp_path):
    """command(*options, KEY=VALUE): arguments of a short run on the squares."""
    names = set(DatasetCatalog.list())

    def build(*options, register=None, **opts):
        register = register or f"squares={squares}/annotations.json:{squares}/images"
        config = ROOT / "configs" / "ATSS_R_18_FPN_small.yaml"
        values = {"DATASETS.TRAIN": ("squares",), "DATASETS.TEST": ("squares",)}
        values |= SMALL | {"OUTPUT_DIR": tmp_path / "out"} | opts
        flat = [str(x) for item in values.items() for x in item]
        return ["--config-file", str(config), "--register", register, *options, *flat]

    yield build
    forget(*set(DatasetCatalog.list()) - names)


def prepare(argv):
    return way_in.prepare(way_in.make_parser().parse_args(argv))


def run(argv):
    args = way_in.make_parser().parse_args(argv)
    return way_in.run(args, way_in.prepare(args))


def test_trains_evaluates_and_logs(command, tmp_path, capsys):
    run(command(**{"TEST.EVAL_PERIOD": 6, "VIS_PERIOD": 3, "MODEL.ATSS.PRECISION": "bf16"}))
    out = tmp_path / "out"
    assert (out / "model_final.pth").is_file()
    assert "NUM_CLASSES: 2" in (out / "config.yaml").read_text()
    metrics = {}
    for line in (out / "metrics.json").read_text().splitlines():
        metrics |= json.loads(line, parse_constant=pytest.fail)
    assert metrics["bbox/APl"] is None  # no large objects
    for name in ("loss_cls", "loss_box_reg", "loss_centerness", "total_loss", "bbox/AP"):
        assert math.isfinite(metrics[name])
    assert metrics["assignment/positives_per_object"] > 0
    assert "assignment/objects_without_positive" in metrics
    assert list(out.glob("events.out.tfevents.*"))
    results = json.loads((out / "inference/squares/coco_instances_results.json").read_text())
    assert {r["category_id"] for r in results} <= {5, 6}
    before, _, _ = capsys.readouterr().out.partition("total_loss")
    assert len(before.splitlines()) <= 60
    log, _, _ = (out / "log.txt").read_text().partition("total_loss")
    for part in ("PyTorch built with", "BASE_LR", "(cls_score): Conv2d"):
        assert part in log
        assert part not in before


def narrow(shapes):
    """Return the shapes of a state dict with ResNet-50 blocks of an eighth of their width."""
    inner = re.compile(r"backbone\.(?:body\.)?layer\d\.\d+\.(conv|bn)([123])\.")
    found = {}
    for key, shape in shapes.items():
        if shape and (match := inner.match(key)):
            out = 1 if match[2] == "3" else 8
            shape = [shape[0] // out, *shape[1:]]
            if match[1] == "conv" and match[2] != "1":
                shape[1] //= 8
        found[key] = shape
    return found


def test_fine_tunes_converted_weights_on_own_classes(command, squares, tmp_path):
    """Two classes, one of them in COCO: its row of weights is loaded, the other starts anew."""
    theirs = narrow(json.loads((GOLDEN / "official_atss_r50_shapes.json").read_text()))
    weights = {k: torch.from_numpy(v) for k, v in recipe.weights(theirs).items()}
    torch.save({"model": weights}, tmp_path / "theirs.pth")
    paths = [str(tmp_path / "theirs.pth"), str(tmp_path / "ours.pth")]
    convert_checkpoint.main(["--from", "official", *paths])
    data = json.loads((squares / "annotations.json").read_text())
    data["categories"] = [{"id": 5, "name": "cell"}, {"id": 6, "name": "Traffic_Light"}]
    (tmp_path / "named.json").write_text(json.dumps(data))
    named = dict.fromkeys(("DATASETS.TRAIN", "DATASETS.TEST"), ("named",))
    argv = command(
        register=f"named={tmp_path}/named.json:{squares}/images",
        **named,
        **{"MODEL.ATSS.NUM_CLASSES": -1, "MODEL.ATSS.LEGACY_PIXELS": False},
        # The learning rate of this iteration is 0.
        **SHORT | {"SOLVER.MAX_ITER": 1, "SOLVER.CHECKPOINT_PERIOD": 1},
        **{"SOLVER.WARMUP_FACTOR": 0.0, "SOLVER.WARMUP_METHOD": "linear"},
    )
    argv[1] = str(tmp_path / "ours.yaml")
    for key in TINY:
        del argv[argv.index(key) : argv.index(key) + 2]
    run(argv)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "Classes in the weights: Traffic_Light (1 of 2); new: cell" in log
    assert "Skip loading" not in log
    content = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)
    assert content["class_names"] == ["cell", "Traffic_Light"]
    tuned = content["model"]
    traffic_light = 9  # of COCO's eighty
    for kind in ("weight", "bias"):
        theirs = weights[f"rpn.head.cls_logits.{kind}"]
        assert torch.equal(tuned[f"head.cls_score.{kind}"][1], theirs[traffic_light])
    assert tuned["head.cls_score.bias"][0].item() == pytest.approx(-math.log(99))
    frozen = "backbone.bottom_up.res2.0.conv1.weight"
    assert torch.equal(tuned[frozen], weights["backbone.body.layer1.0.conv1.weight"])
    saved = {p.name for p in (tmp_path / "out").glob("*.pth")}
    assert saved == {"model_0000000.pth", "model_final.pth"}
    numbered = torch.load(tmp_path / "out" / "model_0000000.pth", weights_only=True)
    assert numbered["class_names"] == ["cell", "Traffic_Light"]


@pytest.mark.parametrize(
    "whose",
    [
        ("official",),
        *(("mmdet", "--detector", x) for x in ("atss", "gfl", "paa", "vfnet", "tood", "ddod")),
    ],
)
def test_converted_weights_of_two_classes(command, tmp_path, whose):
    """The data have the same classes: all weights are loaded."""
    source, detector = whose[0], whose[-1]
    if detector not in ("official", "atss"):
        theirs = json.loads((GOLDEN / "mmdet_successors_r50_shapes.json").read_text())[detector]
    else:
        theirs = json.loads((GOLDEN / f"{source}_atss_r50_shapes.json").read_text())
    theirs = narrow({k: [2, *v[1:]] if v and v[0] == 80 else v for k, v in theirs.items()})
    weights = {k: torch.from_numpy(v) for k, v in recipe.weights(theirs).items()}
    torch.save({"model": weights}, tmp_path / "theirs.pth")
    paths = [str(tmp_path / "theirs.pth"), str(tmp_path / "ours.pth")]
    convert_checkpoint.main(["--from", *whose, *paths])

    def converted(*options, **opts):
        argv = command(*options, **SHORT, **opts)
        argv[1] = str(tmp_path / "ours.yaml")
        for key in TINY:
            del argv[argv.index(key) : argv.index(key) + 2]
        return argv

    assert math.isfinite(run(converted("--eval-only"))["bbox"]["AP"])
    with pytest.raises(ValueError, match=r"DATASETS\.TEST names no data set"):
        prepare(["--config-file", str(tmp_path / "ours.yaml"), "--eval-only"])
    if source == "official":
        with pytest.raises(ValueError, match=r"LEGACY_PIXELS True is for inference"):
            prepare(converted())
    own = {"MODEL.ATSS.LEGACY_PIXELS": False, "MODEL.ATSS.NUM_CLASSES": -1}
    run(converted(**own, **{"DATASETS.TEST": ()}))
    assert "Skip loading" not in (tmp_path / "out" / "log.txt").read_text()


def test_multi_scale_testing_after_training(command, tmp_path):
    aug = {
        "TEST.AUG.ENABLED": True,
        "TEST.AUG.MIN_SIZES": (64,),
        "MODEL.ATSS.TTA.SIZE_RANGES": [[0, 1000]],
        "SOLVER.MAX_ITER": 2,
        "SOLVER.CHECKPOINT_PERIOD": 2,
    }
    run(command(**aug))
    metrics = {}
    for line in (tmp_path / "out" / "metrics.json").read_text().splitlines():
        metrics |= json.loads(line)
    assert {"bbox/AP", "bbox_TTA/AP"} <= set(metrics)
    weights = {"MODEL.WEIGHTS": tmp_path / "out" / "model_final.pth"}
    results = run(command("--eval-only", **aug, **weights))
    assert set(results) == {"bbox", "bbox_TTA"}
    assert (tmp_path / "out/tta/inference/squares/coco_instances_results.json").is_file()


def test_stopped_run_resumes_to_the_end(command, tmp_path, monkeypatch, capsys):
    class Stop(HookBase):
        def after_step(self):
            if self.trainer.iter == 4:
                raise KeyboardInterrupt

    build_hooks = Trainer.build_hooks
    monkeypatch.setattr(Trainer, "build_hooks", lambda self: [*build_hooks(self), Stop()])
    args = way_in.make_parser().parse_args(command())
    with pytest.raises(SystemExit, match="130"):
        launch(way_in.run, args, way_in.prepare(args))
    last = tmp_path / "out" / "model_0000002.pth"
    assert f"stopped: --resume continues from {last}" in capsys.readouterr().err
    assert (tmp_path / "out/last_checkpoint").read_text() == "model_0000002.pth"
    monkeypatch.undo()
    starts = []
    train = Trainer.train
    monkeypatch.setattr(
        Trainer, "train", lambda self: (starts.append(self.start_iter), train(self))
    )
    forget("squares")
    run(["--config-file", str(tmp_path / "out/config.yaml"), "--resume"])
    assert starts == [3]
    final = torch.load(tmp_path / "out/model_final.pth", weights_only=False)
    assert final["iteration"] == 5


@pytest.mark.parametrize(
    ("opts", "sentence"),
    [
        (
            {"MODEL.FPN.OUT_CHANNELS": 64},
            r"model_final.pth is of another model .* which is \(32,\) in the checkpoint and",
        ),
        ({"MODEL.ATSS.NUM_CONVS": 2}, r"which is missing in the checkpoint and a weight in"),
        ({"SOLVER.OPTIMIZER": "AdamW"}, r"SOLVER.OPTIMIZER is AdamW, but the checkpoint"),
        ({"MODEL.BACKBONE.FREEZE_AT": 4}, r"such as .* --resume needs the MODEL and SOLVER"),
    ],
)
def test_resumption_with_another_config_is_refused(command, opts, sentence):
    run(command(**{"SOLVER.MAX_ITER": 1, "DATASETS.TEST": ()}))
    with pytest.raises(ValueError, match=sentence) as error:
        run(command("--resume", **{"DATASETS.TEST": ()}, **opts))
    assert "\n" not in str(error.value)


def test_run_that_trained_unused_levels_is_not_resumed(command, tmp_path, monkeypatch):
    """Its weights load."""
    fewer = {"MODEL.ATSS.IN_FEATURES": ["p2", "p3"], "SOLVER.MAX_ITER": 1, "DATASETS.TEST": ()}
    with monkeypatch.context() as patch:
        patch.setattr("atss.modeling.backbone.freeze_unused", lambda *_: None)
        run(command(**fewer))
    with pytest.raises(ValueError, match=r"such as .* --resume needs the MODEL and SOLVER"):
        run(command("--resume", **fewer))
    weights = tmp_path / "out/model_final.pth"
    run(command(**fewer, **{"MODEL.WEIGHTS": weights, "OUTPUT_DIR": tmp_path / "other"}))


def test_run_with_shared_batch_norm_is_not_resumed(command, tmp_path, capsys):
    """Nor evaluated. Its weights load, except those of the norms, which the log names."""
    norm = {"MODEL.ATSS.NORM": "BN", "SOLVER.MAX_ITER": 1, "DATASETS.TEST": ()}
    run(command(**norm))
    weights = tmp_path / "out/model_final.pth"
    checkpoint = torch.load(weights, weights_only=True)
    of_levels = re.compile(r"(head\.\w+_subnet\.1)\.(\d)\.(.+)")
    model = {k: x for k, x in checkpoint["model"].items() if not of_levels.match(k)}
    for key, x in checkpoint["model"].items():
        if found := of_levels.match(key):
            model.setdefault(f"{found[1]}.{found[3]}", x)
    torch.save(checkpoint | {"model": model}, weights)
    with pytest.raises(ValueError, match=r"model_final.pth is of another model .*_subnet\.1\.0\."):
        run(command("--resume", **norm))
    with pytest.raises(ValueError, match=r"has no weights for .*_subnet\.1\.0\."):
        run(
            command(
                "--eval-only", **norm | {"DATASETS.TEST": ("squares",), "MODEL.WEIGHTS": weights}
            )
        )
    capsys.readouterr()
    run(command(**norm, **{"MODEL.WEIGHTS": weights, "OUTPUT_DIR": tmp_path / "other"}))
    unused = capsys.readouterr().out.partition("not used by the model:")[2]
    assert "running_mean" in unused[:500]


def test_detectron2s_loader_trains_and_resumes(command, tmp_path, monkeypatch):
    """The most common customisation. It cannot skip batches, and the log warns."""

    class Own(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return build_detection_train_loader(cfg, mapper=Mapper(cfg, is_train=True))

    monkeypatch.setattr(way_in, "Trainer", Own)
    short = {"INPUT.MIN_SIZE_TRAIN": (64,), "DATASETS.TEST": (), "SOLVER.CHECKPOINT_PERIOD": 100}
    run(command(**short, **{"SOLVER.MAX_ITER": 21}))
    log = tmp_path / "out/log.txt"
    assert "One iteration takes" in log.read_text()
    assert "starts anew" not in log.read_text()
    run(command("--resume", **short, **{"SOLVER.MAX_ITER": 22}))
    assert "after 21 batches its stream of images starts anew" in log.read_text()
    assert torch.load(tmp_path / "out/model_final.pth", weights_only=True)["iteration"] == 21


def test_losses_are_logged_as_in_detectron2(command, monkeypatch):
    logged, theirs = [], []
    step = SimpleTrainer.run_step

    def run_step(self):
        step(self)
        logged.append({k: v[0] for k, v in get_event_storage().latest().items()})

    def forward(self, batch):
        losses = real(self, batch)
        if self.training:
            with EventStorage() as storage:
                SimpleTrainer.write_metrics(losses, 0.0, 0)
                theirs.append({k: v[0] for k, v in storage.latest().items()})
        return losses

    real = ATSSDetector.forward
    monkeypatch.setattr(SimpleTrainer, "run_step", run_step)
    monkeypatch.setattr(ATSSDetector, "forward", forward)
    run(command(**{"DATASETS.TEST": (), "SOLVER.MAX_ITER": 3}))
    assert len(logged) == len(theirs) == 3
    for ours, their in zip(logged, theirs, strict=True):
        names = {"total_loss", "loss_cls", "loss_box_reg", "loss_centerness"}
        assert {k: ours[k] for k in names} == {k: their[k] for k in names}
        assert ours["data_time"] > 0


def test_loss_may_be_called_total_loss(command, monkeypatch, tmp_path):
    """For example in a user's own model."""
    real = ATSSDetector.forward

    def forward(self, batch):
        found = real(self, batch)
        return {"total_loss": sum(found.values())} if self.training else found

    monkeypatch.setattr(ATSSDetector, "forward", forward)
    run(command(**{"DATASETS.TEST": (), "SOLVER.MAX_ITER": 2}))
    assert '"total_loss"' in (tmp_path / "out/metrics.json").read_text()


def test_eval_only(command, tmp_path):
    run(command())
    weights = tmp_path / "out/model_final.pth"
    forget("squares")
    config = ("--config-file", str(tmp_path / "out/config.yaml"))
    results = run([*config, "--eval-only", "MODEL.WEIGHTS", str(weights)])
    assert "AP" in results["bbox"]


class OwnAugmentation(T.Augmentation):
    """An augmentation with a bug."""

    def __init__(self, fail):
        super().__init__()
        self.fail = fail

    def get_transform(self, image):
        self.fail()


def wrong_value():
    _, _ = [1, 2, 3]


def wrong_key():
    return {}["a"]


def wrong_file():
    return open("priors.json")


@pytest.fixture
def launch_with(command, monkeypatch):
    """launch_with(fail, workers): train with an augmentation that calls ``fail``."""

    def start(fail, workers):
        class Own(Mapper):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.augmentations = T.AugmentationList([OwnAugmentation(fail)])

        monkeypatch.setattr("atss.engine.trainer.Mapper", Own)
        argv = command(**{"DATALOADER.NUM_WORKERS": workers, "DATASETS.TEST": ()})
        args = way_in.make_parser().parse_args(argv)
        launch(way_in.run, args, way_in.prepare(args))

    return start


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("fail", [wrong_value, wrong_key])
def test_bug_of_an_own_augmentation_keeps_its_traceback(launch_with, fail, workers):
    """It names the image, but does not blame the file."""
    with pytest.raises((ValueError, KeyError)) as error:
        launch_with(fail, workers)
    text = "".join(traceback.format_exception(error.value))
    assert f"in {fail.__name__}" in text
    assert re.search(r"squares.*/images/\d.png", text)
    assert "cannot read the image" not in text


@pytest.mark.parametrize("workers", [0, 1])
def test_missing_file_of_an_own_augmentation_is_named(launch_with, workers, tmp_path):
    """The log has the traceback."""
    with pytest.raises(SystemExit, match=r"^error: .*No such file or directory: 'priors.json'"):
        launch_with(wrong_file, workers)
    assert "in wrong_file" in (tmp_path / "out/log.txt").read_text()


def test_bug_of_an_own_backbone_keeps_its_traceback(command, monkeypatch):
    monkeypatch.setattr("detectron2.modeling.backbone.FPN.forward", lambda *_: wrong_value())
    args = way_in.make_parser().parse_args(command(**{"DATASETS.TEST": ()}))
    with pytest.raises(ValueError, match="too many values"):
        launch(way_in.run, args, way_in.prepare(args))


@pytest.mark.parametrize(
    ("fail", "error"),
    [(wrong_value, ValueError), (wrong_key, KeyError), (wrong_file, RuntimeError)],
)
def test_bug_in_building_an_own_rule_keeps_its_traceback(command, fail, error):
    class Buggy(ATSS):
        def __init__(self, top_k: int = 9):
            super().__init__(top_k)
            fail()

    ASSIGNER_REGISTRY.register(Buggy)
    try:
        with pytest.raises(error) as raised:
            way_in.start(
                way_in.make_parser().parse_args(command(**{"MODEL.ATSS.ASSIGNER": "Buggy"}))
            )
    finally:
        del ASSIGNER_REGISTRY.entries["Buggy"]
    assert f"in {fail.__name__}" in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("fail", [wrong_value, wrong_key])
def test_bug_in_building_an_own_backbone_keeps_its_traceback(command, fail):
    BACKBONE_REGISTRY._do_register("buggy", lambda *_: fail())
    try:
        with pytest.raises(ValueError, match="NAME buggy cannot be used") as raised:
            way_in.start(
                way_in.make_parser().parse_args(command(**{"MODEL.BACKBONE.NAME": "buggy"}))
            )
    finally:
        del BACKBONE_REGISTRY._obj_map["buggy"]
    assert f"in {fail.__name__}" in "".join(traceback.format_exception(raised.value))


def test_log_has_the_traceback_of_an_explained_error(command, tmp_path):
    (tmp_path / "x.pth").write_text("no weights")
    args = way_in.make_parser().parse_args(
        command("--eval-only", **{"MODEL.WEIGHTS": tmp_path / "x.pth"})
    )
    with pytest.raises(SystemExit, match=r"error: .*x\.pth"):
        launch(way_in.run, args, way_in.prepare(args))
    assert "Traceback (most recent call last)" in (tmp_path / "out/log.txt").read_text()


def test_evaluation_verifies_expected_results(command, tmp_path):
    run(command(**{"SOLVER.MAX_ITER": 1}))
    weights = {"MODEL.WEIGHTS": tmp_path / "out" / "model_final.pth"}
    for expected, fails in ((0, False), (99, True)):
        wanted = {"TEST.EXPECTED_RESULTS": [["bbox", "AP", expected, 50]]}
        argv = command("--eval-only", **wanted, **weights)
        if fails:
            with pytest.raises(SystemExit, match="1"):
                run(argv)
        else:
            run(argv)


def test_evaluation_matches_classes_by_name(command, squares, tmp_path):
    """A file with other numbers gives the same results; the log warns of other names."""
    run(command(**{"SOLVER.MAX_ITER": 1}))
    opts = {"MODEL.WEIGHTS": tmp_path / "out/model_final.pth"}
    plain = run(command("--eval-only", **opts))
    data = json.loads((squares / "annotations.json").read_text())
    for kind, key in (("categories", "id"), ("annotations", "category_id")):
        for entry in data[kind]:
            entry[key] = 11 - entry[key]
    (tmp_path / "turned.json").write_text(json.dumps(data))
    turned = ("--register", f"turned={tmp_path}/turned.json:{squares}/images")
    sets = {"DATASETS.TRAIN": (), "DATASETS.TEST": ("turned",)}
    found = run(command(*turned, "--eval-only", **opts, **sets))
    for metric, value in plain["bbox"].items():
        assert str(found["bbox"][metric]) == str(value), metric  # some are NaN
    log = tmp_path / "out" / "log.txt"
    assert "Class 0 is" not in log.read_text()
    data["categories"] = [{"id": 5, "name": "red"}, {"id": 6, "name": "blue"}]
    (tmp_path / "red.json").write_text(json.dumps(data))
    red = ("--register", f"red={tmp_path}/red.json:{squares}/images")
    sets = {"DATASETS.TRAIN": (), "DATASETS.TEST": ("red",)}
    run(command(*red, "--eval-only", **opts, **sets))
    assert re.search(r"Class 0 is 'blue' .*, but 'red' .*\(2 of 2", log.read_text())


def test_results_without_annotations_are_written(command, squares, tmp_path):
    content = json.loads((squares / "annotations.json").read_text())
    del content["annotations"]
    json_file = tmp_path / "test-dev.json"
    json_file.write_text(json.dumps(content))
    register = f"testdev={json_file}:{squares}/images"
    run(command(**{"SOLVER.MAX_ITER": 1, "DATASETS.TEST": ()}))
    opts = {"DATASETS.TRAIN": (), "DATASETS.TEST": ("testdev",)}
    opts["MODEL.WEIGHTS"] = tmp_path / "out" / "model_final.pth"
    results = run(command("--eval-only", register=register, **opts))
    assert not results.get("bbox")
    written = tmp_path / "out/inference/testdev/coco_instances_results.json"
    assert {r["image_id"] for r in json.loads(written.read_text())} == set(range(8))


def test_two_processes_on_cpus(command, tmp_path):
    """By Detectron2's launch, like `--num-gpus 8` on GPUs."""
    argv = command("--num-gpus", "2", **{"SOLVER.MAX_ITER": 2})
    with socket.socket() as other:  # another run of this user has the default port
        with suppress(OSError):
            other.bind(("127.0.0.1", 2**15 + 2**14 + hash(os.getuid()) % 2**14))
            other.listen()
        output, exit_code = Script([ROOT / "tools/train_net.py", *argv]).communicate()
    assert exit_code == 0, output[-2000:]
    assert "No GPU here: running on the CPU." in output or torch.cuda.is_available()
    assert (tmp_path / "out/model_final.pth").is_file()
    assert re.search(r"AP +\|", output)


def test_wrong_input_is_one_line_without_traceback(command):
    """Pairs KEY VALUE may precede options."""
    argv = ["MODEL.ATSS.NUM_CLASSES", "7", *command()]
    output, exit_code = Script([ROOT / "tools/train_net.py", *argv]).communicate()
    assert exit_code == 1
    error = output.splitlines()[-1]
    assert error == "error: MODEL.ATSS.NUM_CLASSES is 7, but data set squares has 2 classes"
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "annotations.json is not valid json"),
        ("[]", "expected a dict with images"),
        ({"images": [], "annotations": []}, "it has no 'categories'"),
        ({"images": [{"id": 1}], "categories": [{}]}, "entry 0 of 'images' has no 'file_name'"),
        (
            {
                "images": [{"id": 1, "file_name": "a.png", "width": 9, "height": 9}],
                "categories": [{"id": 1, "name": "a"}],
                "annotations": [{"id": 1, "image_id": 1, "category_id": 1}],
            },
            "entry 0 of 'annotations' has no 'bbox'",
        ),
        ({"images": [], "annotations": [], "categories": []}, "an empty list of 'images'"),
    ],
)
def test_malformed_annotations_are_refused(command, tmp_path, content, sentence):
    json_file = tmp_path / "annotations.json"
    json_file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=sentence):
        run(command(register=f"squares={json_file}:{tmp_path}"))


@pytest.mark.parametrize(
    ("register", "sentence"),
    [
        ("squares", "or NAME=folder:split, got 'squares'"),
        ("squares=/no.json:{root}/images", "cannot read the annotations /no.json"),
        ("squares={root}/annotations.json:/nowhere", "image folder /nowhere does not exist"),
    ],
)
def test_malformed_register_is_refused(command, squares, register, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(command(register=register.format(root=squares)))


def test_misspelt_key_names_the_nearest(command):
    for wrong, right in (
        ("ASSIGNERS.SpatialScale.RANGS", "ASSIGNERS.SpatialScale.RANGES"),
        ("SIMILARITIES.nwd.CONSTNAT", "SIMILARITIES.nwd.CONSTANT"),
        ("ASSIGNERS.TAL.TOPK", "ASSIGNERS.TAL.TOP_K"),
        ("POSITIVE_FROM", "ASSIGNERS.MaxIoU.POSITIVE_FROM"),
    ):
        with pytest.raises(ValueError, match=rf"{wrong}; did you mean MODEL.ATSS.{right}\?"):
            load_config(ROOT / "configs/ATSS_R_50_FPN_1x.yaml", opts=[f"MODEL.ATSS.{wrong}", 1])
    with pytest.raises(ValueError, match=r"MODEL.ATSS.TOPK; did you mean MODEL.*ATSS.TOP_K\?"):
        run(command(**{"MODEL.ATSS.TOPK": 3}))


def test_training_needs_annotations(command, squares, tmp_path):
    content = json.loads((squares / "annotations.json").read_text())
    del content["annotations"]
    json_file = tmp_path / "bare.json"
    json_file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="data set squares has no annotations to train on"):
        run(command(register=f"squares={json_file}:{squares}/images"))


@pytest.fixture
def mapper(command):
    args = way_in.make_parser().parse_args(command())
    return Mapper(way_in.prepare(args), is_train=True)


def record(path, box=(0, 0, 9, 9)):
    annotation = {"bbox": list(box), "bbox_mode": 0, "category_id": 0}
    return {"file_name": str(path), "annotations": [annotation]}


def test_unreadable_images_are_named(mapper, squares, tmp_path):
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes((squares / "images/0.png").read_bytes()[:3000])
    text = tmp_path / "text.png"
    text.write_text("not an image")
    for path in (truncated, text, tmp_path / "missing.png"):
        with pytest.raises(OSError, match=f"cannot read the image .*{path.name}"):
            mapper(record(path))


def test_boxes_that_are_not_finite_are_refused(mapper, squares):
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"0.png has a box that is not finite"):
            mapper(record(squares / "images/0.png", (0, 0, value, 9)))


def test_boxes_without_area_or_outside_are_dropped(mapper, squares):
    path = squares / "images/0.png"
    for box, count in (((5, 5, 5, 9), 0), ((200, 5, 220, 9), 0), ((5, 5, 20, 20), 1)):
        assert len(mapper(record(path, box))["instances"]) == count
