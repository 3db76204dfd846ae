"""Results of experiments: a csv with a line for each run, differences by seed, tables."""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..errors import UserError
from .plans import Plan

# {row: {seed: {column: value}}}.
Results: TypeAlias = dict[str, dict[int, dict[str, Any]]]
# A column of the table: (title, column of the results, factor, digits).
Column: TypeAlias = tuple[str, str, int, int]
COLUMNS: tuple[Column, ...] = (
    *((x, x, 1, 1) for x in ("AP", "AP50", "AP75", "APs", "APm", "APl")),
    ("positives per object", "positives", 1, 1),
    ("objects without, %", "without_positives", 100, 1),
    ("step, s", "step_seconds", 1, 2),
    ("inference, ms", "inference_ms", 1, 0),
    ("MB", "megabytes", 1, 0),
)
TEXTS = ("row", "config", "fingerprint", "data", "versions", "machine", "commit", "date")


def read_results(files: Sequence[Path]) -> Results:
    """Read csv files of :func:`write_results`; one that does not exist has no results.

    Raises:
        UserError: naming a line that is damaged, or a run that two files have.
    """
    results: Results = {}
    for file in files:
        try:
            content = file.read_text() if file.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {file}: {error}") from error
        for number, line in enumerate(csv.DictReader(content.splitlines()), start=2):
            try:
                record = {key: _value(key, x) for key, x in line.items() if x != ""}
                row, seed = record["row"], int(record["seed"])
                record["AP"], record["fingerprint"]
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{file}: line {number} is damaged: remove it") from error
            if seed in results.setdefault(row, {}):
                raise UserError(f"{file}: line {number} repeats row {row}, seed {seed}")
            results[row][seed] = record
    return results


def _value(column: str, text: str) -> Any:
    if column in TEXTS:
        return text
    return int(text) if re.fullmatch(r"-?\d+", text) else float(text)


def write_results(results: Results, file: Path) -> None:
    """Write a csv with a line for each run, complete at any moment."""
    records = [x for runs in results.values() for x in runs.values()]
    columns = list(dict.fromkeys(key for record in records for key in record))
    unfinished = file.with_name(file.name + ".unfinished")
    with open(unfinished, "w", newline="") as opened:
        writer = csv.DictWriter(opened, columns, lineterminator="\n")
        writer.writeheader()
        for record in records:
            writer.writerow(
                {k: f"{x:.6g}" if isinstance(x, float) else x for k, x in record.items()}
            )
    unfinished.replace(file)


def deviation(results: Results) -> tuple[float, int]:
    """Return the standard deviation of a run's AP from the sum of what its row and its seed add,
    and the degrees of freedom (two-way analysis of variance, by least squares; NaN and 0 if no two
    rows have two seeds in common)."""
    runs = [(row, seed, x["AP"]) for row, seeds in results.items() for seed, x in seeds.items()]
    design = np.array(
        [
            [*(row == x for x in results), *(seed == x for x in sorted({s for _, s, _ in runs}))]
            for row, seed, _ in runs
        ],
        dtype=float,
    )
    ap = np.array([x for *_, x in runs])
    fit, _, rank, _ = np.linalg.lstsq(design, ap)
    freedom = len(runs) - int(rank)
    squares = np.square(ap - design @ fit).sum()
    return (float(np.sqrt(squares / freedom)), freedom) if freedom else (float("nan"), 0)


def paired(results: Results, row: str, other: str) -> tuple[np.ndarray, float]:
    """Return differences of AP by seed, and half the 95 % interval of their mean (Student's t; NaN
    for one seed).

    The interval is that of :func:`deviation`, of all rows: two seeds of two rows alone would say
    little. With two rows it is Student's interval of their differences.
    """
    seeds = sorted(set(results[row]) & set(results[other]))
    difference = np.array([results[row][s]["AP"] - results[other][s]["AP"] for s in seeds])
    one, freedom = deviation(results)
    if not freedom or len(seeds) < 2:
        return difference, float("nan")
    from scipy import stats  # the extra "demo"

    half = stats.t.ppf(0.975, freedom) * one * np.sqrt(2 / len(seeds))
    return difference, float(half)


def compared(plan: Plan, results: Results) -> list[tuple[str, np.ndarray, float]]:
    """Return the plan's statements that have a seed in common, with :func:`paired`."""
    return [
        (statement, *paired(results, row, other))
        for statement, (row, other) in plan.compare.items()
        if results.get(row, {}).keys() & results.get(other, {}).keys()
    ]


def tables(plan: Plan, results: Results) -> str:
    """Return the means of each row and the differences by seed, in Markdown."""
    rows = {name: results[name] for name in plan.rows if results.get(name)}
    records = [x for runs in rows.values() for x in runs.values()]
    columns = [x for x in COLUMNS if any(x[1] in record for record in records)]
    further = dict.fromkeys(key for record in records for key in record if "/" in key)
    columns += [(x, x, 1, 1) for x in further if not x.rpartition("/")[2].startswith("AP-")]
    published = {name: plan.rows[name].published for name in rows}
    titles = [title for title, *_ in columns] + ["paper, COCO"] * any(published.values())
    lines = [f"| row | seeds | {' | '.join(titles)} |", "|---" * (len(titles) + 2) + "|"]
    for name, runs in rows.items():
        cells = [_mean(runs, column) for column in columns]
        cells += [published[name]] * any(published.values())
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    if differences := compared(plan, results):
        lines += [
            "",
            "| difference of AP | mean | 95 % interval | of each seed |",
            "|---" * 4 + "|",
        ]
    for statement, difference, half in differences:
        mean = difference.mean()
        interval = "" if np.isnan(half) else f"{mean - half:+.1f} to {mean + half:+.1f}"
        each = ", ".join(f"{d:+.1f}" for d in difference)
        lines.append(f"| {statement} | {mean:+.1f} | {interval} | {each} |")
    return "\n".join(lines) + "\n"


def _mean(runs: Mapping[int, dict], column: Column) -> str:
    _, key, factor, digits = column
    values = [x[key] for x in runs.values() if key in x]
    values = [x for x in values if not np.isnan(x)]  # NaN without objects of a size
    return f"{factor * np.mean(values):.{digits}f}" if values else ""
