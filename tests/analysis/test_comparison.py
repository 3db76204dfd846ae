"""Results of experiments: csv, differences by seed, tables."""

import numpy as np
import pytest

from atss.analysis.comparison import paired, read_results, scatter, tables, write_results
from atss.analysis.plans import Plan, Row
from atss.errors import UserError

RESULTS = {
    "a": {
        seed: {"row": "a", "seed": seed, "AP": 11.0 * seed, "fingerprint": "1"}
        for seed in (1, 2, 3)
    },
    "b": {
        seed: {"row": "b", "seed": seed, "AP": 10.0 * seed, "fingerprint": "2"}
        for seed in (1, 2, 3)
    },
}


def test_paired_interval_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.3027. Of two rows,
    both intervals are the same."""
    _, each, half, alone = paired("", RESULTS, "a", "b")
    np.testing.assert_allclose(each, [1, 2, 3])
    assert alone == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert half == pytest.approx(alone)


def of_rows(**rows):
    return {row: {s: {"AP": x} for s, x in enumerate(ap)} for row, ap in rows.items()}


def test_interval_is_of_all_rows():
    """Each row's mean and each seed's subtracted, -0.5, 0.5; 0.5, -0.5; 0, 0 remain: their sum of
    squares is 1, with 2 degrees of freedom."""
    rows = {"a": (1.0, 3.0), "b": (2.0, 2.0), "c": (3.0, 4.0)}
    results = of_rows(**rows)
    assert scatter(results) == (pytest.approx(0.5**0.5), 2)
    _, each, half, alone = paired("", results, "c", "a")
    np.testing.assert_allclose(each, [2, 1])
    assert half == pytest.approx(4.3027 * 0.5**0.5, rel=1e-4)
    assert alone == pytest.approx(12.706 * 0.5, rel=1e-4)
    # A third seed of one row, a run without AP and the only run of a row add nothing.
    results = of_rows(**rows | {"a": (1.0, 3.0, 30.0), "d": (1.0, float("nan"))})
    assert scatter(results) == (pytest.approx(0.5**0.5), 2)
    assert paired("", results, "c", "a").half == pytest.approx(half)
    assert np.isnan(paired("", of_rows(a=[1.0], b=[2.0]), "a", "b")[2:]).all()
    assert scatter({}) == (pytest.approx(float("nan"), nan_ok=True), 0)


def test_rows_of_other_data_have_other_seeds():
    """In each of two data sets 1 remains of a square, with 1 degree of freedom."""
    results = of_rows(a=(1.0, 3.0), b=(2.0, 2.0), c=(51.0, 3.0), d=(52.0, 2.0))
    for row in "cd":
        for run in results[row].values():
            run["data"] = "other"
    assert scatter(results) == (pytest.approx(1), 2)
    assert np.isfinite(paired("", results, "a", "b").half)
    assert np.isnan(paired("", results, "a", "c").half)  # effects of the seeds do not cancel
    assert np.isfinite(paired("", results, "a", "c").alone)


@pytest.mark.parametrize("num_rows", [2, 5, 8])
@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_degrees_of_freedom(num_rows, num_seeds):
    values = np.random.default_rng(0).normal(50, 3, (num_rows, num_seeds))
    results = of_rows(**{f"r{i}": row for i, row in enumerate(values)})
    assert scatter(results)[1] == (num_rows - 1) * (num_seeds - 1)


def test_results_return_from_the_csv(tmp_path):
    file = tmp_path / "results.csv"
    assert read_results([file]) == {}
    RESULTS["a"][1] |= {"machine": "CPU, 7", "AP-a, b": 3.25, "large/AP": float("nan")}
    write_results(RESULTS, file)
    again = read_results([file])
    assert list(again) == ["a", "b"]
    assert again["b"] == RESULTS["b"]
    assert np.isnan(again["a"][1].pop("large/AP"))
    RESULTS["a"][1].pop("large/AP")
    assert again["a"] == RESULTS["a"]


def test_results_of_several_files_are_joined(tmp_path):
    files = [tmp_path / "one.csv", tmp_path / "two.csv"]
    write_results({"a": RESULTS["a"]}, files[0])
    write_results({"b": RESULTS["b"]}, files[1])
    assert list(read_results(files)) == ["a", "b"]
    with pytest.raises(UserError, match=r"one\.csv: line 2 repeats row a, seed 1"):
        read_results([*files, files[0]])


@pytest.mark.parametrize("line", ["a,1,,1", "a,x,3.0,1", "a,1,high,1", "a"])
def test_damaged_line_is_named(tmp_path, line):
    file = tmp_path / "results.csv"
    file.write_text(f"row,seed,AP,fingerprint\nb,1,3.0,1\n{line}\n")
    with pytest.raises(UserError, match=r"results\.csv: line 3 is damaged: remove it"):
        read_results([file])


def test_tables_have_rows_with_results():
    rows = {x: Row([], [], {}, "39.3") for x in ("b", "none", "a")}
    text = tables(Plan(rows, [1, 2, 3], {}, {"x": ("a", "b"), "y": ("a", "none")}), RESULTS)
    lines = text.splitlines()
    assert lines[0] == "| row | seeds | AP | paper, COCO |"
    assert [x for x in lines if x.startswith("| b")] == ["| b | 3 | 20.0 | 39.3 |"]
    assert [x for x in lines if x.startswith("| x")] == [
        "| x | +2.0 | -0.5 to +4.5 | -0.5 to +4.5 | +1.0, +2.0, +3.0 |"
    ]
    assert lines[-1] == "Scatter of a run: 0.71 AP (degrees of freedom: 2)."
    assert "none" not in text


def test_tables_name_different_seeds():
    plan = Plan({x: Row([], [], {}, "") for x in ("a", "b")}, [0, 1], {}, {"a, b": ("a", "b")})
    results = of_rows(a=(1.0, 3.0), b=(2.0, 2.0))
    assert "different seeds" not in tables(plan, results)
    del results["b"][0]
    assert "different seeds" in tables(plan, results)


def test_tables_have_the_shortest_times():
    results = of_rows(a=(1.0, 3.0))
    results["a"][0] |= {"step_seconds": 0.9, "megabytes": 10}
    results["a"][1] |= {"step_seconds": 0.5, "megabytes": 20}
    lines = tables(Plan({"a": Row([], [], {}, "")}, [0, 1], {}, {}), results).splitlines()
    assert lines[0] == "| row | seeds | AP | step, s | MB |"
    assert lines[2] == "| a | 2 | 2.0 | 0.50 | 15 |"


def test_tables_have_the_classes():
    rows = {x: Row([], [], {}, "") for x in ("a", "b")}
    results = of_rows(a=(1.0, 3.0), b=(2.0, 2.0))
    results["a"][0] |= {"AP-cat": 3.0, "AP50-cat": 9.0}
    results["a"][1] |= {"AP-cat": 4.0, "AP-dog": float("nan")}
    lines = tables(Plan(rows, [0, 1], {}, {}), results).splitlines()
    assert lines[5:] == [
        "| AP of a class | a | b |",
        "|---|---|---|",
        "| cat | 3.5 |  |",
        "| dog |  |  |",
    ]
