"""The explorer's server and pages, also in a browser."""

import json
import shutil
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY
from detectron2.modeling import build_model

from atss.analysis.explorer import Explorer
from atss.config import build_sampling
from atss.data import datasets
from atss.errors import UserError
from atss.predictor import Predictor

pytest.importorskip("starlette", reason="needs the extra: pip install -e '.[explore]'")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra: pip install -e '.[explore]'")

from starlette.testclient import TestClient  # noqa: E402

from atss.analysis.explorer_page import write_page  # noqa: E402
from atss.analysis.explorer_server import make_app  # noqa: E402

CHROMIUM = "/usr/bin/chromium"
OPTS = ["MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "96", "MODEL.WEIGHTS", ""]
OPTS += [x for item in TINY.items() for x in item]
OPTS += ["DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]
RULES = ["ATSS", "MaxIoU"]


@pytest.fixture
def explorer(squares):
    name = datasets.register(f"squares={squares}/annotations.json:{squares}/images")
    return Explorer(name, "ATSS_R_18_FPN_small", OPTS)


@pytest.fixture
def client(explorer):
    app = make_app(explorer, 0, RULES)
    return TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)


def test_answers_are_those_of_the_rule(explorer, client):
    assert '"squares"' not in client.get("/").text  # no folder of the data
    about = client.get("/rule?image=0&rule=ATSS TOP_K=3&weights=0").json()
    image = explorer.image(0)
    assignment = explorer.rule("ATSS TOP_K=3")(image.anchors, image.gt)
    expected = assignment.gt_index[0].numpy()
    assert about["anchors"] == np.flatnonzero(expected >= 0).tolist()
    assert about["owners"] == expected[expected >= 0].tolist()
    one = client.get("/object?image=0&rule=ATSS TOP_K=3&weights=0&object=1").json()
    assert len(one["anchors"]) == about["objects"]["candidates"][1] > 0
    assert max(one["similarity"]) == about["objects"]["best"][1]
    assert client.get("/picture?image=0").content[:2] == b"\xff\xd8"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("/rule?image=99&rule=ATSS&weights=0", "image must be between 0 and 7, got 99"),
        ("/picture?image=../../a.png", "image must be a whole number, got '../../a.png'"),
        ("/image?image=-1", "image must be between 0 and 7, got -1"),
        ("/rule?image=0&rule=ATSS TOP_K=101&weights=0", "TOP_K must be at most 100 here"),
        ("/rule?image=0&rule=ATSS TOP_K=0xff&weights=0", "TOP_K must be at most 100 here"),
        ("/rule?image=0&rule=ATSS TOP_K=0&weights=0", "TOP_K must be >= 1, got 0"),
        ("/rule?image=0&rule=ATSS FOO=1&weights=0", "unknown key"),
        ("/rule?image=0&rule=&weights=0", "unknown MODEL.ATSS.ASSIGNER ''"),
        (f"/rule?image=0&rule={'A' * 400}&weights=0", "the rule has 400 characters"),
        ("/rule?image=0&rule=TAL&weights=0", "TAL needs predictions: pass weights="),
        ("/object?image=0&rule=ATSS&weights=0&object=9", "object must be between 0 and 2, got 9"),
        ("/detections?image=0&weights=0", "needs predictions"),
    ],
)
def test_bad_requests_are_answered_with_the_reason(client, address, message):
    response = client.get(address)
    assert response.status_code == 400
    assert message in response.json()["error"]


def test_files_and_other_hosts_are_refused(client):
    assert client.get("/images/0.png").status_code == 404
    assert client.get("/../annotations.json").status_code == 404
    assert client.get("/", headers={"host": "example.org"}).status_code == 400


def test_broken_image_is_named_and_the_server_lives(squares, tmp_path):
    shutil.copytree(squares, tmp_path / "data")
    (tmp_path / "data" / "images" / "0.png").write_bytes(b"no image")
    source = f"broken={tmp_path}/data/annotations.json:{tmp_path}/data/images"
    explorer = Explorer(datasets.register(source), "ATSS_R_18_FPN_small", OPTS)
    client = TestClient(make_app(explorer, 0, RULES), "http://127.0.0.1")
    response = client.get("/image?image=0")
    assert response.status_code == 400
    assert "0.png" in response.json()["error"]
    assert client.get("/image?image=1").status_code == 200


