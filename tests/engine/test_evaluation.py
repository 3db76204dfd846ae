"""Evaluation: perfect detections of every format give AP 100."""

import json
import logging
import random
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from atss.analysis.statistics import measure
from atss.config import build_sampling, get_config
from atss.data import Mapper, datasets
from atss.engine import Trainer
from atss.engine.evaluation import build_evaluator
from atss.labels.coco import find_in_json
from atss.labels.formats import read_labels

SIDE = 100  # of images that are made here


@pytest.fixture
def register():
    """Register a source as "data", for one test."""
    yield lambda source: datasets.register(f"data={source}")
    if "data" in DatasetCatalog:
        DatasetCatalog.remove("data")
        MetadataCatalog.remove("data")


def evaluate(content: dict, folder: Path, *opts: object, keep=lambda annotation: True) -> dict:
    """Return results on the data set "data" for detections of a file's objects.

    Args:
        content: the file, in COCO's format, with its original boxes.
        keep: selects the objects that are detected.
    """
    cfg = make_cfg("OUTPUT_DIR", str(folder), *opts)
    names = MetadataCatalog.get("data").thing_classes
    name_of = {c["id"]: c["name"] for c in content["categories"]}
    found = defaultdict(list)
    for annotation in filter(keep, content["annotations"]):
        found[annotation["image_id"]].append(annotation)
    evaluator = build_evaluator(cfg, "data")
    evaluator.reset()
    for image in content["images"]:
        annotations = found[image["id"]]
        instances = Instances((image["height"], image["width"]))
        boxes = torch.tensor([x["bbox"] for x in annotations], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances.pred_boxes = Boxes(boxes)
        instances.scores = torch.ones(len(boxes))
        classes = [names.index(name_of[x["category_id"]]) for x in annotations]
        instances.pred_classes = torch.tensor(classes, dtype=torch.long)
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    return evaluator.evaluate().get("bbox", {})


def make_content(count: int = 6, objects: int = 5, seed: int = 0) -> dict:
    """Make images, objects that do not overlap, and three classes."""
    rng = random.Random(seed)
    images = [
        {"id": i + 1, "file_name": f"{i}.png", "width": SIDE, "height": SIDE} for i in range(count)
    ]
    annotations: list[dict] = []
    for image in images:
        for k in range(objects):
            box = [2 + k * 18, rng.randint(2, 60), rng.randint(8, 15), rng.randint(8, 35)]
            ids = {"id": len(annotations) + 1, "image_id": image["id"]}
            annotations.append({**ids, "category_id": rng.randint(1, 3), "bbox": box})
    categories = [{"id": i, "name": f"class {i}"} for i in (1, 2, 3)]
    return {"images": images, "annotations": annotations, "categories": categories}


def renumber(content: dict, key: str, field: str, new: dict) -> None:
    for entry in content[key]:
        entry["id"] = new[entry["id"]]
    for annotation in content["annotations"]:
        if field in annotation:
            annotation[field] = new[annotation[field]]


def make_odd(seed: int) -> dict:
    """Make valid objects with odd ids, and boxes that training drops or clips."""
    rng = random.Random(seed)
    content = make_content(rng.randint(2, 8), rng.randint(1, 5), seed)
    for key, field in (("images", "image_id"), ("categories", "category_id")):
        old = [entry["id"] for entry in content[key]]
        offsets = [0, 10, 70, 2**31, 2**53, 2**63 - 9, 2**63 + 1, -50]
        ids = rng.sample([x + y for x in offsets for y in (0, 3, 5)], len(old))
        if key == "images" and seed % 3 == 0:
            ids = [f"image {x}" for x in ids]
        renumber(content, key, field, dict(zip(old, ids, strict=True)))
    for entry in content["images"]:  # license and date as Datumaro writes them, and worse
        entry |= {"license": rng.choice([0, ""]), "date_captured": 0, "own": float("nan")}
    start = rng.choice([0, 0, 1, 2**63 - 2, 2**64])
    for i, annotation in enumerate(content["annotations"]):
        annotation["id"] = start + i
    odd = ([5, 5, 0, 9], [5, 5, 9, 0], [SIDE, 5, 9, 9], [-20, 5, 20, 9], [5, 5, 1e-7, 9])
    odd += ([-10, 70, 30, 20], [90, 90, 40, 40], [5, SIDE - 1e-6, 9, 9])
    last = content["annotations"][-1]
    for i, box in enumerate(rng.sample(odd, 4)):
        content["annotations"].append({**last, "id": start - 1 - i if start else 999 + i})
        content["annotations"][-1]["bbox"] = list(box)
    return content


def write(content: dict, folder: Path) -> str:
    """Return the source of a json; no image is read."""
    (folder / "images").mkdir(exist_ok=True)
    (folder / "labels.json").write_text(json.dumps(content))
    return f"{folder}/labels.json:{folder}/images"


@pytest.mark.parametrize("seed", range(20))
def test_perfect_detections_of_odd_files(register, tmp_path, seed):
    content = make_odd(seed)
    register(write(content, tmp_path))
    assert evaluate(content, tmp_path)["AP"] == pytest.approx(100)


def yolo_copy(content: dict, images: Path, folder: Path) -> str:
    """Write the same labels in YOLO's layout."""
    numbers = {c["id"]: i for i, c in enumerate(content["categories"])}
    lines = defaultdict(list)
    sizes = {x["id"]: (x["width"], x["height"]) for x in content["images"]}
    for a in content["annotations"]:
        (x, y, w, h), (width, height) = a["bbox"], sizes[a["image_id"]]
        shares = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
        lines[a["image_id"]].append(f"{numbers[a['category_id']]} " + " ".join(map(str, shares)))
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for image in content["images"]:
        (folder / "images" / image["file_name"]).symlink_to(images / image["file_name"])
        label = folder / "labels" / Path(image["file_name"]).with_suffix(".txt")
        label.write_text("\n".join(lines[image["id"]]))
    names = json.dumps([c["name"] for c in content["categories"]])
    (folder / "data.yaml").write_text(f"train: images\nnames: {names}\n")
    return f"{folder}/data.yaml:train"


def voc_copy(content: dict, images: Path, folder: Path) -> str:
    """Write the same labels in Pascal VOC's xml."""
    names = {c["id"]: c["name"] for c in content["categories"]}
    objects = defaultdict(list)
    for a in content["annotations"]:
        x, y, w, h = a["bbox"]
        corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
        text = "".join(f"<{key}>{value}</{key}>" for key, value in corners.items())
        objects[a["image_id"]].append(
            f"<object><name>{names[a['category_id']]}</name><bndbox>{text}</bndbox></object>"
        )
    for image in content["images"]:
        (folder / image["file_name"]).symlink_to(images / image["file_name"])
        size = f"<size><width>{image['width']}</width><height>{image['height']}</height></size>"
        text = f"<annotation>{size}{''.join(objects[image['id']])}</annotation>"
        (folder / Path(image["file_name"]).with_suffix(".xml")).write_text(text)
    return f"{folder}:."


@pytest.mark.parametrize("copy", [None, yolo_copy, voc_copy])
@pytest.mark.parametrize(
    "source",
    ["bccd/test.json:bccd/images", *(f"aquarium/data.yaml:{x}" for x in ("test", "valid"))],
)
def test_perfect_detections_of_copies_in_every_format(register, real_data, tmp_path, source, copy):
    labels, images = (part for part in source.split(":"))
    given = read_labels(
        str(real_data / labels), str(real_data / images) if "json" in labels else images
    )
    source = f"{real_data}/{labels}:" + (f"{real_data}/{images}" if "json" in labels else images)
    content = given.content
    if copy:
        for image in content["images"]:  # in one folder
            image["path"] = Path(given.image_dir) / image["file_name"]
            image["file_name"] = Path(image["file_name"]).name
        source = copy(content, content["images"][0]["path"].parent, tmp_path)
        content = read_labels(*datasets.split_source(source)).content
    register(source)
    assert evaluate(content, tmp_path)["AP"] == pytest.approx(100)


@pytest.mark.parametrize("split", ["bccd/train", "bccd/val", "aquarium/train", "aquarium/valid"])
def test_perfect_detections_of_real_splits(register, real_data, tmp_path, split):
    folder, _, name = split.partition("/")
    sources = {"bccd": f"bccd/{name}.json:{real_data}/bccd/images", "aquarium": f"data.yaml:{name}"}
    source = sources[folder] if folder == "bccd" else f"aquarium/{sources[folder]}"
    labels, images = f"{real_data}/{source}".split(":")
    register(f"{labels}:{images}")
    assert evaluate(read_labels(labels, images).content, tmp_path)["AP"] == pytest.approx(100)


def test_perfect_detections_of_files_that_failed(register, real_data, tmp_path):
    cases = real_data.parent / "cases"
    if not cases.is_dir():
        pytest.skip(f"no cases at {cases}")
    for file in sorted(cases.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        if not content.get("annotations"):
            continue
        register(f"{file}:{cases}/images")
        results = evaluate(content, tmp_path / file.stem)
        assert results["AP"] == pytest.approx(100), file.name
        DatasetCatalog.remove("data")
        MetadataCatalog.remove("data")
    for folder in ("yolo_pose", "yolo_same_folder", "yolo_win"):
        source = cases / folder / "data.yaml"
        split = "train" if "train:" in source.read_text() else "val"
        register(f"{source}:{split}")
        content = read_labels(str(source), split).content
        assert evaluate(content, tmp_path / folder)["AP"] == pytest.approx(100), folder
        DatasetCatalog.remove("data")
        MetadataCatalog.remove("data")


def test_image_ids_beyond_int64_are_distinguished(register, tmp_path):
    """Detections on every second image give an AP of about 50."""
    content = make_content(count=10)
    renumber(content, "images", "image_id", {i: i if i % 2 else 2**63 + i for i in range(1, 11)})
    for annotation in content["annotations"]:
        annotation["category_id"] = 1
    register(write(content, tmp_path))
    results = evaluate(content, tmp_path, keep=lambda annotation: annotation["image_id"] < 2**63)
    # Recall 0.5 at precision 1: 51 of COCO's 101 points.
    assert results["AP"] == pytest.approx(100 * 51 / 101)


@pytest.mark.parametrize("count_difficult", [False, True])
@pytest.mark.parametrize("found", ["all", "without difficult", "difficult twice"])
def test_detections_of_difficult_objects_are_ignored(register, tmp_path, count_difficult, found):
    """Pascal VOC's rule by default: any number of detections of difficult objects is neither right
    nor wrong; other detections near them are wrong."""
    content = make_content()
    hard = content["annotations"][::3]
    for annotation in hard:
        annotation["difficult"] = 1
        annotation["category_id"] = 1
    register(write(content, tmp_path))
    assert "object_difficult" in MetadataCatalog.get("data").remarks
    shown = {**content, "annotations": [*content["annotations"]]}
    if found == "without difficult":
        shown["annotations"] = [x for x in content["annotations"] if "difficult" not in x]
    if found == "difficult twice":
        shown["annotations"] += hard
    results = evaluate(shown, tmp_path, "TEST.COUNT_DIFFICULT", count_difficult)
    perfect = results["AP"] == pytest.approx(100)
    assert perfect == (found == "all" or not count_difficult)


def test_small_box_inside_a_difficult_object_is_wrong(register, tmp_path):
    """The IoU decides, unlike for a crowd."""
    content = make_content(count=1, objects=2)
    for annotation in content["annotations"]:
        annotation |= {"category_id": 1, "bbox": [10, 10, 60, 60]}
    content["annotations"][0]["difficult"] = 1
    content["annotations"][1]["bbox"] = [80, 80, 10, 10]
    register(write(content, tmp_path))
    wrong = {**content["annotations"][0], "bbox": [20, 20, 10, 10]}
    results = evaluate({**content, "annotations": [wrong, *content["annotations"]]}, tmp_path)
    assert results["AP"] == pytest.approx(50)


def test_clipped_object_matches_its_visible_part(register, tmp_path):
    content = make_content(count=2, objects=1)
    whole, inside = [60, 60, 80, 80], [60, 60, 40, 40]
    for annotation in content["annotations"]:
        annotation |= {"category_id": 1, "bbox": whole}
    register(write(content, tmp_path))
    for box in (whole, inside):
        shown = [{**x, "bbox": box} for x in content["annotations"]]
        assert evaluate({**content, "annotations": shown}, tmp_path)["AP"] == pytest.approx(100)
    assert DatasetCatalog.get("data")[0]["annotations"][0]["bbox"] == inside


def test_dropped_objects_of_other_registrations(tmp_path, caplog):
    """A json that Detectron2's own function registers: objects that training drops do not count,
    and the log has their number."""
    content = make_odd(4)
    for annotation in content["annotations"]:
        annotation |= {"area": 50.0, "iscrowd": 0}
    (tmp_path / "labels.json").write_text(json.dumps(content))
    register_coco_instances("data", {}, str(tmp_path / "labels.json"), str(tmp_path))
    try:
        DatasetCatalog.get("data")
        logging.getLogger("detectron2").propagate = True
        results = evaluate(content, tmp_path)
    finally:
        logging.getLogger("detectron2").propagate = False
        DatasetCatalog.remove("data")
        MetadataCatalog.remove("data")
    assert results["AP"] == pytest.approx(100)
    assert "annotations do not count: they have no area" in caplog.text


def test_data_without_classes_in_a_json(tmp_path):
    """Detectron2 writes the records as a json."""
    objects = [{"bbox": [5, 5, 20, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}]
    record = {"file_name": "a.png", "image_id": 0, "height": SIDE, "width": SIDE}
    DatasetCatalog.register("data", lambda: [{**record, "annotations": objects}])
    MetadataCatalog.get("data").set(thing_classes=["a", "b"], evaluator_type="coco")
    content = {"images": [{**record, "id": 0}], "categories": [{"id": 1, "name": "b"}]}
    content["annotations"] = [{**objects[0], "image_id": 0}]
    try:
        assert evaluate(content, tmp_path)["AP"] == pytest.approx(100)
    finally:
        DatasetCatalog.remove("data")
        MetadataCatalog.remove("data")


@pytest.mark.parametrize("fault", ["crowd of no image", "class of no model", "nameless class"])
def test_faulty_json_of_other_registrations(tmp_path, fault):
    """Faults that Detectron2's evaluator accepts, also id 0."""
    content = make_content()
    for i, annotation in enumerate(content["annotations"]):
        annotation |= {"id": i, "area": 50.0, "iscrowd": 0}
    shown = json.loads(json.dumps(content))
    if fault == "crowd of no image":
        odd = {**content["annotations"][0], "id": 99, "iscrowd": 1, "image_id": 77}
        content["annotations"].append(odd)
    if fault == "nameless class":
        content["categories"].append({"id": 4, "name": ""})
    number = {1: 0, 2: 1, 3: 2}
    names = [c["name"] for c in content["categories"]]
    if fault == "class of no model":
        number, names = {1: 0, 2: 1}, names[:2]
        shown["annotations"] = [x for x in shown["annotations"] if x["category_id"] < 3]
    if fault == "nameless class":
        number[4] = 3
    (tmp_path / "labels.json").write_text(json.dumps(content))
    DatasetCatalog.register("data", lambda: [])
    metadata = {"json_file": str(tmp_path / "labels.json"), "evaluator_type": "coco"}
    metadata |= {"thing_classes": names, "thing_dataset_id_to_contiguous_id": number}
    MetadataCatalog.get("data").set(**metadata)
    assert evaluate(shown, tmp_path)["AP"] == pytest.approx(100)


def test_difficult_crowd_is_a_crowd(register, tmp_path):
    content = make_content(count=1, objects=2)
    for annotation, box in zip(
        content["annotations"], ([10, 10, 60, 60], [80, 80, 9, 9]), strict=True
    ):
        annotation |= {"category_id": 1, "bbox": box}
    content["annotations"][0] |= {"iscrowd": 1, "difficult": 1}
    register(write(content, tmp_path))
    inside = [{**content["annotations"][0], "bbox": [x, 20, 10, 10]} for x in (20, 40)]
    shown = {**content, "annotations": [*inside, content["annotations"][1]]}
    assert evaluate(shown, tmp_path)["AP"] == pytest.approx(100)


def test_difficult_objects_alone_measure_nothing(register, tmp_path):
    content = make_content(count=1)
    for annotation in content["annotations"]:
        annotation["difficult"] = 1
    register(write(content, tmp_path))
    assert not datasets.has_objects("data")
    assert MetadataCatalog.get("data").to_learn == 5


def test_results_keep_the_ids_of_the_file(register, tmp_path):
    content = make_odd(1)
    register(write(content, tmp_path))
    evaluate(content, tmp_path)
    (file,) = tmp_path.rglob("coco_instances_results.json")
    results = json.loads(file.read_text())
    assert {x["image_id"] for x in results} <= {x["id"] for x in content["images"]}
    assert {x["category_id"] for x in results} <= {x["id"] for x in content["categories"]}


def test_masks_and_keypoints_equal_detectron2s(register, tmp_path):
    """Records of a valid json equal those of Detectron2's reader."""
    content = make_content(count=1, objects=3)
    polygon = [1.0, 1, 9, 1, 9, 9]
    shapes = ([polygon, [1, 2, 3, 4]], {"size": [SIDE, SIDE], "counts": [50, 9, 9941]}, [polygon])
    for annotation, shape in zip(content["annotations"], shapes, strict=True):
        annotation |= {"area": 9.0, "iscrowd": 0, "segmentation": shape, "keypoints": [3, 4, 2]}
    source = write(content, tmp_path)
    register(source)
    own = DatasetCatalog.get("data")
    theirs = load_coco_json(*source.split(":"), "unused")
    MetadataCatalog.remove("unused")
    assert own == theirs


def test_unusable_segmentations_leave_their_boxes(register, tmp_path):
    content = make_content(count=1, objects=5)
    shapes = ([[]], [1, 2, 9, 2, 9, 9], [[1, 2, 9, 9]], "1 2", {"size": [48, 64]})
    for annotation, shape in zip(content["annotations"], shapes, strict=True):
        annotation["segmentation"] = shape
    register(write(content, tmp_path))
    (record,) = DatasetCatalog.get("data")
    assert len(record["annotations"]) == 5
    assert not any("segmentation" in x for x in record["annotations"])
    assert "segmentation_unusable" in MetadataCatalog.get("data").remarks


def test_changed_file_is_read_again(register, tmp_path):
    """In a notebook: a class is added, and the file registered again."""
    content = make_content()
    register(write(content, tmp_path))
    content["categories"].append({"id": 9, "name": "new"})
    content["annotations"][0]["category_id"] = 9
    register(write(content, tmp_path))
    assert MetadataCatalog.get("data").thing_classes[-1] == "new"
    assert evaluate(content, tmp_path)["AP"] == pytest.approx(100)
    content["annotations"][0]["category_id"] = 1
    register(write(content, tmp_path))
    assert evaluate(content, tmp_path)["AP"] == pytest.approx(100)


def test_statistics_keep_large_ids(tmp_path):
    content = make_content(count=2)
    renumber(content, "images", "image_id", {1: 1, 2: 2**63 + 5})
    _, objects = find_in_json(content)
    sampling = {"ATSS": build_sampling(get_config("ATSS_R_50_FPN_1x"))}
    rows = measure(content, objects, sampling, (64, 64))
    assert {row["image_id"] for row in rows} == {1, 2**63 + 5}


def test_mask_models_skip_objects_without_masks(tmp_path):
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    cfg = make_cfg("MODEL.MASK_ON", True)
    objects = [
        {"bbox": [5, 5, 20, 20], "bbox_mode": 1, "category_id": 0},
        {"bbox": [30, 30, 20, 20], "bbox_mode": 1, "category_id": 0},
    ]
    objects[1]["segmentation"] = [[30.0, 30, 50, 30, 50, 50]]
    record = {"file_name": str(tmp_path / "a.png"), "annotations": objects}
    assert len(Mapper(cfg, is_train=True)(record)["instances"]) == 1


def test_processes_wait_outside_collectives(monkeypatch, tmp_path):
    """Detectron2 gathers the detections, then the first process evaluates."""
    calls = []
    monkeypatch.setattr("atss.engine.evaluation.wait_for_all", lambda: calls.append("wait"))

    class Evaluator(DatasetEvaluator):
        def evaluate(self):
            calls.append("evaluate")
            return {"bbox": {}}

    monkeypatch.setattr("atss.engine.trainer.build_evaluator", lambda *_: Evaluator())
    assert Trainer.build_evaluator(make_cfg(), "data").evaluate() == {"bbox": {}}
    assert calls == ["wait", "evaluate", "wait"]


def detect(content: dict, evaluator: DatasetEvaluator, seed: int = 0) -> DatasetEvaluator:
    """Return the evaluator after noisy copies of a file's objects, and on background."""
    rng = np.random.default_rng(seed)
    evaluator.reset()
    for image in content["images"]:
        own = [x for x in content["annotations"] if x["image_id"] == image["id"]]
        boxes = np.array([x["bbox"] for x in own for _ in range(4)], dtype=float).reshape(-1, 4)
        boxes += rng.normal(0, 0.1, boxes.shape) * boxes[:, 2:].repeat(2, axis=1)
        boxes = torch.from_numpy(np.concatenate([boxes, rng.uniform(1, 50, (30, 4))]))
        boxes[:, 2:] = boxes[:, :2] + boxes[:, 2:].abs()
        classes = [x["category_id"] - 1 for x in own for _ in range(4)] + [0, 1, 2] * 10
        instances = Instances((image["height"], image["width"]), pred_boxes=Boxes(boxes))
        # Few digits: equal scores of several images are ordered by image id.
        instances.scores = torch.from_numpy(rng.uniform(0, 1, len(boxes)).round(2))
        instances.pred_classes = torch.tensor(classes)
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    return evaluator


@pytest.mark.parametrize("images", [None, [2, 5]])
def test_hotcoco_and_pycocotools_give_equal_results(images, register, tmp_path, monkeypatch):
    content = make_content(count=12, objects=5)
    for annotation in content["annotations"][::7]:
        annotation["iscrowd"] = 1
    content["images"].reverse()
    register(write(content, tmp_path))
    cfg = make_cfg("OUTPUT_DIR", str(tmp_path))
    evaluator = detect(content, build_evaluator(cfg, "data"))
    fast = evaluator.evaluate(images)["bbox"]
    assert images is None or fast["AP"] != evaluator.evaluate()["bbox"]["AP"]
    monkeypatch.setattr("atss.engine.coco.hotcoco", None)
    slow = detect(content, build_evaluator(cfg, "data")).evaluate(images)["bbox"]
    assert fast == pytest.approx(slow, abs=1e-9, nan_ok=True)
    assert 5 < fast["AP"] < 95
    classes = [f"{key}-class {i}" for key in ("AP", "AP50") for i in (1, 2, 3)]
    assert [x for x in fast if "-" in x] == classes
    aps = [fast[x] for x in classes[3:]]
    assert fast["AP50"] == pytest.approx(np.nanmean(aps))


@pytest.mark.parametrize("library", ["hotcoco", "pycocotools"])
def test_ap_of_more_objects_than_100(library, register, tmp_path, monkeypatch, caplog):
    """225 perfect detections: recall 100 / 225 at precision 1 is 45 of COCO's 101 points."""
    content = make_content(count=1, objects=0)
    for i in range(225):
        ids = {"id": i + 1, "image_id": 1, "category_id": 1}
        content["annotations"].append(ids | {"bbox": [i % 15 * 6, i // 15 * 6, 5, 5]})
    register(write(content, tmp_path))
    if library == "pycocotools":
        monkeypatch.setattr("atss.engine.coco.hotcoco", None)
    caplog.set_level(logging.INFO, "atss")
    least = evaluate(content, tmp_path)
    assert [least[x] for x in ("AP", "AP50", "APs")] == pytest.approx([100 * 45 / 101] * 3)
    assert least["objects_beyond_limit"] == 125
    assert "max_detections" not in least
    assert "125 of 225 objects, in 1 images, are beyond TEST.DETECT" in caplog.text
    assert "set it to 225 or more" in caplog.text
    caplog.clear()
    whole = evaluate(content, tmp_path, "TEST.DETECTIONS_PER_IMAGE", 300)
    assert [whole[x] for x in ("AP", "AP50", "APs", "AP-class 1")] == pytest.approx([100] * 4)
    assert whole["max_detections"] == 300
    assert "objects_beyond_limit" not in whole
    assert "TEST.DETECTIONS_PER_IMAGE 300: AP is that of at most 300" in caplog.text
    assert " lost" not in caplog.text
    few = evaluate(content, tmp_path, "TEST.DETECTIONS_PER_IMAGE", 50)
    assert (few["AP"], few["objects_beyond_limit"]) == (least["AP"], 175)


def test_log_names_the_library_that_evaluated(register, tmp_path, monkeypatch, caplog):
    content = make_content()
    register(write(content, tmp_path))
    caplog.set_level(logging.INFO, "atss")
    evaluate_with = partial(evaluate, content, tmp_path)
    keep = {"keep": lambda annotation: annotation["category_id"] == 1}
    evaluate_with(**keep)
    assert "Evaluation by hotcoco, whose results equal those of pycocotools" in caplog.text
    monkeypatch.setattr("atss.engine.coco.hotcoco", None)
    evaluate_with(**keep)
    assert "Evaluation by pycocotools: hotcoco is not installed" in caplog.text
