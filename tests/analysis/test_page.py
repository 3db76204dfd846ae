"""The page of a report: its figures, its pictures, and nothing from outside."""

import base64
import io
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from golden_results import CASES
from PIL import Image

from atss.analysis import page
from atss.analysis.figures import compare, figures
from atss.analysis.galleries import Run
from atss.analysis.page import write_page
from atss.analysis.results import Results


class Page(HTMLParser):
    """Rows of cells by section, and all addresses."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.addresses, self.section, self.cell = {}, [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.addresses += [found[x] for x in ("src", "href", "srcset", "data") if x in found]
        if tag == "h2":
            self.section = found["id"]
        elif tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        elif tag in ("td", "th"):
            self.cell = ""

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[self.section][-1].append(" ".join(self.cell.split()))
            self.cell = None


def make_run(case, name="run", **options):
    results = Results(CASES[case]["gt"], CASES[case]["detections"])
    return Run(name, results, figures(results), **options)


def write(tmp_path, *runs):
    difference = compare(*(run.results for run in runs), 20) if len(runs) == 2 else None
    write_page(runs, tmp_path / "report.html", difference)
    text = (tmp_path / "report.html").read_text()
    return Page(text), text


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    """A run, its page and the text."""
    run = make_run("medium")
    return run, *write(tmp_path_factory.mktemp("page"), run)


def test_page_shows_the_figures(medium):
    run, found, text = medium
    rows = found.rows["r1-classes"]
    assert [row[0] for row in rows[1:]] == run.results.names
    for row in rows[1:]:
        entry, best = run.figures["per_class"][row[0]], run.figures["thresholds"][row[0]]
        assert row[1:4] == [str(entry["objects"]), f"{entry['AP']:.1f}", f"{entry['AP50']:.1f}"]
        assert row[7] == f"{best['score']:.3f}"
    errors = run.figures["errors"]
    gains = {k: f"{x:.1f}" for k, x in {**errors["dap"], **errors["dap_special"]}.items()}
    expected = [[k, str(errors["counts"].get(k, "")), gains[k]] for k in gains]
    assert [row[:3] for row in found.rows["r1-errors"][1:]] == expected
    assert f"TIDE&#39;s own AP50 of {run.figures['errors']['base_ap50']:.1f}" in text
    sizes = {row[0]: row[1:3] for row in found.rows["r1-missed"]}
    small = run.figures["missed"]["by_size"]["small"]
    assert sizes["small"] == [str(small["objects"]), str(small["lost"])]


def test_confusion_has_shares_of_rows_and_counts_of_the_background(medium):
    run, found, _ = medium
    rows = found.rows["r1-confusion"]
    matrix = np.array(run.figures["confusion"]["matrix"])
    first = [f"{x / matrix[0].sum():.0%}" if x else "" for x in matrix[0]]
    assert rows[1] == [run.results.names[0], *first]
    assert rows[len(matrix)][:-1] == ["background", *map(str, matrix[-1, :-1])]


def test_charts_have_precision_thresholds_and_calibration(medium, monkeypatch):
    drawn = []
    monkeypatch.setattr(page, "line_chart", lambda lines, *a, **b: drawn.append((lines, b)) or "")
    found = medium[0].figures
    page.precision(found)
    (lines, options), (calibration, _) = drawn
    for name, (recall, precision) in lines.items():
        full = found["curves"][name]["precision50"]
        assert recall == [*range(len(recall))]
        assert precision == [100 * x for x in full[: len(recall)]]
        assert not any(full[len(recall) :])
        best = found["thresholds"][name]
        assert options["points"][name] == (100 * best["recall"], 100 * best["precision"])
    bins = [x for x in found["calibration"]["bins"] if x["count"]]
    columns = ([x[key] for x in bins] for key in ("avg_confidence", "avg_accuracy"))
    assert calibration["detections"] == tuple(columns)


def test_nothing_is_loaded_from_outside(medium):
    _, found, text = medium
    assert all(x.startswith(("#", "data:")) for x in found.addresses)
    assert "://" not in text
    assert "url(" not in text.replace("url(#", "")


def test_names_are_escaped(tmp_path):
    content = CASES["perfect"]["gt"]
    categories = [{**x, "name": "<i>"} for x in content["categories"]]
    images = [{**x, "file_name": "<u>"} for x in content["images"]]
    changed = {**content, "categories": categories, "images": images}
    results = Results(changed, CASES["perfect"]["detections"][1:])
    run = Run("<b>&", results, figures(results), image_dir="nowhere")
    text = write(tmp_path, run)[1]
    assert "<i>" not in text
    assert "<u>" not in text
    assert "&lt;u&gt;: 1 missed" in text
    assert "<b>&" not in text
    assert "&lt;b&gt;&amp;" in text


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("empty_gt", "The annotations have no objects"),
        ("empty_detections", "There are no detections"),
        ("empty_both", "The annotations have no objects"),
    ],
)
def test_empty_results_give_a_page_that_names_it(case, sentence, tmp_path):
    assert sentence in write(tmp_path, make_run(case))[1]


def test_two_runs_are_compared(tmp_path):
    first = make_run("medium", name="first")
    second = Run("second", Results(CASES["medium"]["gt"], CASES["medium"]["detections"][:1500]), {})
    second = Run("second", second.results, figures(second.results))
    rows = {row[0]: row for row in write(tmp_path, first, second)[0].rows["comparison"]}
    difference = second.figures["AP"] - first.figures["AP"]
    assert rows["AP"][1:4] == [
        f"{first.figures['AP']:.1f}",
        f"{second.figures['AP']:.1f}",
        f"{difference:+.1f}",
    ]
    assert re.fullmatch(r"[+-]\d+\.\d to [+-]\d+\.\d", rows["AP"][4])


def test_pictures_are_of_the_worst_images(tmp_path):
    greys = {}
    for i, entry in enumerate(CASES["medium"]["gt"]["images"][1:]):  # one is missing
        greys[entry["file_name"]] = 4 * i
        size = (entry["width"], entry["height"])
        Image.new("L", size, 4 * i).save(tmp_path / entry["file_name"], "JPEG")
    run = make_run("medium", image_dir=str(tmp_path))
    found, text = write(tmp_path, run)
    pictures = [x for x in found.addresses if x.startswith("data:image/jpeg")]
    assert len(pictures) >= 12
    shown = re.findall(r'src="data:image/jpeg;base64,([^"]*)" alt="(\S+):', text)
    for data, name in shown:
        pixels = np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"))
        assert abs(np.bincount(pixels.ravel()).argmax() - greys[name]) < 2
    captions = re.findall(r"<figcaption>(\S+): (\d+) missed, (\d+) wrong", text)
    cost = [int(a) + int(b) for _, a, b in captions]
    assert cost == sorted(cost, reverse=True)
    assert captions[0][0] == run.figures["images"]["cost"][0]["file_name"]


def test_missed_objects_by_positives(tmp_path):
    run = make_run("medium")
    positives = np.arange(len(run.results.crowd)) % 20
    run = Run(run.name, run.results, run.figures, positives=positives)
    rows = {row[0]: row for row in write(tmp_path, run)[0].rows["r1-missed"]}
    inside = (positives >= 1) & (positives <= 3) & ~run.results.crowd
    assert rows["1 to 3"][1] == str(inside.sum())


@pytest.mark.slow
def test_browser_shows_the_page_without_errors(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium")
    write(tmp_path, make_run("medium"))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--disable-gpu"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        errors, asked = [], []
        page.on("console", lambda x: x.type == "error" and errors.append(x.text))
        page.on("pageerror", lambda x: errors.append(str(x)))
        page.on("request", lambda x: asked.append(x.url))
        page.goto(f"file://{tmp_path}/report.html")
        page.emulate_media(media="print")
        assert not page.locator("nav").is_visible()
        bar = page.locator(".bar").first
        assert bar.evaluate("x => getComputedStyle(x).printColorAdjust") == "exact"
        page.emulate_media(media="screen")
        heading = page.locator("table.sortable th", has_text="AP50")
        for order in (-1, 1):
            heading.click()
            cells = page.locator("table.sortable tbody tr td:nth-child(4)").all_inner_texts()
            values = [float(x) for x in cells]
            assert values == sorted(values, reverse=order < 0)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        browser.close()
    assert not errors
    assert not [x for x in asked if not x.startswith(("file:", "data:"))]
