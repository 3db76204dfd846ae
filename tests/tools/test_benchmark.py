import contextlib
import io
import itertools
import json
import re
import sys
from pathlib import Path

import benchmark
import pytest
import torch
from benchmarks import against, commits, model, operators, rules
from benchmarks.assignment import dense_atss, random_objects
from benchmarks.data import loading
from benchmarks.model import Case, build, inference, random_batch, training_step
from benchmarks.operators import Counts, SimulatedGPU
from benchmarks.scenes import random_scene
from benchmarks.timing import Seconds, in_turn, table
from conftest import make_cfg

import atss
from atss import Anchors, model_zoo
from atss.assigners import ATSS, TAL
from atss.data.datasets import register

CONFIG = model_zoo.get_config_file("ATSS_R_50_FPN_1x.yaml")


def case(precision="fp32", channels_last=False):
    return Case(precision, channels_last, 1, 64, 96, 2, "cpu", CONFIG)


def test_interval_is_two_order_statistics():
    assert Seconds((3.0, 1.0, 2.0)).interval == (1.0, 3.0)
    # Binomial(11, 1/2): at most one below with probability 0.6 %, at most two with 3.3 %.
    assert Seconds(tuple(map(float, range(11)))).interval == (1.0, 9.0)
    assert Seconds((4.0, 1.0, 2.0)).median == 2.0


def test_ratios_compare_the_same_turn():
    slow_in_the_second_turn = Seconds((1.0, 4.0)), Seconds((2.0, 8.0))
    assert slow_in_the_second_turn[0].over(slow_in_the_second_turn[1]).values == (0.5, 0.5)


def test_functions_are_called_in_turn():
    calls = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = in_turn(functions, 3, torch.device("cpu"))
    assert {name: len(s.values) for name, s in seconds.items()} == {"a": 3, "b": 3}
    changes = sum(x != y for x, y in itertools.pairwise(calls))
    assert changes == 1 + 2 * 3  # the first calls of both, then three turns of both


def test_dense_atss_assigns_equally():
    anchors, gt = Anchors.grid((256, 320)), random_objects(20, (256, 320))
    assert torch.equal(ATSS()(anchors, gt).gt_index, dense_atss(anchors, gt))


@pytest.mark.parametrize("name", ["detectron2-fcos", "torchvision-fcos"])
def test_peers_train_the_same_parameters_as_ours(name, new_setuptools):
    def trained(which):
        model = build(which, case()).model
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    # Ours has five more parameters, the scales of the levels.
    assert trained(name) == trained("ours") - 5


def test_torchvision_does_not_resize_images():
    peer, sizes = build("torchvision-fcos", case()), []
    peer.model.backbone.register_forward_hook(lambda module, x, y: sizes.append(x[0].shape[2:]))
    inference(peer, random_batch(case()))()
    assert sizes == [(64, 96)]


def test_peers_run_in_bf16():
    peer = build("detectron2-fcos", case("bf16", True))
    weight = peer.model.backbone.bottom_up.res3[0].conv2.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    dtypes = []
    conv = peer.model.head.cls_score
    conv.register_forward_hook(lambda module, x, y: dtypes.append(y.dtype))
    training_step(peer, random_batch(case()))()
    assert set(dtypes) == {torch.bfloat16}


def test_command_writes_the_printed_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model, "SIDE", 64)
    monkeypatch.setattr(model, "COPIED", 2**16)
    report = tmp_path / "report.json"
    command = "benchmark.py model --against torchvision-fcos --variants fp32 --runs 1"
    command += f" --size 64 64 --device cpu --json {report}"
    monkeypatch.setattr(sys, "argv", command.split())
    benchmark.main()
    printed = capsys.readouterr().out
    measured = json.loads(report.read_text())["fp32, contiguous"]
    step = measured["compared"]["training step"]
    assert set(step) == {"ours", "torchvision-fcos"}
    assert f"{step['ours']['median'] / step['torchvision-fcos']['median']:.3f}" in printed
    assert {"assignment", "criterion", "backbone"} <= set(measured["parts"]["training step"])
    assert "post-processing" in measured["parts"]["inference"]


