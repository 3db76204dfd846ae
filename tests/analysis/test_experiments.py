"""tools/ablation.py: paired runs, resumed, in a table."""

import json
from dataclasses import replace

import ablation
import numpy as np
import pytest
import torch
from conftest import TINY, make_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng

from atss.analysis import digits, experiments

SHORT = (
    *("SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"),
    *(str(x) for item in TINY.items() for x in item),
)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    few = replace(digits.ABLATION, images={"train": 8, "test": 4})
    monkeypatch.setattr(experiments, "ABLATION", few)

    def call(*argv):
        try:
            ablation.main(["--output", str(tmp_path / "out"), *argv])
        finally:
            for name in ("ablation_train", "ablation_test"):
                DatasetCatalog.pop(name, None)
                MetadataCatalog.pop(name, None)
        return capsys.readouterr().out

    return call


def test_trains_missing_runs_and_compares(run, tmp_path):
    rows = ("--rows", "iou_box", "atss_box", "--seeds", "2")
    first = run(*rows, *SHORT)
    assert first.count("AP") > 4
    out = tmp_path / "out"
    assert "Table 3: ATSS over IoU, boxes" in (out / "table.md").read_text()
    assert (out / "plot.png").stat().st_size > 10_000
    assert not list(out.rglob("model_*.pth"))  # gigabytes, otherwise
    result = out / "atss_box" / "seed2" / "result.json"
    metrics = json.loads(result.read_text())["metrics"]
    result.unlink()  # as if it had been interrupted there
    assert "3 runs are in" in run(*rows, *SHORT)
    again = json.loads(result.read_text())["metrics"]
    assert [again[k] for k in experiments.METRICS] == [metrics[k] for k in experiments.METRICS]
    with pytest.raises(SystemExit, match="has a run of another config"):
        run(*rows, *SHORT, "SOLVER.BASE_LR", "0.5")


def test_errors_come_before_training(run, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "train", None)
    out = tmp_path / "out"
    out.write_text("")
    with pytest.raises(SystemExit, match=r"error: cannot write --output .*out/table.md: File exi"):
        run("--rows", "atss_box")
    out.unlink()
    result = out / "atss_box" / "seed1" / "result.json"
    result.parent.mkdir(parents=True)
    for content in ("{", "[]", '{"config": ""}'):
        result.write_text(content)
        with pytest.raises(SystemExit, match=r"seed1/result.json is no result of a run, or is dam"):
            run("--rows", "atss_box", "--seeds", "1")
    (out / "data" / "test" / "0001.png").unlink()
    with pytest.raises(SystemExit, match=r"data is not complete: it has 3 of 4 images in test"):
        run("--rows", "atss_box")


def test_unknown_row_lists_all(run):
    with pytest.raises(SystemExit, match=r"unknown row 'atss_k99': choose from .*atss_k9?"):
        run("--rows", "atss_k99")


def test_rows_of_a_seed_have_equal_initial_weights():
    def weights(row, seed):
        seed_all_rng(seed)
        model = build_model(make_cfg(config=f"tables/{row}.yaml"))
        experiments.pair_weights(model, seed)
        parts = {
            name: [m.weight for m in part.modules() if isinstance(m, torch.nn.Conv2d)]
            for name, part in model.head.named_children()
            if name != "scales"
        }
        return parts | {"backbone": list(model.backbone.parameters())}

    # Their heads have different layers; what they share is equal.
    plain, full, other = weights("retinanet_A1", 1), weights("atss_point", 1), weights("iou_box", 2)
    assert set(plain) == set(full) - {"ctrness"}
    for name, tensors in plain.items():
        for a, b in zip(tensors, full[name], strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(other["cls_score"][0], full["cls_score"][0])


def test_paired_interval_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.3027."""
    results = {
        "a": {1: {"AP": 11.0}, 2: {"AP": 22.0}, 3: {"AP": 33.0}},
        "b": {1: {"AP": 10.0}, 2: {"AP": 20.0}, 3: {"AP": 30.0}},
    }
    difference, half = experiments.paired(results, "a", "b")
    np.testing.assert_allclose(difference, [1, 2, 3])
    assert half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)


def test_claims_name_existing_rows():
    for _, row, other in experiments.CLAIMS:
        assert row in experiments.known_rows()
        assert other in experiments.known_rows()
    assert experiments.paper_ap("atss_A9") == "39.2"
    assert experiments.paper_ap("atss_A9_locations") == ""  # not the paper's
