"""Several processes: equal to one, stopped together, each image evaluated once."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import TINY, WIDE_FOR_GN, make_cfg, make_input
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from processes import FORKED, Script
from trainings import command_line

import atss.engine.run as way_in
from atss.engine import Trainer
from atss.engine.averaging import share_statistics
from atss.engine.evaluation import build_test_loader
from atss.engine.watch import EXIT_PREEMPTED

BOXES = [
    [[20, 20, 60, 80]],
    [[5, 5, 100, 90], [70, 30, 90, 50]],
    [[0, 40, 30, 90]],
    [[60, 8, 99, 70]],
]
# name: objects of four images, and changes of the config. Without batch statistics, which differ
# between processes.
OPTIONS = (
    *("MODEL.RESNETS.NORM", "GN", "MODEL.FPN.NORM", "GN"),
    *(x for item in (TINY | WIDE_FOR_GN).items() for x in item),
)
CASES = {
    "ordinary": (BOXES, ()),
    "a process without objects": ([*BOXES[:2], [], []], ()),
    "one positive in all": (
        [[], [], BOXES[2], []],
        ("MODEL.ATSS.ASSIGNER", "SimOTA", "MODEL.ATSS.ASSIGNERS.SimOTA.TOP_K", 1),
    ),
    "no object": ([[]] * 4, ()),
    "averaged": (BOXES, ("SOLVER.EMA_DECAY", 0.9)),
    "accumulated": (BOXES, ("SOLVER.ACCUMULATE", 2)),
}


def images(boxes) -> list[dict]:
    batch = [make_input(b, [i % 3 for i in range(len(b))], seed=n) for n, b in enumerate(boxes)]
    return [x | {"file_name": f"{n}.png"} for n, x in enumerate(batch)]


def one_step(batch: list[dict], opts: tuple, output_dir: Path) -> dict:
    """Return losses, gradients and weights of Trainer's first step, with averages of the second.
    The network is float64: in float32, the order of sums would change gradients by 1e-5."""

    class OneBatch(Trainer):
        @classmethod
        def build_model(cls, cfg):
            return super().build_model(cfg).double()

        @classmethod
        def build_train_loader(cls, cfg):
            return [batch] * 2

    torch.manual_seed(0)
    trainer = OneBatch(make_cfg(*OPTIONS, *opts, "OUTPUT_DIR", str(output_dir)))
    losses = {}
    trainer.model.register_forward_hook(lambda *seen: losses.update(seen[2]))
    averages = {}
    with EventStorage() as storage:
        trainer.run_step()
        if trainer.averaging:
            trainer.averaging.after_step()
            trainer.run_step()
            trainer.averaging.after_step()
            averages = trainer.averaging.state_dict()["model"]
    model = getattr(trainer.model, "module", trainer.model)
    return {
        "averages": {name: x.numpy() for name, x in averages.items()},
        "losses": {name: loss.item() for name, loss in losses.items()},
        "gradients": {name: x.grad.numpy() for name, x in model.named_parameters()},
        "weights": {name: x.detach().numpy() for name, x in model.named_parameters()},
        "positives": storage.histories().get("assignment/positives_per_object"),
    }


def collectives(batch: list[dict], output_dir: Path) -> tuple[Counter, Counter, dict]:
    """Return the collectives of an iteration, without those within DDP, its log and its seed."""

    class OneBatch(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return [batch] * 3

    trainer = OneBatch(make_cfg(*OPTIONS, "OUTPUT_DIR", str(output_dir)))
    found = []
    with EventStorage() as trainer.storage, pytest.MonkeyPatch.context() as patch:
        calls = Counter()
        for name in ("all_reduce", "all_gather", "all_gather_object", "gather_object", "barrier"):
            real = getattr(torch.distributed, name)
            patch.setattr(
                torch.distributed,
                name,
                lambda *args, name=name, real=real: (calls.update([name]), real(*args))[1],
            )
        trainer.start_iter, trainer.max_iter = 0, 100
        trainer.before_train()
        for trainer.iter in range(2):
            calls.clear()
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()
        found.append(calls.copy())
        own = trainer.preemption.exchange.losses(comm.get_rank())
        calls.clear()
        with torch.no_grad():
            trainer.model(batch)
        found.append(calls.copy())
        trainer.checkpointer.save("model_0000001", iteration=1)
        trainer.checkpointer.save_weights("model_best", trainer.model)
        logged = {k: v[0] for k, v in get_event_storage().latest().items()}
        return (*found, logged | {"seed": torch.initial_seed(), "own": own})


def shares(rank: int, output_dir: Path) -> dict:
    """Return the ids of this process's images, a running mean, and scaled periods."""
    sizes = [(64, 64), (96, 64)] * 4
    records = [
        {"file_name": f"{i}.png", "image_id": i, "height": height, "width": width}
        for i, (height, width) in enumerate(sizes[:7])
    ]
    DatasetCatalog.register("seven", lambda: records)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atss.engine.evaluation.Mapper", lambda *_, **__: lambda record: record)
        loader = build_test_loader(make_cfg("DATALOADER.NUM_WORKERS", 0), "seven")
        ids = [x["image_id"] for batch in loader for x in batch]
    norm = torch.nn.BatchNorm1d(1)
    norm.running_mean.fill_(rank + 1)
    share_statistics(norm)

    class NoData(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return []

    periods = ("SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 1)
    opts = ("SOLVER.REFERENCE_WORLD_SIZE", 1, "OUTPUT_DIR", str(output_dir))
    cfg = NoData(make_cfg(*OPTIONS, *periods, *opts)).cfg
    scaled = (cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD)
    return {"ids": ids, "mean": norm.running_mean.item(), "periods": scaled}


def half_of_each(rank: int, output_dir: Path) -> None:
    meeting = f"file://{output_dir}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    comm.create_local_process_group(2)
    for name, (boxes, opts) in CASES.items():
        result = one_step(images(boxes)[2 * rank : 2 * rank + 2], opts, output_dir)
        torch.save(result, output_dir / f"{name}.{rank}")
    own_folder = output_dir / f"folder{rank}"
    own_folder.mkdir()
    counted = collectives(images(BOXES)[2 * rank : 2 * rank + 2], own_folder)
    torch.save(counted, output_dir / f"collectives.{rank}")
    torch.save(shares(rank, output_dir), output_dir / f"shares.{rank}")
    broken = images(BOXES)[2 * rank : 2 * rank + 2]
    if rank == 1:
        broken[0]["image"][:] = torch.inf
    with pytest.raises(FloatingPointError) as error:
        one_step(broken, (), output_dir)
    (output_dir / f"broken.{rank}").write_text(str(error.value))
    # gloo's threads sometimes abort the process in Python's finalization, even if the group is
    # destroyed: everything is written, so end here.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)


@pytest.fixture(scope="module")
def halves(tmp_path_factory) -> Path:
    """Return the results of two processes with two images each."""
    output_dir = tmp_path_factory.mktemp("halves")
    mp.start_processes(
        half_of_each, (output_dir,), nprocs=2, start_method=FORKED.get_start_method()
    )
    return output_dir


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_the_step_of_one(halves, tmp_path, name):
    """Mean losses over the processes, as Detectron2 logs them, gradients and weights."""
    boxes, opts = CASES[name]
    whole = one_step(images(boxes), opts, tmp_path)
    if name == "one positive in all":
        assert whole["positives"].latest() == 1
    results = [torch.load(halves / f"{name}.{rank}", weights_only=False) for rank in range(2)]
    for loss, value in whole["losses"].items():
        mean = sum(result["losses"][loss] for result in results) / 2
        assert mean == pytest.approx(value, rel=1e-6, abs=1e-30)
    for kind in ("gradients", "weights", "averages"):
        for parameter, values in whole[kind].items():
            for result in results:
                difference = abs(result[kind][parameter] - values).max()
                assert difference <= 1e-6 * abs(values).max(), (kind, parameter)


def test_iteration_has_two_small_collectives(halves):
    """The normalisers, and the losses with stop signals."""
    (first, alone, logged), (second, _, other) = (
        torch.load(halves / f"collectives.{rank}", weights_only=False) for rank in range(2)
    )
    assert first == second == {"all_reduce": 1, "all_gather": 1}
    assert not alone  # losses without gradient are local
    assert logged["total_loss"] == sum(v for k, v in logged.items() if k.startswith("loss_"))
    assert logged["data_time"] >= 0
    assert logged["own"] != other["own"]
    for name, loss in logged["own"].items():
        assert logged[name] == pytest.approx((loss + other["own"][name]) / 2, rel=1e-12)


def test_processes_draw_differently_and_one_saves(halves):
    seeds = {
        torch.load(halves / f"collectives.{rank}", weights_only=False)[2]["seed"]
        for rank in range(2)
    }
    assert len(seeds) == 2
    saved = [{x.name for x in (halves / f"folder{rank}").glob("*.pth")} for rank in range(2)]
    assert saved == [{"model_0000001.pth", "model_best.pth"}, set()]


def test_shared_statistics_images_and_periods(halves):
    """Each process evaluates every other image by size, with the statistics of the first. Scaled
    periods of one iteration stay one."""
    first, second = (torch.load(halves / f"shares.{rank}") for rank in range(2))
    assert (first["ids"], second["ids"]) == ([0, 4, 1, 5], [2, 6, 3])
    assert first["mean"] == second["mean"] == 1.0
    assert first["periods"] == second["periods"] == (1, 1)


def test_nan_loss_in_one_process_stops_all(halves):
    first, second = ((halves / f"broken.{rank}").read_text() for rank in range(2))
    assert first == second
    assert re.match(r"loss_cls is NaN.* at iteration 0, on the images 2.png, 3.png; ", first)


def variables(rank: int, port: int) -> dict[str, str]:
    """Return torchrun's variables for the first or second of two processes."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    known = {name: str(value) for name, value in numbers.items()}
    return known | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def run_two(argv: list[str], port: int) -> None:
    """Start two processes with torchrun's variables."""
    for script in [Script(argv, **variables(rank, port)) for rank in range(2)]:
        text, exit_code = script.communicate()
        assert exit_code == 0, text[-2000:]


def test_every_image_is_evaluated_once(squares, tmp_path, free_port):
    """Seven images, by two processes and by one."""
    content = json.loads((squares / "annotations.json").read_text())
    del content["images"][7]
    (tmp_path / "seven.json").write_text(json.dumps(content))
    counts = []
    for name in ("one", "two"):
        weights = {"MODEL.WEIGHTS": tmp_path / "weights.pth"}
        argv = command_line(squares, tmp_path / name, "--eval-only", **weights)
        argv[argv.index("--register") + 1] = f"squares={tmp_path}/seven.json:{squares}/images"
        if name == "one":
            args = way_in.make_parser().parse_args(argv[1:])
            cfg = way_in.prepare(args)
            torch.save(Trainer.build_model(cfg).state_dict(), tmp_path / "weights.pth")
            way_in.run(args, cfg)
            DatasetCatalog.remove("squares")
            MetadataCatalog.remove("squares")
        else:
            run_two(argv, free_port)
        results = tmp_path / name / "inference/squares/coco_instances_results.json"
        counts.append(Counter(x["image_id"] for x in json.loads(results.read_text())))
    assert counts[0].keys() == set(range(7))
    assert counts[0] == counts[1]


def test_sigterm_to_one_process_stops_both(squares, tmp_path, free_port):
    """The signal goes to its process group, with the loader processes."""
    opts = {
        "SOLVER.MAX_ITER": 10**6,
        "SOLVER.CHECKPOINT_PERIOD": 10**6,
        "DATALOADER.NUM_WORKERS": 1,
    }
    argv = command_line(squares, tmp_path / "out", **opts | {"TEST.EVAL_PERIOD": 2})
    first = Script(argv, **variables(0, free_port))
    # In a new Python, because its end affects the exit code.
    second = subprocess.Popen(
        [sys.executable, "-W", "ignore", *argv],
        env=os.environ | variables(1, free_port),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    for line in first.lines:  # an evaluation: training has started
        if "Start inference" in line:
            break
    os.killpg(second.pid, signal.SIGTERM)
    text, exit_code = first.communicate(timeout=120)  # it would wait for a process that has left
    try:
        second_text, _ = second.communicate(timeout=120)
    finally:
        second.kill()
    assert exit_code == EXIT_PREEMPTED, text[-2000:]
    assert second.returncode == EXIT_PREEMPTED, second_text[-2000:]
    name = (tmp_path / "out/last_checkpoint").read_text()
    iteration = torch.load(tmp_path / "out" / name, weights_only=False)["iteration"]
    assert name == f"model_{iteration:07d}.pth"
    assert (
        f"SIGTERM: stopped after iteration {iteration};" in (tmp_path / "out/log.txt").read_text()
    )


def test_two_processes_end_early_in_the_same_iteration(squares, tmp_path, free_port):
    """Only the first has results. With a learning rate of 0, AP is constant."""
    opts = {"TEST.EVAL_PERIOD": 1, "TEST.PATIENCE": 2, "SOLVER.EMA_DECAY": 0.9}
    opts |= {"SOLVER.BASE_LR": 1e-12, "SOLVER.MAX_ITER": 50, "SOLVER.CHECKPOINT_PERIOD": 50}
    # Statistics of BatchNorm would change.
    opts |= {"MODEL.RESNETS.NORM": "FrozenBN", "MODEL.FPN.NORM": "GN"}
    run_two(command_line(squares, tmp_path / "out", **opts), free_port)
    log = (tmp_path / "out/log.txt").read_text()
    assert "Training ends early, with iteration 2: 2 evaluations gave no better" in log
    ended = torch.load(tmp_path / "out/model_final.pth", weights_only=True)
    assert ended["iteration"] == 2
    best = torch.load(tmp_path / "out/model_best.pth", weights_only=True)
    assert (best["iteration"], best["averaged"]) == (0, False)
    assert best["value"] == ended["trainer"]["hooks"]["Best"]["value"]


def test_best_weights_of_two_processes(squares, tmp_path, free_port):
    """Each process has its own statistics of BatchNorm and evaluates its own images; the file has
    the statistics of the first."""
    opts = {"TEST.EVAL_PERIOD": 2, "SOLVER.EMA_DECAY": 0.9, "TEST.BEST_METRIC": "bbox/AP50"}
    opts |= {"SOLVER.MAX_ITER": 6, "SOLVER.BASE_LR": 0.01}
    run_two(command_line(squares, tmp_path / "out", **opts), free_port)
    best = torch.load(tmp_path / "out/model_best.pth", weights_only=True)
    alone = command_line(squares, tmp_path / "again", "--eval-only", **opts)
    alone += ["MODEL.WEIGHTS", str(tmp_path / "out/model_best.pth")]
    args = way_in.make_parser().parse_args(alone[1:])
    found = way_in.run(args, way_in.prepare(args))
    assert found["bbox"]["AP50"] == pytest.approx(best["value"], rel=1e-4)
    assert best["value"] > 0


@pytest.mark.slow
def test_torchrun_restarts_after_a_killed_process(squares, tmp_path):
    opts = {"SOLVER.MAX_ITER": 50, "SOLVER.CHECKPOINT_PERIOD": 10, "DATALOADER.NUM_WORKERS": 1}
    argv = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    argv += command_line(squares, tmp_path / "out", **opts)
    torchrun = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines, killed = [], None
    for line in torchrun.stdout:
        lines.append(line)
        if killed is None and "model_0000019.pth" in line:
            children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text()
            killed = int(children.split()[-1])
            os.kill(killed, signal.SIGKILL)
    log = "".join(lines)
    assert torchrun.wait() == 0, log[-3000:]
    assert re.findall(r"Starting training from iteration (\d+)", log) == ["0", "20"]
    assert torch.load(tmp_path / "out/model_final.pth", weights_only=False)["iteration"] == 49
    assert re.search(r"AP +\|", log)
