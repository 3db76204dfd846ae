"""Labels are read once, and again if they or the way of reading change."""

import json
import os
import pickle
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import broken
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from portalocker.exceptions import LockException

from atss.data import columns, datasets
from atss.labels.formats import Reading


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of the cache, which does not exist yet."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/atss_labels"


@pytest.fixture
def reads(monkeypatch):
    """Annotations that were read, in order."""
    done, read = [], datasets.read_labels
    monkeypatch.setattr(datasets, "read_labels", lambda *x: done.append(x[0]) or read(*x))
    return done


def write(form, folder):
    """Return annotations:images of four images in a format, with the files of labels in the
    folder."""
    content = broken.make_data(folder)
    if form == "json":
        (folder / "a.json").write_text(json.dumps(content))
        return f"{folder}/a.json:{folder}/images"
    if form == "voc":
        return f"{broken.write_voc(content, folder)}:."
    yaml = broken.write_yolo(content, folder, val="images")
    if form == "yolo folder":
        (folder / "classes.txt").write_text("cat\ndog\n")
        yaml.unlink()
        return f"{folder}:."
    return f"{yaml}:train"


FORMATS = ("json", "yaml", "yolo folder", "voc")
LABELS = {"json": "a.json", "voc": "*/a.xml"}
CHANGES = {"json": ("16, 20", "15, 20"), "voc": (">cat<", ">dog<")}


@pytest.mark.parametrize("form", FORMATS)
def test_second_open_reads_nothing(form, tmp_path, reads, monkeypatch):
    """By its times, or by the content of a recently written file."""
    source = write(form, tmp_path / "data")
    for recent in (3600, -3600):
        monkeypatch.setattr(columns, "RECENT", recent)
        reads.clear()
        for name in ("a", "b", "a"):
            datasets.register(f"{name}={source}")
        assert len(reads) <= 1
    assert DatasetCatalog.get("a") == DatasetCatalog.get("b")


def test_copy_of_a_json_is_found_by_its_content(tmp_path, reads):
    source = write("json", tmp_path / "data")
    datasets.register(f"a={source}")
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    (tmp_path / "copy/a.json").rename(tmp_path / "copy/b.json")
    datasets.register(f"b={tmp_path}/copy/b.json:{tmp_path}/copy/images")
    assert len(reads) == 1
    assert DatasetCatalog.get("b")[0]["file_name"] == f"{tmp_path}/copy/images/a.png"


@pytest.mark.parametrize("recent", [3600, -3600])
@pytest.mark.parametrize("form", FORMATS)
def test_changed_labels_are_read_again(form, recent, tmp_path, monkeypatch):
    """In place, with the same length and time of modification."""
    monkeypatch.setattr(columns, "RECENT", recent)
    source = write(form, tmp_path / "data")
    datasets.register(f"a={source}")
    before = DatasetCatalog.get("a")
    (file,) = (tmp_path / "data").rglob(LABELS.get(form, "labels/a.txt"))
    stat, text = file.stat(), file.read_text()
    file.write_text(text.replace(*CHANGES.get(form, ("0 ", "1 ")), 1))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert len(text) == file.stat().st_size
    datasets.register(f"a={source}")
    assert DatasetCatalog.get("a") != before
    file.write_text(text)
    datasets.register(f"a={source}")
    assert DatasetCatalog.get("a") == before


@pytest.mark.parametrize("form", FORMATS)
def test_change_within_one_tick_of_the_clock(form, tmp_path, monkeypatch):
    """In a file system that gives both writes one time."""
    source, now, stat = write(form, tmp_path / "data"), time.time_ns(), os.stat

    def coarse(path, **options):
        x = stat(path, **options)
        size = {"st_mode": x.st_mode, "st_size": x.st_size, "st_ino": x.st_ino}
        return SimpleNamespace(**size, st_mtime_ns=now, st_ctime_ns=now)

    monkeypatch.setattr(columns, "RECENT", 3600)
    (file,) = (tmp_path / "data").rglob(LABELS.get(form, "labels/a.txt"))
    text = file.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", coarse)
        datasets.register(f"a={source}")
        before = DatasetCatalog.get("a")
        file.write_text(text.replace(*CHANGES.get(form, ("0 ", "1 ")), 1))
        datasets.register(f"a={source}")
    assert DatasetCatalog.get("a") != before