def test_configs_are_measured_in_their_last_phase(tmp_path, monkeypatch, capsys):
    """TAL is only in the last phase of its config."""
    rules = []
    call = TAL.__call__
    monkeypatch.setattr(TAL, "__call__", lambda *args: rules.append(TAL) or call(*args))
    small = ["--variants", "fp32", "--runs", "1", "--size", "64", "64", "--device", "cpu"]
    files = [model_zoo.get_config_file(f"successors/{x}_R_50_FPN_1x.yaml") for x in ("TAL", "GFL")]
    same_name = tmp_path / "GFL_R_50_FPN_1x.yaml"
    same_name.write_text(f"_BASE_: {files[0]}\n")
    files.append(str(same_name))
    report = tmp_path / "report.json"
    argv = ["benchmark.py", "configs", "--beside", *files, *small, "--json", str(report)]
    argv += ["--classes", "3"]
    monkeypatch.setattr(sys, "argv", argv)
    benchmark.main()
    printed = capsys.readouterr().out
    measured = json.loads(report.read_text())["fp32, contiguous"]
    names = ["ATSS_R_50_FPN_1x", "TAL_R_50_FPN_1x", *files[1:]]
    assert [*measured] == names
    assert all(name in printed for name in names)
    assert rules
    counts = [x["parameters"] for x in measured.values()]
    assert counts[0] - counts[1] == 256 * 9 + 1  # without centerness
    assert counts[2] - counts[1] == 64 * (256 * 9 + 1)  # 68 channels instead of 4
    assert counts[3] == counts[1]