def test_page_without_a_server_holds_all_answers(explorer, tmp_path):
    page = tmp_path / "page.html"
    write_page(explorer, ["0.png", "1.png"], ["ATSS", "ATSS TOP_K=3"], page)
    text = page.read_text()
    start = text.index(">", text.index('id="data"')) + 1
    data = json.loads(text[start : text.index("</script>", start)])
    assert data["images"] == ["0.png", "1.png"]
    assert data["answers"]["rule|1|ATSS TOP_K=3|0"] == explorer.about_rule(1, "ATSS TOP_K=3")
    assert data["answers"]["object|1|ATSS|0|2"] == explorer.about_object(1, "ATSS", 0, 2)
    assert "http://" not in text.replace("http://www.w3.org/", "")
    with pytest.raises(UserError, match=r"squares has no image called 99\.png"):
        write_page(explorer, ["99.png"], ["ATSS"], page)


# ------------------------------------------------------------------------------------------------
# In a browser
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def browse(free_port):
    """Return a function that serves an explorer and opens its page; check console and requests."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if not shutil.which(CHROMIUM):
        pytest.skip(f"needs {CHROMIUM}")
    problems, servers = [], []

    def serve(explorer):
        app = make_app(explorer, 0, RULES)
        config = uvicorn.Config(app, port=free_port, log_level="warning")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{free_port}/"

    def open_page(address, **options):
        page = browser.new_page(viewport={"width": 1280, "height": 800}, **options)
        page.on("console", lambda x: problems.append(x.text))
        page.on("pageerror", lambda x: problems.append(str(x)))
        inside = (address.partition("#")[0], "data:", "blob:")
        page.on("request", lambda x: x.url.startswith(inside) or problems.append(x.url))
        for _ in range(100):  # until the server listens
            try:
                page.goto(address)
                break
            except playwright.Error:
                time.sleep(0.1)
        return page

    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield SimpleNamespace(serve=serve, open=open_page)
        browser.close()
    for server, thread in servers:
        server.should_exit = True
        thread.join()
    assert not problems


def wait(page):
    page.wait_for_selector("body[data-state=ready]")


def positives(explorer, rule, object_id, number=0):
    image = explorer.image(number)
    gt_index = explorer.rule(rule)(image.anchors, image.gt).gt_index[0].numpy()
    return np.flatnonzero(gt_index == object_id).tolist()


@pytest.mark.slow
def test_browser_shows_the_positives_of_the_chosen_arguments(explorer, browse):
    address = browse.serve(explorer)
    page = browse.open(f"{address}#a=ATSS&b=")
    wait(page)
    page.click("#object-1")
    wait(page)
    seen = {}
    for k in (9, 17, 3):
        page.evaluate(
            """k => { const x = document.querySelector('[data-key=TOP_K]');
            x.value = k; x.dispatchEvent(new Event('input')); }""",
            k,
        )
        wait(page)
        seen[k] = page.evaluate("views[0].ofObject[1]")
        assert seen[k] == positives(explorer, f"ATSS TOP_K={k}", 1)
        shown = page.inner_text("dd[data-name=positives]")
        assert shown == str(len(seen[k]))
    assert seen[3] != seen[17]
    link = page.url
    other = browse.open(link)
    wait(other)
    assert other.evaluate("[state.object, state.rules[0]]") == [1, "ATSS TOP_K=3"]
    other.select_option("select[aria-label='second rule']", "MaxIoU")
    wait(other)
    assert other.evaluate("views[1].ofObject[1]") == positives(explorer, "MaxIoU", 1)
    both = {*positives(explorer, "MaxIoU", 1)} ^ {*positives(explorer, "ATSS TOP_K=3", 1)}
    assert other.evaluate("differing[1]") == len(both)
    for key in ("Escape", "j", "k", "]", "+", "ArrowLeft", "0", "["):
        other.keyboard.press(key)
        wait(other)
    assert other.evaluate("state.image") == 0


@pytest.mark.slow
def test_browser_opens_a_page_without_a_server(explorer, browse, tmp_path):
    page = tmp_path / "page.html"
    write_page(explorer, ["0.png", "1.png"], ["ATSS", "ATSS TOP_K=3"], page)
    opened = browse.open(f"{page.as_uri()}#image=1&a=ATSS&b=ATSS+TOP_K%3D3&object=2")
    wait(opened)
    assert opened.evaluate("views[1].ofObject[2]") == positives(explorer, "ATSS TOP_K=3", 2, 1)


@pytest.mark.slow
def test_values_are_the_packages_on_200_objects_of_coco(real_data):
    source = f"coco={real_data}/coco/annotations/instances_val2017.json:{real_data}/coco/val2017"
    explorer = Explorer(datasets.register(source), "ATSS_R_50_FPN_1x", ["MODEL.DEVICE", "cpu"])
    known, count, number = explorer.arguments, 0, 0
    rules = [name for name, about in known.items() if not about["predictions"]]
    rules.remove("Sampled")  # of many positives, each call draws others
    while count < 200:
        image = explorer.image(number)
        for rule in rules:
            compare(explorer, number, rule, None)
        count, number = count + len(image.gt), number + 1


@pytest.mark.slow
def test_values_are_the_packages_on_predictions(squares, tmp_path):
    name = datasets.register(f"squares={squares}/annotations.json:{squares}/images")
    untrained = Explorer(name, "ATSS_R_18_FPN_small", [*OPTS, "MODEL.ATSS.NUM_CLASSES", "2"])
    weights = [str(tmp_path / f"{i}.pth") for i in range(2)]
    for seed, path in enumerate(weights):
        torch.manual_seed(seed)
        model = build_model(untrained.cfg)
        torch.nn.init.normal_(model.head.cls_score.weight)
        torch.save({"model": model.state_dict()}, path)
    opts = [*OPTS, "MODEL.ATSS.NUM_CLASSES", "2"]
    explorer = Explorer(name, "ATSS_R_18_FPN_small", opts, weights)
    predictions = Predictor(explorer.cfg, weights[0]).at_anchors(f"{squares}/images/0.png")
    for rule, about in explorer.arguments.items():
        if about["predictions"]:
            compare(explorer, 0, rule, predictions)
    first, last = (explorer.about_object(0, "TAL", i, 0) for i in range(2))
    assert first["probability"] != last["probability"]
    shown = explorer.detections(0, 0)
    assert len(shown["boxes"]) == len(shown["scores"]) > 0


def compare(explorer, number, rule, predictions):
    """Compare the lists for the page with calls of a rule and of its functions."""
    image, assigner = explorer.image(number), build_sampling_rule(explorer, rule)
    expected = assigner(image.anchors, image.gt, predictions)
    about, gt_index = explorer.about_rule(number, rule), expected.gt_index[0].numpy()
    assert about["anchors"] == np.flatnonzero(gt_index >= 0).tolist()
    assert about["owners"] == gt_index[gt_index >= 0].tolist()
    if expected.score is not None:
        score = expected.score[0].numpy()[gt_index >= 0]
        assert np.allclose(about["scores"], score, rtol=0, atol=5.1e-5)
    if rule == "ATSS" and len(image.gt):
        mean, std = assigner.statistics(image.anchors, image.gt.boxes)
        shown = about["objects"]
        assert np.allclose(shown["mean"], mean, rtol=0, atol=5.1e-5)
        assert np.allclose(shown["threshold"], mean + std, rtol=0, atol=5.1e-5)
    for k in range(len(image.gt)):
        one = explorer.about_object(number, rule, 0, k)
        assert {*np.flatnonzero(gt_index == k)} <= {*one["anchors"]}


def build_sampling_rule(explorer, rule):
    cfg = explorer.cfg.clone()
    cfg.MODEL.ATSS.ASSIGNER = rule
    return build_sampling(cfg).assigner