@pytest.mark.parametrize("form", FORMATS[1:])
def test_new_and_removed_files_are_noticed(form, tmp_path):
    folder = tmp_path / "data"
    source = write(form, folder)
    datasets.register(f"a={source}")
    (image,) = folder.rglob("d.png")
    (label,) = (x for x in folder.rglob("d.*") if x != image)
    label.unlink()
    datasets.register(f"a={source}")
    assert len(DatasetCatalog.get("a")[3]["annotations"]) == 0
    image.unlink()
    datasets.register(f"a={source}")
    assert len(DatasetCatalog.get("a")) == 3


@pytest.mark.parametrize("by", ["classes", "first pixel", "split", "code"])
def test_each_reading_has_its_columns(by, tmp_path, reads, monkeypatch):
    form = {"first pixel": "voc", "split": "yaml"}.get(by, "json")
    source = write(form, tmp_path / "data")
    datasets.register(f"a={source}")
    reading = {"classes": Reading({"dog": ["dog"]}), "first pixel": Reading({}, 0)}.get(by)
    if by == "split":
        source = f"{tmp_path}/data/data.yaml:val"
    if by == "code":
        monkeypatch.setattr(columns, "_code", lambda: "other")
    datasets.register(f"b={source}", reading or Reading({}))
    assert len(reads) == 2


def test_backslashes_are_read_as_the_folder_has_them(tmp_path):
    """With two folders of images for one json."""
    labels, images = write("json", tmp_path / "data").split(":")
    content = json.loads(Path(labels).read_text())
    content["images"][0]["file_name"] = "x\\a.png"
    Path(labels).write_text(json.dumps(content))
    shutil.copytree(images, tmp_path / "other/x")
    for name, folder in (("a", images), ("b", tmp_path / "other"), ("a", images)):
        datasets.register(f"{name}={labels}:{folder}")
    found = [DatasetCatalog.get(name)[0]["file_name"] for name in ("a", "b")]
    assert found == [f"{images}/x\\a.png", f"{tmp_path}/other/x/a.png"]