def test_successors_are_measured_by_default(monkeypatch):
    measured = []
    monkeypatch.setattr(
        benchmark.model, "beside_configs", lambda x, *_: measured.extend(x) or 1 / 0
    )
    argv = ["benchmark.py", "configs", "--config-file", "ATSS_R_18_FPN_small", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(ZeroDivisionError):
        benchmark.main()
    assert "successors/TOOD_R_50_FPN_1x" in measured


def test_loading_is_measured_with_the_trainers_loader(squares, capsys):
    register(f"to_load={squares}/annotations.json:{squares}/images")
    cfg = make_cfg("DATASETS.TRAIN", ("to_load",), "SOLVER.IMS_PER_BATCH", 2)
    report = loading(cfg, 4, (0,))
    assert set(report["images per second by workers"]) == {0}
    parts = report["ms per image"]
    assert all(parts[x] > 0 for x in ("decoding the file", "all, by the mapper"))
    assert "images/s" in capsys.readouterr().out


def test_anchors_of_scenes_predict_the_smallest_object():
    """With noise of a tenth; the values of PAA's mixtures are sorted."""
    anchors, gt, predictions = random_scene(12, 2)
    points = anchors.points.float()
    for image in range(2):
        boxes = gt.boxes[gt.image_index == image]
        inside = ((points[:, None] > boxes[:, :2]) & (points[:, None] < boxes[:, 2:])).all(dim=2)
        size = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
        smallest = torch.where(inside, size, torch.inf).argmin(dim=1)
        held = inside.any(dim=1)
        expected = torch.where(held[:, None], boxes[smallest], anchors.boxes)
        sides = (expected[:, 2:] - expected[:, :2]).repeat(1, 2)
        off = (predictions.boxes[image] - expected) / sides
        assert held.any()
        assert off.std().item() == pytest.approx(0.1, abs=0.005)
        assert off.abs().max() < 1
    values = rules.paa_costs(anchors, gt, predictions)
    assert values.shape[0] <= 12
    assert (values[:, 1:] >= values[:, :-1]).all()


X = torch.arange(-3.0, 3)
# {name: (function of a device and X on it, operators, waits, copies to the host, to the GPU)}
STARTED = {
    "sum": (lambda gpu, x: x.sum(), 1, 0, 0, 0),
    "views": (lambda gpu, x: x.view(2, 3).T[:1].detach(), 0, 0, 0, 0),
    "in place": (lambda gpu, x: (x * 2)[1:].add_(1), 2, 0, 0, 0),
    "a number of the host": (lambda gpu, x: x * torch.tensor(2.0), 1, 0, 0, 0),
    "made there": (lambda gpu, x: torch.zeros(3, device=gpu), 1, 0, 0, 0),
    "item": (lambda gpu, x: x.new_full((2,), x[0].item()), 2, 1, 0, 0),
    "if": (lambda gpu, x: x if x.any() else -x, 2, 1, 0, 0),
    "nonzero": (lambda gpu, x: x.nonzero(), 1, 1, 0, 0),
    "a boolean index": (lambda gpu, x: x[x > 0], 2, 1, 0, 0),
    "set where true": (lambda gpu, x: torch.ones_like(x).index_put_((x < 0,), x[:3]), 3, 1, 0, 0),
    "filled where true": (lambda gpu, x: x.index_put((x < 0,), x[0]), 2, 0, 0, 0),
    "unique": (lambda gpu, x: x.unique(), 1, 1, 0, 0),
    "repeat_interleave": (lambda gpu, x: x.repeat_interleave(x.long().abs()), 4, 1, 0, 0),
    "cpu": (lambda gpu, x: x.cpu(), 1, 1, 1, 0),
    "copy_ to the host": (lambda gpu, x: torch.zeros(6).copy_(x), 1, 1, 1, 0),
    "to": (lambda gpu, x: torch.ones(3).to(gpu), 1, 1, 0, 1),
    "to, non-blocking": (lambda gpu, x: torch.ones(3).to(gpu, non_blocking=True), 1, 0, 0, 1),
    "copy_ to the GPU": (lambda gpu, x: (x + 1).copy_(torch.ones(6)), 2, 1, 0, 1),
    "torch.tensor": (lambda gpu, x: torch.tensor([1.0, 2], device=gpu), 1, 1, 0, 1),
    "new_tensor": (lambda gpu, x: x.new_tensor([1.0, 2]), 1, 1, 0, 1),
    "an index of the host": (lambda gpu, x: x[torch.tensor([0, 2])], 1, 1, 0, 1),
}


@pytest.mark.parametrize(
    ("function", "counts"), [(f, x) for f, *x in STARTED.values()], ids=STARTED
)
def test_simulated_gpu_counts_operators_waits_and_copies(function, counts):
    with SimulatedGPU() as gpu:
        x = X.to("cuda")
        gpu.lap("copy")
        result = function("cuda", x)
        gpu.lap("call")
        result = result.cpu()
    assert gpu.laps["call"] == Counts(*counts)
    assert torch.equal(result, function("cpu", X))


def test_simulated_gpu_raises_at_waits_and_mixed_devices():
    with SimulatedGPU(may_wait=False):
        x = X.to("cuda")
        with pytest.raises(RuntimeError, match="nonzero"):
            x.nonzero()
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(6)


def test_autocast_of_simulated_gpu_is_cudas():
    """GroupNorm is float32, unlike on CPUs."""
    with SimulatedGPU(), torch.autocast("cuda", torch.bfloat16):
        x = torch.ones(1, 4, 3, 3, device="cuda")
        low = torch.nn.functional.conv2d(x, x)
        assert low.dtype == torch.bfloat16
        assert torch.nn.functional.group_norm(low.expand(1, 4, 3, 3), 2).dtype == torch.float32


def test_rules_of_proposals_are_measured_beside_detectron2s(capsys):
    benchmark.main(["proposals", "--size", "64", "96", "--runs", "1"])
    printed = capsys.readouterr().out
    assert "Detectron2's Matcher and sampling" in printed
    assert all(f"| {name} " in printed for name in ("ATSS", "Matcher", "PAA"))


def test_operators_are_printed_as_tables(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(operators, "OBJECTS", (3,))
    monkeypatch.setattr(operators, "registered_rules", lambda: [("ATSS", ATSS())])
    monkeypatch.setattr(operators, "BESIDE", ("ours",))
    counts = {part: Counts(2) for part in operators.PARTS}
    monkeypatch.setattr(operators, "count_step", lambda name, case: counts)
    report = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "operators", "--json", str(report)])
    benchmark.main()
    printed, measured = capsys.readouterr().out, json.loads(report.read_text())
    started = measured["rules"]["ATSS"]["tables"]["3"]["operators"]
    assert f"| ATSS | {started} (0, 0) " in printed
    assert re.search(rf"\| sum +\| {2 * len(operators.PARTS)} ", printed)
    assert measured["steps"]["bf16"]["ours"]["backbone"]["operators"] == 2


