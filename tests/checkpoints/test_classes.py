"""Weights of some classes in a model of others: rows follow names."""

import logging
import math

import pytest
import torch
from conftest import make_cfg
from detectron2.modeling import build_model
from torch import nn

from atss.checkpoints import SafeCheckpointer, TrainingCheckpointer, WeightsError
from atss.checkpoints.classes import class_tensors, equal_names
from atss.modeling.head import ATSSHead

OLD = ["person", "traffic light", "zebra", "dog"]


class Model(nn.Module):
    def __init__(self, num_classes, num_anchors=3, channels=8, seed=1):
        super().__init__()
        torch.manual_seed(seed)
        self.head = ATSSHead(
            in_channels=channels,
            num_levels=1,
            num_classes=num_classes,
            num_anchors=num_anchors,
            num_convs=1,
            norm="",
        )


class Progress:
    """Stands for the trainer."""

    def state_dict(self):
        return {"iteration": 7}

    def load_state_dict(self, state):
        self.loaded = state


def trained(**kwargs):
    """A model of the old classes with distinct rows."""
    model = Model(len(OLD), **kwargs, seed=0)
    for x in model.parameters():
        nn.init.normal_(x)
    return model


def saved(model, folder, names=OLD):
    """The checkpoint of a training of these classes."""
    checkpointer = TrainingCheckpointer(model, str(folder), class_names=names, trainer=Progress())
    checkpointer.save("model_final")
    return str(folder / "model_final.pth")


def begin(file, names, **kwargs):
    """Return a model of other classes that begins from the file, and its initial state."""
    model, fresh = Model(len(names), **kwargs), Model(len(names), **kwargs)
    TrainingCheckpointer(model, "", class_names=names).resume_or_load(file, resume=False)
    return model, fresh


def logits(model):
    """Return (N, H, W, A, K) on random features."""
    features = torch.randn(1, 8, 4, 5, generator=torch.Generator().manual_seed(2))
    head = model.head
    with torch.no_grad():
        return head([features]).classes.reshape(1, 4, 5, -1, head.num_classes)


@pytest.fixture
def caplog(caplog):
    caplog.set_level(logging.INFO)
    return caplog


@pytest.mark.parametrize(
    ("theirs", "ours", "places"),
    [
        (["a", "b"], ["b", "c", "a"], {0: 1, 2: 0}),
        (["Traffic Light"], [" traffic_light "], {0: 0}),
        (["t-shirt"], ["T shirt"], {0: 0}),
        (["tshirt", "car"], ["t shirt", "cart"], {}),
        (["A", "a"], ["a", "A"], {0: 1, 1: 0}),  # case distinguishes classes
        (["A"], ["a", "A"], {1: 0}),
        (["x", "x"], ["x", "y", "x", "x"], {0: 0, 2: 1}),
        (["-1", "1"], ["1", "-1"], {0: 1, 1: 0}),
        ([], ["a"], {}),
    ],
)
def test_equal_names(theirs, ours, places):
    assert equal_names(theirs, ours) == places


@pytest.mark.parametrize("num_anchors", [1, 3])
@pytest.mark.parametrize(
    "names",
    [
        ["cell", "Zebra", "person", "tile", "a", "b", "c"],
        ["dog", "zebra", "traffic_light", "person"],  # as many, in another order
        ["person", "horse", "zebra", "cell"],  # as many, some others
        ["tile", "cell"],
        OLD,
    ],
)
def test_rows_follow_names(tmp_path, names, num_anchors):
    """Logits of common classes are the old model's at every anchor, those of others a new
    layer's."""
    old = trained(num_anchors=num_anchors)
    model, fresh = begin(saved(old, tmp_path), names, num_anchors=num_anchors)
    before, now = logits(old), logits(model)
    places = {name.lower().replace("_", " "): i for i, name in enumerate(OLD)}
    rows = model.head.cls_score.weight.unflatten(0, (num_anchors, -1))
    untouched = fresh.head.cls_score.weight.unflatten(0, (num_anchors, -1))
    bias = model.head.cls_score.bias.view(num_anchors, -1)
    for k, name in enumerate(names):
        place = places.get(name.lower().replace("_", " "))
        if place is not None:
            torch.testing.assert_close(now[..., k], before[..., place])
        else:
            assert torch.equal(rows[:, k], untouched[:, k])
            assert bias[:, k].tolist() == pytest.approx([-math.log(99)] * num_anchors)
    for name, value in model.state_dict().items():
        if "cls_score" not in name:
            assert torch.equal(value, old.state_dict()[name]), name


def test_log_lists_common_and_new_classes(tmp_path, caplog):
    file = saved(trained(), tmp_path)
    begin(file, ["cell", "dog", "person"])
    assert "Classes in the weights: dog, person (2 of 3); new: cell" in caplog.text
    assert "Skip loading" not in caplog.text
    begin(file, ["tile", "cell"])
    assert "Classes in the weights: none (0 of 2); new: tile, cell" in caplog.text
    begin(file, OLD[::-1])
    last = caplog.records[-1].getMessage()
    assert last == "Classes in the weights: dog, zebra, traffic light, person (4 of 4)"