def test_killed_writer_leaves_nothing_to_read(cache, tmp_path, reads, monkeypatch):
    source = write("json", tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr(columns.shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(columns.np, "save", lambda *_: pickle.loads(b"killed"))
        with pytest.raises(pickle.UnpicklingError):
            datasets.register(f"a={source}")
    (unfinished,) = cache.glob(f"{columns.UNFINISHED}*")
    datasets.register(f"a={source}")
    assert len(reads) == 2
    assert len(DatasetCatalog.get("a")) == 4
    # Removed a day later, by the next write.
    day_before = time.time() - 1.1 * 86400
    os.utime(unfinished, (day_before, day_before))
    datasets.register(f"b={write('voc', tmp_path / 'other')}")
    assert not unfinished.exists()


def test_opened_folders_stay(cache, tmp_path):
    sources = [write("json", tmp_path / "a"), write("voc", tmp_path / "b")]
    long_ago = time.time() - 31 * 86400
    for name, source in zip("ab", sources, strict=True):
        datasets.register(f"{name}={source}")
    for entry in cache.iterdir():
        os.utime(entry, (long_ago, long_ago))
    datasets.register(f"a={sources[0]}")
    kept = {x.name for x in cache.iterdir() if x.stat().st_mtime > long_ago + 1}
    datasets.register(f"c={write('yaml', tmp_path / 'c')}")
    assert kept < {x.name for x in cache.iterdir()}
    assert len([x for x in cache.iterdir() if x.is_dir()]) == 2


@pytest.mark.parametrize("file", ["images.jsonl", "counts.npy", "about.json"])
def test_damaged_columns_are_written_again(file, cache, tmp_path, reads):
    source = write("json", tmp_path / "data")
    datasets.register(f"a={source}")
    before = DatasetCatalog.get("a")
    (path,) = cache.glob(f"*/{file}")
    for content in (path.read_bytes()[:-9], b""):
        path.unlink()
        path.write_bytes(content)
        datasets.register(f"a={source}")
        assert DatasetCatalog.get("a") == before
    assert len(reads) == 3


@pytest.mark.parametrize("locks", [True, False])
def test_two_processes_at_once(locks, cache, tmp_path, reads, monkeypatch):
    """One waits while the other reads or, without locks, reads, too."""
    source = write("json", tmp_path / "data")
    read, others = datasets.read_labels, []

    def register_elsewhere():
        if not others:
            others.append("other")
            datasets.register(f"other={source}")

    class Lock:
        def __init__(self, path):
            self.path = path

        def __enter__(self):
            if not locks:
                raise LockException("no locks")
            register_elsewhere()

        def __exit__(self, *_):
            pass

    def read_meanwhile(*args):
        if not locks:
            register_elsewhere()
        return read(*args)

    monkeypatch.setattr(columns, "file_lock", Lock)
    monkeypatch.setattr(datasets, "read_labels", read_meanwhile)
    datasets.register(f"a={source}")
    assert DatasetCatalog.get("a") == DatasetCatalog.get("other")
    assert len(reads) == (1 if locks else 2)
    assert len([x for x in cache.iterdir() if x.is_dir()]) == 1


def test_labels_changed_during_reading_are_refused(tmp_path, monkeypatch):
    source, read = write("json", tmp_path / "data"), datasets.read_labels
    file = tmp_path / "data/a.json"

    def read_and_change(*args):
        labels = read(*args)
        file.write_text(file.read_text().replace('"cat"', '"cow"'))
        return labels

    monkeypatch.setattr(datasets, "read_labels", read_and_change)
    with pytest.raises(ValueError, match=r"data/a\.json: the labels changed while they were read"):
        datasets.register(f"a={source}")
    datasets.register(f"a={source}")
    assert MetadataCatalog.get("a").thing_classes == ["cow", "dog"]


@pytest.mark.parametrize("form", FORMATS)
def test_labels_may_age_during_reading(form, tmp_path, monkeypatch):
    source, read = write(form, tmp_path / "data"), datasets.read_labels
    later = time.time_ns() + 10**10

    def read_for_long(*args):
        labels = read(*args)
        monkeypatch.setattr(time, "time_ns", lambda: later)
        return labels

    monkeypatch.setattr(datasets, "read_labels", read_for_long)
    datasets.register(f"a={source}")


@pytest.mark.parametrize("text", ["", "/", "..", "{tmp_path}/other", "\xff"])
def test_malformed_key_is_ignored(text, cache, tmp_path, reads):
    """It may be damaged, or another user's."""
    kept = tmp_path / "other" / "kept"
    kept.parent.mkdir()
    kept.touch()
    source = write("json", tmp_path / "data")
    datasets.register(f"a={source}")
    (index,) = cache.glob("*.key")
    index.write_bytes(text.format(tmp_path=tmp_path).encode("latin1"))
    datasets.register(f"a={source}")
    assert len(reads) == 1
    assert kept.exists()


def test_unwritable_cache_is_replaced(cache, tmp_path, monkeypatch, caplog):
    cache.parent.mkdir()
    cache.write_text("")
    datasets.register(f"a={write('json', tmp_path / 'data')}")
    assert f"cannot write {cache}: this process keeps labels in" in caplog.text
    assert len(DatasetCatalog.get("a")) == 4


def test_full_disk_is_named(cache, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(columns.np, "save", full)
    message = f"cannot write the labels of .*a.json into {cache}: No space left on device; set FV"
    with pytest.raises(ValueError, match=message):
        datasets.register(f"a={write('json', tmp_path / 'data')}")
    assert not list(cache.glob(f"{columns.UNFINISHED}*"))


def test_pickled_columns_are_mapped_again(tmp_path):
    """And not copied to it."""
    datasets.register(f"a={write('json', tmp_path / 'data')}")
    packed = pickle.dumps(DatasetCatalog["a"])
    assert len(packed) < 1000
    assert pickle.loads(packed)() == DatasetCatalog.get("a")


@pytest.mark.parametrize("change", ["text ids", "large ids", "fractions", "empty", "surrogate"])
def test_records_equal_detectron2s(change, tmp_path):
    """For any ids and numbers."""
    source = write("json", tmp_path / "data")
    file = tmp_path / "data/a.json"
    content = json.loads(file.read_text())
    new_id = {"text ids": "image {}".format, "large ids": lambda i: 2**64 + i}.get(change, int)
    for image in content["images"]:
        image["id"] = new_id(image["id"])
        if change == "fractions":
            image["width"] = float(image["width"])
        if change == "surrogate":
            image["file_name"] = "\udcff" + image["file_name"]
    for annotation in content["annotations"]:
        annotation["image_id"] = new_id(annotation["image_id"])
        if change == "fractions":
            annotation["bbox"] = [x + 0.1 for x in annotation["bbox"]]
    if change == "empty":
        content["annotations"] = []
    file.write_text(json.dumps(content))
    datasets.register(f"a={source}")
    records = DatasetCatalog.get("a")
    for record, image in zip(records, content["images"], strict=True):
        assert record["image_id"] == image["id"]
        assert type(record["width"]) is type(image["width"])
        assert record["file_name"] == f"{tmp_path}/data/images/{image['file_name']}"
        boxes = [x["bbox"] for x in content["annotations"] if x["image_id"] == image["id"]]
        assert [x["bbox"] for x in record["annotations"]] == boxes
