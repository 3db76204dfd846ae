"""Random changes of label files: training and tools/check_dataset.py agree, in one line."""

import random
import shutil
import warnings

import broken
import pytest
from conftest import make_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts

from atss.data.datasets import refuse_unannotated, register
from atss.data.mapper import Mapper
from atss.labels.check import check
from atss.labels.findings import ERROR
from atss.labels.formats import read_labels

# fmt: off
TOKENS = [
    "nan", "-1", "1e999", "null", "true", "[]", "{}", '""', "''", "0", "99999999999999999999",
    "7.5", "\x00", "é", "\n", "<", ">", "&x;", '"', ":", ",", "!!python/name:os.system", "1_0",
]
# fmt: on


def write(root, lvis=False, voc=False, yolo=False):
    """Write a valid data set; return annotations, images, and the files to change."""
    content = broken.make_data(root)
    if voc:
        broken.write_voc(content, root)
        files = [*(root / "Annotations").iterdir(), root / "ImageSets/Main/train.txt"]
        return root, "train", sorted(files)
    if yolo:
        yaml = broken.write_yolo(content, root)
        return yaml, "train", [yaml, *sorted((root / "labels").iterdir())]
    if lvis:
        broken.to_lvis(content)
    json_file = root / "annotations.json"
    json_file.write_text(broken.json.dumps(content))
    return json_file, root if lvis else root / "images", [json_file]


def mutate(data: bytes, draw: random.Random) -> bytes:
    """Make one to three changes: remove, double or replace bytes or words."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        a, b = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        b = min(b, a + draw.choice((1, 2, 8, 200)))
        token = draw.choice(TOKENS).encode()
        words = [i for i in range(len(data)) if data[i : i + 1].isalnum()]
        start = draw.choice(words) if words else 0
        end = start
        while data[end : end + 1].isalnum() or data[end : end + 1] == b".":
            end += 1
        data = draw.choice(
            [
                data[:a] + data[b:],
                data[:b] + data[a:],
                data[:a] + token + data[a:],
                data[:start] + token + data[end:],
                data[:start] + token + data[end:],
                data[:start] + data[end:],
                data[:a] + bytes([draw.randrange(256)]) + data[a + 1 :],
            ]
        )
    return data


def by_training(annotations, images, cfg):
    """Return the error of training, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            register(f"fuzz={annotations}:{images}")
            refuse_unannotated(["fuzz"])
            records = get_detection_dataset_dicts(["fuzz"], filter_empty=False)
            mapper = Mapper(cfg, is_train=True)
            for record in records:
                mapper(record)
    except (ValueError, OSError) as error:
        return str(error)
    finally:
        if "fuzz" in DatasetCatalog:
            DatasetCatalog.remove("fuzz")
            MetadataCatalog.remove("fuzz")
    return None


def by_check(annotations, images):
    """Return the findings of check_dataset.py that stop training, or None."""
    try:
        report = check(read_labels(str(annotations), str(images)), [(48, 64)], filter_empty=False)
    except (ValueError, OSError) as error:
        return str(error)
    findings = [f for f in report.findings if f.level == ERROR or f.kind == "nothing_annotated"]
    return "; ".join(finding.sentence() for finding in findings) or None


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["coco", "lvis", "yolo", "voc"])
def test_training_and_check_agree(form, count, tmp_path):
    cfg = make_cfg("INPUT.MIN_SIZE_TRAIN", (48,), "INPUT.RANDOM_FLIP", "none")
    draw = random.Random(count)
    options = {} if form == "coco" else {form: True}
    annotations, images, files = write(tmp_path / "data", **options)
    kept = {file: file.read_bytes() for file in files}
    verdicts = []
    for i in range(count):
        file = draw.choice(files)
        file.write_bytes(mutate(kept[file], draw))
        stops, reports = by_training(annotations, images, cfg), by_check(annotations, images)
        if (stops is None) != (reports is None) or "\n" in f"{stops}{reports}":
            shutil.copy(file, tmp_path / "case")
            raise AssertionError(f"{i}: {tmp_path}/case ({file.name}): {stops!r} but {reports!r}")
        verdicts.append(stops is None)
        file.write_bytes(kept[file])
    assert 0 < sum(verdicts) < count