def test_compiled_tail_counts_as_its_kernels(monkeypatch, capsys):
    counts = {part: Counts(2) for part in operators.PARTS}
    monkeypatch.setattr(operators, "BESIDE", ("ours",))
    monkeypatch.setattr(operators, "count_step", lambda name, case: counts)
    monkeypatch.setattr(operators, "count_kernels", lambda case: Counts(59))
    compiled = operators.print_steps(case(), compiled=True)["fp32"]["ours, compiled"]
    assert sum(x["operators"] for x in compiled.values()) == 59 + 2 * (len(operators.PARTS) - 2)
    assert "ours, compiled" in capsys.readouterr().out


def test_worker_answers_line_by_line(monkeypatch, capsys):
    requests = [["call", "ATSS", 3], ["again"], ["call", "DDOD", 3], ["again"]]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(map(json.dumps, requests))))
    against.serve(str(Path(atss.__file__).parent))
    repeats, seconds, *_ = answers = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
    assert len(answers) == 4
    assert repeats >= 1
    assert 0 < seconds < 0.2


def test_unknown_commit_is_refused():
    with (
        pytest.raises(ValueError, match="git cannot check out 'no-such-commit'"),
        commits.checked_out("no-such-commit"),
    ):
        pass


def test_recipes_are_measured_if_named():
    assert against.configs_of(against.Options(names=[""])) == against.configs()
    found = against.configs_of(against.Options(names=["lite0"]))
    assert "ATSS_lite0_FPN_fine_tune" in found
    assert "ATSS_R_50_FPN_1x" not in found


def test_commits_take_turns(monkeypatch, capsys):
    """The second takes 3 / 2 of the seconds of the first; they begin a turn alternately."""
    requests = []

    class Worker(contextlib.nullcontext):
        def __init__(self, folder, options):
            super().__init__(self)
            self.seconds = {"old": 2.0, "new": 3.0}[folder.name]

        def ask(self, request, *arguments):
            requests.append((self.seconds, request, *arguments))
            return self.seconds

    monkeypatch.setattr(against, "Worker", Worker)
    monkeypatch.setattr(against, "checked_out", lambda x: contextlib.nullcontext(Path(x)))
    options = against.Options(runs=3, rounds=2, names=["SimOTA"], objects=[7], canvas_hw=(64, 96))
    report = against.against(["old", "new"], ["calls", "steps", "lists"], options)
    calls = [x for x in requests if x[1:] in (("call", "SimOTA", 7), ("again",))][:8]
    assert [x[0] for x in calls] == [2, 3, 3, 2, 2, 3, 3, 2]
    file = "configs/successors/SimOTA_R_50_FPN_1x.yaml"
    assert (2, "step", f"old/{file}", 7, 1, 64, 96, []) in requests
    assert (3, "memory", "SimOTA", 1000, 1, "lists") in requests
    assert capsys.readouterr().out.count("| 1.500          | 1.500 to 1.500 |") == 2
    assert report["lists"] == {"SimOTA": {"before": 2.0, "after": 3.0}}


def test_table_is_markdown():
    assert table(["a", "bb"], [[1, 2]]).splitlines() == ["| a | bb |", "|---|----|", "| 1 | 2  |"]
