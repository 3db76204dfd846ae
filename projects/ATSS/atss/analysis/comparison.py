"""Results of experiments: a csv with a line for each run, differences by seed, tables."""

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ..errors import UserError
from .plans import Plan

# {row: {seed: {column: value}}}.
Results: TypeAlias = dict[str, dict[int, dict[str, Any]]]


class Column(NamedTuple):
    """A column of the table: ``key`` of the results, times ``factor``, one value of all seeds."""

    title: str
    key: str
    factor: int = 1
    digits: int = 1
    of_seeds: Callable[[Sequence[float]], float] = np.mean


COLUMNS = (
    *(Column(x, x) for x in ("AP", "AP50", "AP75", "APs", "APm", "APl")),
    Column("positives per object", "positives"),
    Column("objects without, %", "without_positives", factor=100),
    # What else the machine does makes a time longer, never shorter.
    Column("step, s", "step_seconds", digits=2, of_seeds=min),
    Column("inference, ms", "inference_ms", digits=0, of_seeds=min),
    Column("MB", "megabytes", digits=0),
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


class Difference(NamedTuple):
    """A statement of a plan: a row's AP less that of another.

    Attributes:
        each: of each seed that both rows have.
        half: half the 95 % interval of their mean, from the scatter of all rows
            (:func:`scatter`); NaN for one seed, and for rows of different data, whose seeds do not
            cancel.
        alone: the same from the scatter of this pair.
    """

    statement: str
    each: np.ndarray
    half: float
    alone: float


def scatter(results: Results) -> tuple[float, int]:
    """Return the residual standard deviation of AP, and its degrees of freedom (NaN and 0 without
    any). Each run's AP is modelled as an effect of its row plus an effect of its seed: a two-way
    analysis of variance, by least squares. Seeds have other effects on other data."""
    runs = [
        (row, (run.get("data"), seed), run["AP"])
        for row, seeds in results.items()
        for seed, run in seeds.items()
        if not np.isnan(run["AP"])
    ]
    effects = list(dict.fromkeys(x for row, seed, _ in runs for x in (row, seed)))
    design = np.array([[x in (row, seed) for x in effects] for row, seed, _ in runs], dtype=float)
    freedom = len(runs) - int(np.linalg.matrix_rank(design)) if runs else 0
    if not freedom:
        return float("nan"), 0
    ap = np.array([ap for *_, ap in runs])
    rest = ap - design @ np.linalg.lstsq(design, ap, rcond=None)[0]
    return float(np.sqrt(np.square(rest).sum() / freedom)), freedom


def compared(plan: Plan, results: Results) -> list[Difference]:
    """Return the plan's statements whose rows have a seed in common."""
    return [
        paired(statement, results, row, other)
        for statement, (row, other) in plan.compare.items()
        if results.get(row, {}).keys() & results.get(other, {}).keys()
    ]


def paired(statement: str, results: Results, row: str, other: str) -> Difference:
    seeds = sorted(set(results[row]) & set(results[other]))
    each = np.array([results[row][s]["AP"] - results[other][s]["AP"] for s in seeds])
    if len(seeds) < 2:
        return Difference(statement, each, float("nan"), float("nan"))
    from scipy import stats  # the extra "demo"

    run, freedom = scatter(results)
    same_data = all(results[row][s].get("data") == results[other][s].get("data") for s in seeds)
    half = np.nan
    if freedom and same_data:
        half = stats.t.ppf(0.975, freedom) * run * np.sqrt(2 / len(seeds))
    alone = stats.t.ppf(0.975, len(seeds) - 1) * stats.sem(each)
    return Difference(statement, each, float(half), float(alone))


def tables(plan: Plan, results: Results) -> str:
    """Return the means of each row over the seeds, also by class, the shortest of its times, and
    the differences by seed, in Markdown."""
    rows = {name: results[name] for name in plan.rows if results.get(name)}
    records = [x for runs in rows.values() for x in runs.values()]
    columns = [x for x in COLUMNS if any(x.key in record for record in records)]
    further = dict.fromkeys(key for record in records for key in record if "/" in key)
    columns += [Column(x, x) for x in further if not x.rpartition("/")[2].startswith("AP-")]
    published = {name: plan.rows[name].published for name in rows}
    titles = [x.title for x in columns] + ["paper, COCO"] * any(published.values())
    lines = [f"| row | seeds | {' | '.join(titles)} |", "|---" * (len(titles) + 2) + "|"]
    for name, runs in rows.items():
        cells = [_cell(runs, column) for column in columns]
        cells += [published[name]] * any(published.values())
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    if classes := dict.fromkeys(x for record in records for x in record if x.startswith("AP-")):
        lines += ["", f"| AP of a class | {' | '.join(rows)} |", "|---" * (len(rows) + 1) + "|"]
    for key in classes:
        cells = [key.removeprefix("AP-"), *(_cell(x, Column(key, key)) for x in rows.values())]
        lines.append(f"| {' | '.join(cells)} |")
    if len({frozenset(runs) for runs in rows.values()}) > 1:
        lines += [
            "",
            "The rows have different seeds. Their differences use the common ones.",
        ]
    if differences := compared(plan, results):
        lines += [
            "",
            "| difference of AP | mean | 95 % interval | of the pair alone | of each seed |",
            "|---" * 5 + "|",
        ]
    for statement, each, *halves in differences:
        mean = each.mean()
        intervals = [f"{mean - x:+.1f} to {mean + x:+.1f}" if x == x else "" for x in halves]
        cells = [f"{mean:+.1f}", *intervals, ", ".join(f"{d:+.1f}" for d in each)]
        lines.append(f"| {statement} | {' | '.join(cells)} |")
    run, freedom = scatter(rows)
    if differences and freedom:
        lines += ["", f"Scatter of a run: {run:.2f} AP (degrees of freedom: {freedom})."]
    return "\n".join(lines) + "\n"


def _cell(runs: Mapping[int, dict], column: Column) -> str:
    values = [x[column.key] for x in runs.values() if column.key in x]
    values = [x for x in values if not np.isnan(x)]  # NaN without objects of a size
    return f"{column.factor * column.of_seeds(values):.{column.digits}f}" if values else ""