@pytest.mark.parametrize("known", ["neither", "ours", "theirs"])
def test_without_names_rows_keep_their_positions(tmp_path, caplog, known):
    """As in all older checkpoints."""
    old = trained()
    file = saved(old, tmp_path, OLD if known == "theirs" else [])
    ours = ["a", "b", "c", "d"] if known == "ours" else []
    model = Model(4)
    TrainingCheckpointer(model, "", class_names=ours).resume_or_load(file, resume=False)
    assert torch.equal(model.head.cls_score.weight, old.head.cls_score.weight)
    who = "This run has" if known == "theirs" else "The weights have"
    assert f"{who} no class names: the class layer is loaded unchanged" in caplog.text


def test_rows_follow_names_behind_a_prefix(tmp_path):
    """As in a model that was saved inside DistributedDataParallel."""
    old = trained()
    wrapped = nn.DataParallel(old).state_dict()
    torch.save({"model": wrapped, "class_names": OLD}, tmp_path / "old.pth")
    model, _ = begin(str(tmp_path / "old.pth"), ["dog", "person"])
    weight = model.head.cls_score.weight.unflatten(0, (3, 2))
    assert torch.equal(weight, old.head.cls_score.weight.unflatten(0, (3, 4))[:, [3, 0]])


def test_without_names_another_number_keeps_random_layer(tmp_path, caplog):
    old = trained()
    file = tmp_path / "old.pth"
    torch.save({"model": old.state_dict()}, file)
    model, fresh = begin(str(file), ["person", "cell"])
    assert torch.equal(model.head.cls_score.weight, fresh.head.cls_score.weight)
    assert torch.equal(model.head.bbox_pred.weight, old.head.bbox_pred.weight)
    assert (
        "The weights have no class names, and head.cls_score.weight is (12, 8, 3, 3), which does "
        "not fit: its layer stays random" in caplog.text
    )


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"num_anchors": 3}, {"num_anchors": 6}),  # as many rows
        ({"channels": 16}, {}),
        ({"num_anchors": 1}, {}),
    ],
)
def test_rows_of_other_anchors_or_sizes_are_left_out(tmp_path, caplog, theirs, ours):
    file = saved(trained(**theirs), tmp_path)
    model, fresh = begin(file, ["person", "dog"], **ours)
    for name in ("weight", "bias"):
        found, before = (getattr(x.head.cls_score, name) for x in (model, fresh))
        assert torch.equal(found, before)
    assert "The weights have 4 class names, and head.cls_score.weight is (" in caplog.text
    assert "Classes in the weights" not in caplog.text


def test_weights_without_class_layer_log_nothing(tmp_path, caplog):
    state = {k: v for k, v in Model(2).state_dict().items() if "cls_score" not in k}
    torch.save({"model": state}, tmp_path / "backbone.pth")
    begin(str(tmp_path / "backbone.pth"), ["person", "cell"])
    assert "class names" not in caplog.text


def test_resuming_loads_everything_unchanged(tmp_path, caplog):
    """Rows by position, and states; other names are warned of."""
    old = trained()
    saved(old, tmp_path)
    model, progress = Model(4, seed=5), Progress()
    names = ["dog", "traffic light", "zebra", "person"]
    checkpointer = TrainingCheckpointer(model, str(tmp_path), class_names=names, trainer=progress)
    checkpointer.resume_or_load("", resume=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, old.state_dict()[name]), name
    assert progress.loaded == {"iteration": 7}
    assert "Class 0 is 'person' in the weights" in caplog.text


@pytest.mark.parametrize(
    ("names", "warning"),
    [
        (["person", "dog", "zebra", "Traffic-Light"], "Class 1 is 'traffic light' in the weights"),
        (["person", "traffic light", "zebra", "cat"], "Class 3 is 'dog' in the weights"),
        (["Person", "traffic_light", "zebra", "dog "], None),
        ([], None),
        (["person", "zebra"], None),  # of another number, which does not fit the weights
        (["person", "traffic light", "zebra", "cat", "dog"], None),
    ],
)
def test_evaluation_of_other_classes_warns(tmp_path, caplog, names, warning):
    old, model = trained(), Model(4)
    file = saved(old, tmp_path)
    SafeCheckpointer(model, class_names=names).resume_or_load(file, resume=False)
    assert torch.equal(model.head.cls_score.weight, old.head.cls_score.weight)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == (warning is not None)
    if warning:
        assert warnings[0].startswith(
            f"{warning} {file}, but {names[int(warning[6])]!r} in this run"
        )


def test_checkpoint_contains_names(tmp_path):
    content = torch.load(saved(trained(), tmp_path), weights_only=True)
    assert content["class_names"] == OLD


@pytest.mark.parametrize("names", ["person", {"0": "person"}, [1, 2]])
def test_malformed_names_are_refused(tmp_path, names):
    file = tmp_path / "odd.pth"
    torch.save({"model": Model(1).state_dict(), "class_names": names}, file)
    with pytest.raises(WeightsError, match=r"odd\.pth has class_names that are no list of names"):
        begin(str(file), ["person"])


@pytest.mark.parametrize(("config", "count"), [("atss_box", 1), ("atss_A9", 9)])
def test_class_tensors_of_a_whole_model(config, count):
    cfg = make_cfg(config=f"tables/{config}.yaml")
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    tensors = {"head.cls_score.weight": count, "head.cls_score.bias": count}
    assert class_tensors(model) == tensors
    assert class_tensors(model.head) == {k.removeprefix("head."): n for k, n in tensors.items()}
