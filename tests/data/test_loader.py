"""Training images and random numbers follow from seed and iteration."""

import json
import math
import os
import random
import signal
import threading
from itertools import islice, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from detectron2.utils import comm
from PIL import Image

from atss.data import datasets
from atss.data import loader as loader_module
from atss.data.loader import LOADER_DIED, WatchedLoader, build_train_loader, seeded
from atss.data.mapper import Mapper, without_augmentation
from atss.data.samplers import format_report, repeat_factors
from atss.engine import Trainer
from atss.engine.explain import explain

IMAGES = 10


@pytest.fixture
def records():
    """Data set "tiny": 10 images, 7 of them wide, 1 with a class of its own."""
    name = "tiny"
    images = [
        {
            "file_name": f"{i}.png",
            "image_id": i,
            "width": 9,
            "height": 4 if i < 7 else 16,
            "annotations": [{"category_id": int(i == 0), "iscrowd": 0}],
        }
        for i in range(IMAGES)
    ]
    DatasetCatalog.register(name, lambda: images)
    MetadataCatalog.get(name).thing_classes = ["common", "rare"]
    yield images
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def draw(record):
    """A mapper that returns the image's id and a number of each generator."""
    draws = (random.random(), np.random.rand(), torch.rand(()).item())
    return {"id": record["image_id"], "wide": record["width"] > record["height"], "draws": draws}


def make_loader(*opts, mapper=draw, late=None):
    cfg = make_cfg("DATASETS.TRAIN", ("tiny",), "SEED", 3, "SOLVER.IMS_PER_BATCH", 4)
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0, *opts])
    return build_train_loader(cfg, mapper, late)


def take(loader, count):
    return list(islice(iter(loader), count))


@pytest.fixture
def be(monkeypatch):
    """be(rank, processes): replace Detectron2's rank and number of processes."""

    def set_rank(rank, processes):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: processes)
        monkeypatch.setattr(comm, "all_gather", lambda own: [own] * processes)

    return set_rank


def test_epochs_are_permutations_dealt_to_processes(records, be):
    streams = []
    for rank in range(2):
        be(rank, 2)
        batches = take(make_loader("DATALOADER.ASPECT_RATIO_GROUPING", False), 15)
        assert {len(batch) for batch in batches} == {2}
        streams.append([image for batch in batches for image in batch])
    stream = [image for pair in zip(*streams, strict=True) for image in pair]
    order = [image["id"] for image in stream]
    epochs = [order[i : i + IMAGES] for i in range(0, 60, IMAGES)]
    assert all(sorted(epoch) == list(range(IMAGES)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6
    be(0, 1)
    alone = take(make_loader("DATALOADER.ASPECT_RATIO_GROUPING", False), 15)
    assert [image for batch in alone for image in batch] == stream


def test_batches_have_one_group_and_no_image_is_lost(records):
    batches = take(make_loader(), 50)
    assert all(len({image["wide"] for image in batch}) == 1 for batch in batches)
    assert {batch[0]["wide"] for batch in batches} == {True, False}
    counts = np.bincount([image["id"] for batch in batches for image in batch])
    # At most three of each group wait for their batch.
    assert counts.sum() == 200
    assert counts.min() >= 20 - 3
    assert counts.max() <= 20 + 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_skip_leads_to_the_same_batches(records, be, rank, workers):
    be(rank, 2)
    whole = take(make_loader(), 30)
    loader = make_loader("DATALOADER.NUM_WORKERS", workers)
    loader.skip(13, 3)
    assert take(loader, 17) == whole[13:]


def test_other_processes_continue_the_stream(records, be):
    """One process, then two, which begin after the thirteenth batch of three."""
    opts = ("DATALOADER.ASPECT_RATIO_GROUPING", False)
    be(0, 1)
    order = [image for batch in take(make_loader(*opts), 20) for image in batch]
    rest = []
    for rank in range(2):
        be(rank, 2)
        loader = make_loader(*opts)
        loader.skip(14, 3, (13, 39))  # and one of the batches of four
        rest += [image for batch in take(loader, 5) for image in batch]
    assert sorted(rest, key=order.index) == order[43:63]


def test_skipped_images_are_not_mapped(records):
    mapped = []
    loader = make_loader(mapper=lambda record: mapped.append(record) or record)
    loader.skip(1000, 3)
    take(loader, 1)
    assert len(mapped) == 4


def test_random_numbers_follow_from_seed_and_position(records):
    plain = take(make_loader(), 30)
    assert take(make_loader(), 30) == plain
    assert take(make_loader("SEED", 4), 30) != plain
    for i in range(3):
        draws = [image["draws"][i] for batch in plain for image in batch]
        assert len(set(draws)) == 120, "two images drew the same"


def test_squares_are_not_wide(records):
    for record, height in zip(records, (8, 9, 10), strict=False):
        record["height"] = height
    assert make_loader().groups[:3].tolist() == [True, False, False]


def test_generators_are_restored_after_an_error(records):
    def fail(record):
        draw(record)
        raise KeyError(record["image_id"])

    seed_all(5)
    expected = draw(records[0])
    seed_all(5)
    with pytest.raises(KeyError):
        take(make_loader(mapper=fail), 1)
    assert draw(records[0]) == expected


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def test_generators_of_the_process_are_untouched(records):
    def draw_all():
        return draw(records[0])["draws"]

    seed_all(0)
    expected = draw_all()
    for workers in (0, 2):
        seed_all(0)
        take(make_loader("DATALOADER.NUM_WORKERS", workers), 3)
        assert draw_all() == expected


def test_rare_classes_are_repeated(records):
    name = "RepeatFactorTrainingSampler"
    opts = ("DATALOADER.SAMPLER_TRAIN", name, "DATALOADER.REPEAT_THRESHOLD", 0.9)
    batches = take(make_loader(*opts, "DATALOADER.ASPECT_RATIO_GROUPING", False), 30)
    counts = np.bincount([image["id"] for batch in batches for image in batch])
    assert counts[0] >= 2 * counts[1:].max()  # sqrt(0.9 / 0.1) = 3 times as often
    loader = make_loader(*opts, "DATALOADER.ASPECT_RATIO_GROUPING", False)
    loader.skip(20, 3)
    assert take(loader, 10) == batches[20:]


@pytest.fixture
def many():
    """ "many" (300 images: half with class 0, 3 % with 1, 1 % with 2 beside 0, the others empty or
    with a crowd of 2), and "few" (20 with class 1)."""
    classes = [[0]] * 147 + [[0, 2]] * 3 + [[1]] * 9 + [[]] * 141

    def images(of, first):
        return [
            {
                "file_name": f"{i}.png",
                "image_id": i,
                "width": 9,
                "height": 9,
                "annotations": [{"category_id": c, "iscrowd": 0} for c in found]
                + [{"category_id": 2, "iscrowd": 1}] * (not found and i % 2),
            }
            for i, found in enumerate(of, start=first)
        ]

    sets = {"many": images(classes, 0), "few": images([[1]] * 20, 300)}
    for name, records in sets.items():
        DatasetCatalog.register(name, lambda records=records: records)
        MetadataCatalog.get(name).thing_classes = ["common", "rare", "beside"]
    yield sets
    for name in sets:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


BOTH = ("DATASETS.TRAIN", ("many", "few"), "DATASETS.TRAIN_REPEAT_FACTOR", [["few", 2.5]])
IMBALANCED = {
    "RepeatFactorTrainingSampler": (
        "DATALOADER.REPEAT_THRESHOLD",
        0.1,
        "DATASETS.TRAIN",
        ("many",),
    ),
    "WeightedTrainingSampler": BOTH,
    "WeightedCategoryTrainingSampler": (*BOTH, "DATALOADER.REPEAT_THRESHOLD", 0.1),
}


def imbalanced(name, *opts):
    return make_loader(
        "DATALOADER.SAMPLER_TRAIN",
        name,
        *IMBALANCED[name],
        "DATALOADER.ASPECT_RATIO_GROUPING",
        False,
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS",
        False,
        *opts,
    )


def count_of(loader, count):
    """Count each image among the first of the loader's stream."""
    return np.bincount(list(islice(loader.sampler(3), count)))


@pytest.mark.parametrize("name", IMBALANCED)
def test_images_come_as_often_as_by_formula(many, name):
    """f of class 1 is 9 of 300, of class 2 it is 3 of 300: crowds do not count."""
    rare, beside = math.sqrt(0.1 / 0.03), math.sqrt(0.1 / 0.01)
    by_class = [1.0] * 147 + [beside] * 3 + [rare] * 9 + [1.0] * 141
    expected = {
        "RepeatFactorTrainingSampler": by_class,
        "WeightedTrainingSampler": [1.0] * 300 + [2.5] * 20,
        "WeightedCategoryTrainingSampler": by_class + [2.5] * 20,
    }[name]
    passes = 400
    counts = count_of(imbalanced(name), int(passes * sum(expected)))
    # Each pass rounds the factor at random: a deviation below 1/2, in the mean of 400 passes below
    # 0.025; four of these.
    np.testing.assert_allclose(counts / passes, expected, atol=0.1)


@pytest.mark.parametrize("names", [("many", "few"), ("few", "many")])
@pytest.mark.parametrize("filter_empty", [True, False])
def test_factors_skip_filtered_images(many, names, filter_empty):
    """The first or the second set has images without objects, which may be left out."""
    many["few"] += many["many"][-5:]
    cfg = make_cfg("DATASETS.TRAIN", names, "DATALOADER.REPEAT_THRESHOLD", 0.1)
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = [["few", 2.5], ["many", 1.5]]
    cfg.DATALOADER.SAMPLER_TRAIN = "WeightedTrainingSampler"
    factors = repeat_factors(cfg, datasets.open_records(names, filter_empty))
    kept = {"many": [1.5] * 159, "few": [2.5] * 20}
    if not filter_empty:
        kept = {"many": [1.5] * 300, "few": [2.5] * 25}
    assert factors.tolist() == kept[names[0]] + kept[names[1]]


def test_factors_of_a_single_class(many):
    cfg = make_cfg("DATASETS.TRAIN", ("few",), "DATALOADER.REPEAT_THRESHOLD", 4.0)
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    assert repeat_factors(cfg, datasets.open_records(("few",), False)).tolist() == [2.0] * 20


def test_table_of_classes(many):
    """Rarest first, by the number of images and not by repetition."""
    for image, c in zip(many["few"], (0, 2, 2), strict=False):
        image["annotations"] = [{"category_id": c}]
    factors = torch.tensor([2.5] + [1.0] * 19)
    table = format_report(datasets.open_records(("few",), False), factors, {1: "one", 3: "three"})
    assert table.splitlines() == [
        "21.5 images per pass, 20 distinct",
        "   images     per pass  factor  class",
        "        0          0.0    0.00  three",
        "        1          2.5    2.50  class 0",
        "        2          2.0    1.00  class 2",
        "       17         17.0    1.00  one",
    ]


@pytest.mark.parametrize("name", ["TrainingSampler", *IMBALANCED])
@pytest.mark.parametrize("filter_empty", [True, False])
def test_registered_and_listed_sets_give_equal_batches(tmp_path, name, filter_empty, caplog):
    """From a json, and from a function that returns a list."""
    rng = random.Random(0)
    images = [{"id": 2 * i, "file_name": f"{i}.png"} for i in range(60)]
    annotations = []
    for image in images:
        image |= {"width": rng.randint(20, 40), "height": 30}
        for _ in range(rng.choice([0, 1, 1, 4])):
            entry = {"id": len(annotations), "image_id": image["id"], "bbox": [1, 2, 3, 4]}
            entry |= {
                "category_id": 3 + int(4 * rng.random() ** 3),
                "iscrowd": rng.randrange(9) < 1,
            }
            annotations.append({**entry, "iscrowd": int(entry["iscrowd"])})
    categories = [{"id": i, "name": f"class {i}"} for i in range(3, 8)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "a.json").write_text(json.dumps(content))
    datasets.register(f"own={tmp_path}/a.json:{tmp_path}")
    found = DatasetCatalog.get("own")
    DatasetCatalog.register("listed", lambda: found)
    MetadataCatalog.get("listed").thing_classes = MetadataCatalog.get("own").thing_classes
    opts = ["DATALOADER.SAMPLER_TRAIN", name, "DATALOADER.REPEAT_THRESHOLD", 0.5]
    opts += ["DATALOADER.FILTER_EMPTY_ANNOTATIONS", filter_empty]
    runs = []
    for sets in (("own", "own"), ("listed", "own"), ("listed", "listed")):
        caplog.clear()
        weights = [[sets[0], 1.5]]
        more = ("DATASETS.TRAIN", sets, "DATASETS.TRAIN_REPEAT_FACTOR", weights)
        with caplog.at_level("INFO", logger="atss.data.loader"):
            built = make_loader(*opts, *more, mapper=lambda x: {**x, **draw(x)})
        batches = take(built, 40)
        messages = [x.getMessage() for x in caplog.records if x.name == "atss.data.loader"]
        runs.append((batches, built.groups.tolist(), messages))
    weighs_sets = name.startswith("Weighted")  # one name for both has one factor
    assert runs[0] == runs[2]
    assert weighs_sets or runs[0] == runs[1]
    assert {x["file_name"] for batch in runs[0][0] for x in batch} <= {
        x["file_name"] for x in found
    }


@pytest.mark.parametrize("name", IMBALANCED)
def test_weighted_streams_resume_and_are_dealt(many, name, be):
    alone = [image for batch in take(imbalanced(name), 60) for image in batch]
    loader = imbalanced(name, "DATALOADER.NUM_WORKERS", 2)
    loader.skip(23, 3)
    resumed = [image for batch in take(loader, 37) for image in batch]
    assert resumed == alone[23 * 4 :]
    streams = []
    for rank in range(2):
        be(rank, 2)
        streams.append([image for batch in take(imbalanced(name), 60) for image in batch])
    assert [image for pair in zip(*streams, strict=True) for image in pair] == alone


def test_factors_below_1_and_without_the_root(many):
    """The least product is 1, and the threshold is met exactly."""
    few = ("DATASETS.TRAIN_REPEAT_FACTOR", [["few", 0.25]], "DATALOADER.REPEAT_SQRT", False)
    counts = count_of(imbalanced("WeightedCategoryTrainingSampler", *few), 80_000)
    per_image = counts / counts[300:].mean()
    assert per_image[0] == pytest.approx(4, rel=0.2)  # of 0.25
    assert per_image[147:150].mean() == pytest.approx(40, rel=0.2)  # 0.1 / 0.01
    assert per_image[150:159].mean() == pytest.approx(40 / 3, rel=0.2)
    assert np.ptp(counts[300:]) <= 1  # once in every pass, and not by chance


def test_log_abridges_many_classes(many, caplog):
    for record in many["many"]:
        record["annotations"] = [{"category_id": record["image_id"] % 30, "iscrowd": 0}]
    MetadataCatalog.pop("many")
    with caplog.at_level("INFO", logger="atss.data.loader"):
        imbalanced("RepeatFactorTrainingSampler")
    assert f"\n{'':31}... 10 more classes ...\n" in caplog.text
    assert caplog.text.count("  class ") == 20


def test_log_lists_repeats_of_classes(many, caplog):
    with caplog.at_level("INFO", logger="atss.data.loader"):
        imbalanced("WeightedCategoryTrainingSampler")
    text = caplog.text
    assert "363.9 images per pass, 320 distinct" in text
    assert "        3          9.5    3.16  beside\n" in text
    assert "       29         66.4    2.29  rare\n" in text
    assert "      150        156.5    1.04  common\n" in text


@pytest.mark.parametrize(
    ("opts", "sentence"),
    [
        (("DATALOADER.REPEAT_THRESHOLD", 0.0), "REPEAT_THRESHOLD must be > 0, got 0.0: "),
        (("DATASETS.TRAIN_REPEAT_FACTOR", []), "needs DATASETS.TRAIN_REPEAT_FACTOR"),
        (
            ("DATASETS.TRAIN_REPEAT_FACTOR", [["other", 2.0]]),
            "has \\['other', 2.0\\]: expected a pair of one of",
        ),
        (("DATASETS.TRAIN_REPEAT_FACTOR", [["few"]]), "has \\['few'\\]: expected a pair of one of"),
        (("DATASETS.TRAIN_REPEAT_FACTOR", [["few", 0]]), "of few must be a number > 0, got 0"),
        (
            ("DATASETS.TRAIN_REPEAT_FACTOR", [["few", math.inf]]),
            "of few must be a number > 0, got inf",
        ),
        (("DATASETS.TRAIN_REPEAT_FACTOR", [["few", "x"]]), "of few must be a number > 0, got 'x'"),
    ],
)
def test_useless_weights_are_refused(many, opts, sentence):
    with pytest.raises(ValueError, match=sentence):
        imbalanced("WeightedCategoryTrainingSampler", *opts)


def test_filter_of_empty_images(records):
    records[2]["annotations"] = []
    for kept, opts in ((9, ()), (10, ("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False))):
        batches = take(make_loader(*opts), 20)
        assert len({image["id"] for batch in batches for image in batch}) == kept


def test_impossible_loaders_are_refused(records, be):
    with pytest.raises(
        ValueError,
        match=r"unknown DATALOADER\.SAMPLER_TRAIN 'Best': choose from \['TrainingSampler'",
    ):
        make_loader("DATALOADER.SAMPLER_TRAIN", "Best")
    be(0, 3)
    with pytest.raises(ValueError, match="IMS_PER_BATCH is 4, which 3 processes cannot share"):
        make_loader()
    be(0, 1)
    del records[5]["height"]
    with pytest.raises(ValueError, match=r"5.png has no width and height in its record"):
        make_loader()
    take(make_loader("DATALOADER.ASPECT_RATIO_GROUPING", False, mapper=dict), 3)


@pytest.mark.parametrize("processes", [1, 3])
def test_evaluation_sees_images_once_and_sizes_together(
    processes, records, tmp_path, be, monkeypatch
):
    rng = random.Random(0)
    for record in records:
        side = rng.choice([32, 48])
        record |= {"file_name": str(tmp_path / record["file_name"]), "width": 40, "height": side}
        del record["annotations"]
        Image.new("RGB", (40, side)).save(record["file_name"])
    cfg = make_cfg("DATALOADER.NUM_WORKERS", 0, "MODEL.ATSS.IMS_PER_BATCH_TEST", 2)
    seen, mixed = [], 0
    for rank in range(processes):
        be(rank, processes)
        monkeypatch.setattr(comm, "get_local_size", lambda: processes)
        for batch in Trainer.build_test_loader(cfg, "tiny"):
            seen += [x["image_id"] for x in batch]
            mixed += len({x["height"] for x in batch}) > 1
    assert sorted(seen) == list(range(IMAGES))
    assert mixed <= processes  # one batch between two sizes


def test_augmentation_ends_at_an_iteration_of_all_processes(records, be):
    """For any number of processes and workers, and after a resume."""
    cfg = ("INPUT.AUGMENT_UNTIL", 0.9, "SOLVER.MAX_ITER", 20)
    for rank, processes in ((0, 1), (0, 2), (1, 2)):
        be(rank, processes)
        loader = make_loader(*cfg, "DATALOADER.ASPECT_RATIO_GROUPING", False, late=lambda x: "late")
        late = [[image == "late" for image in batch] for batch in take(loader, 20)]
        assert late == [[False] * (4 // processes)] * 18 + [[True] * (4 // processes)] * 2
        loader.skip(19, 3)
        assert take(loader, 1) == [["late"] * (4 // processes)]
        loader.skip(17, 3, (8, 16))  # eight batches of half the size
        before, after = ([x == "late" for x in batch] for batch in take(loader, 2))
        assert (any(before), all(after)) == (False, True)


def test_augmentation_does_not_end_by_default(records):
    """With groups, positions run beyond the last iteration."""
    loader = make_loader("SOLVER.MAX_ITER", 19, late=lambda x: "late")
    assert "late" not in [image for batch in take(loader, 19) for image in batch]


def test_boxes_stay_on_their_objects_under_scale_jitter(tmp_path):
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[20:40, 30:60] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    box = {"bbox": [30, 20, 30, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    record = {"file_name": str(tmp_path / "a.png"), "height": 60, "width": 80}
    cfg = make_cfg("INPUT.SCALE_JITTER", [0.5, 2.0], "INPUT.SCALE_JITTER_SIZE", 64)
    mapper = Mapper(cfg, is_train=True)
    for seed in range(20):
        with seeded(seed):
            mapped = mapper(record | {"annotations": [{**box, "iscrowd": 0}]})
        bright = mapped["image"][0] > 200
        for x0, y0, x1, y1 in mapped["instances"].gt_boxes.tensor.round().int().tolist():
            assert bright[y0:y1, x0:x1].float().mean() > 0.8
            assert bright.sum() <= 1.1 * (y1 - y0) * (x1 - x0)


def test_augmentations_follow_the_config(records):
    opts = ("INPUT.COLOR_JITTER", 0.25, "INPUT.CROP.ENABLED", True, "INPUT.FORMAT", "RGB")
    cfg = make_cfg("INPUT.MIN_SIZE_TRAIN", (64,), *opts)
    pixels = np.full((60, 80, 3), (200, 100, 50), np.uint8)

    def seen(cfg):
        augmentations = Mapper(cfg, is_train=True).augmentations
        results = []
        for seed in range(40):
            with seeded(seed):
                image = T.AugInput(pixels.copy())
                augmentations(image)
                results.append(image.image)
        return results

    def ranges(images):
        means = np.array([image.reshape(-1, 3).mean(axis=0) for image in images])
        return means.min(axis=0), means.max(axis=0)

    low, high = ranges(seen(cfg))
    assert (low < (170, 85, 43)).all()
    assert (high > (220, 110, 60)).all()
    plain = seen(without_augmentation(cfg))
    assert {image.shape for image in plain} == {(64, 85, 3)}
    assert ranges(plain)[0].tolist() == ranges(plain)[1].tolist() == [200, 100, 50]
    assert len({image.shape for image in seen(cfg)}) > 1
    jittered = make_cfg("INPUT.SCALE_JITTER", [0.5, 2.0], "INPUT.SCALE_JITTER_SIZE", 48)
    jittered.INPUT.MIN_SIZE_TRAIN = (64,)
    squares = seen(jittered)
    assert {image.shape for image in squares} == {(48, 48, 3)}
    # Padded if it is made small; filled if it is made large.
    shares = [(image == 128).all(axis=2).mean() for image in squares]
    assert min(shares) == 0
    assert max(shares) > 0.6
    assert {im.shape for im in seen(without_augmentation(jittered))} == {(64, 85, 3)}
    # Evaluation only resizes.
    assert [type(a) for a in Mapper(cfg, is_train=False).augmentations.augs] == [
        T.ResizeShortestEdge
    ]


def test_replacements_of_left_out_images_are_reproducible(records):
    """Detectron2's mappers return None to leave out an image."""

    def picky(record):
        return None if record["image_id"] % 2 else draw(record)

    runs = [take(make_loader(mapper=picky), 10) for _ in range(2)]
    assert runs[0] == runs[1]
    found = {image["id"] for batch in runs[0] for image in batch}
    assert found == {0, 2, 4, 6, 8}
    mapped = []
    take(make_loader(mapper=lambda x: mapped.append(x["image_id"]) or picky(x)), 10)
    assert len({after for left_out, after in pairwise(mapped) if left_out % 2}) > 5
    resumed = make_loader(mapper=picky)
    resumed.skip(4, 3)
    assert take(resumed, 6) == runs[0][4:]


def test_mapper_that_leaves_out_everything_is_refused(records):
    with pytest.raises(ValueError, match=r"leaves out 1000 images in a row, .*\.png last"):
        take(make_loader(mapper=lambda record: None), 1)


def test_negative_seed_is_random(records):
    first, second = (take(make_loader("SEED", -1), 2) for _ in range(2))
    assert first != second


def test_objects_without_class_are_refused(records):
    records[3]["annotations"][0]["category_id"] = 2
    with pytest.raises(ValueError, match="data set tiny has an object of category_id 2, but 2 cla"):
        make_loader()


def test_sets_without_images_are_refused(records):
    for record in records:
        record["annotations"] = []
    with pytest.raises(ValueError, match="no image of tiny has objects"):
        make_loader()
    records.clear()
    with pytest.raises(ValueError, match="data set tiny has no images"):
        make_loader()


def test_log_counts_objects(records, caplog):
    records[4]["annotations"] = []
    with caplog.at_level("INFO", logger="atss.data.loader"):
        make_loader()
    assert "9 training images; 1 without objects left out" in caplog.text
    assert "        1  rare\n        8  common" in caplog.text


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_dataloader_keys_reach_torch(records, monkeypatch, workers, device):
    built = []
    monkeypatch.setattr(WatchedLoader, "__init__", lambda _, *__, **x: built.append(x))
    opts = (
        "DATALOADER.NUM_WORKERS",
        workers,
        "DATALOADER.PIN_MEMORY",
        True,
        "MODEL.DEVICE",
        device,
    )
    opts += ("DATALOADER.TIMEOUT", 7, "DATALOADER.PREFETCH_FACTOR", 5)
    opts += ("DATALOADER.PERSISTENT_WORKERS", True)
    monkeypatch.setattr(WatchedLoader, "__iter__", lambda _: iter(()))
    take(make_loader(*opts), 1)
    Trainer.build_test_loader(make_cfg(*opts), "tiny")
    expected = {"num_workers": workers, "pin_memory": device == "cuda"}
    if workers:
        expected |= {"timeout": 7, "prefetch_factor": 5, "persistent_workers": True}
    for options in built:
        assert expected.items() <= options.items()
        assert workers or "timeout" not in options
    assert len(built) == 2


def test_workers_of_evaluations_persist(records):
    opts = ("DATALOADER.NUM_WORKERS", 1, "DATALOADER.PERSISTENT_WORKERS", True)
    first = Trainer.build_test_loader(make_cfg(*opts), "tiny")
    averaged = make_cfg(*opts, "OUTPUT_DIR", "elsewhere")
    assert Trainer.build_test_loader(averaged, "tiny") is first
    assert Trainer.build_test_loader(make_cfg(*opts, "INPUT.MIN_SIZE_TEST", 9), "tiny") is not first
    one_by_one = make_cfg("DATALOADER.NUM_WORKERS", 1)
    second = Trainer.build_test_loader(one_by_one, "tiny")
    assert Trainer.build_test_loader(one_by_one, "tiny") is not second


class Pids(torch.utils.data.Dataset):
    """Returns the id of the loading process; item 2 calls a function."""

    def __init__(self, trouble=lambda: None):
        self.trouble = trouble

    def __len__(self):
        return 6

    def __getitem__(self, i):
        if i == 2:
            self.trouble()
        return torch.tensor(os.getpid())


@pytest.mark.parametrize("stay", [True, False])
def test_persistent_workers_load_again(stay):
    watched = WatchedLoader(Pids(), num_workers=1, persistent_workers=stay, timeout=60)
    first, second = ({x.item() for x in watched} for _ in range(2))
    assert len(first) == 1
    assert (first == second) == stay


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [
        (signal.pause, "no batch came for 0.5 s (DATALOADER.TIMEOUT) from the processes that load"),
        (lambda: os.kill(os.getpid(), signal.SIGSTOP), "no batch came for 0.5 s (DATALOADER.TIM"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), LOADER_DIED),
        (lambda: os._exit(3), LOADER_DIED),
    ],
)
@pytest.mark.filterwarnings("ignore:'pin_memory'")
def test_worker_that_hangs_or_dies(trouble, sentence, pinned):
    is_hang = sentence != LOADER_DIED
    options = {"num_workers": 2, "timeout": 0.5 if is_hang else 60, "pin_memory": pinned}
    with pytest.raises((OSError, RuntimeError)) as caught:
        list(WatchedLoader(Pids(trouble), **options))
    assert explain(caught.value, ".").startswith(sentence)


@pytest.mark.parametrize("dies", [True, False])
def test_broken_connection_of_a_dying_worker(dies, monkeypatch):
    """It may break before the process has ended; a data set's own errors of connections remain."""
    monkeypatch.setattr(loader_module, "SECONDS_TO_END", 0.01)
    sentinel, other_end = os.pipe()
    worker = SimpleNamespace(sentinel=sentinel, is_alive=lambda: True, kill=int, join=dict)
    if dies:
        os.close(other_end)

    class Broken:
        _workers = (worker,)

        def __next__(self):
            raise ConnectionResetError("reset by peer")

    watched = WatchedLoader(Pids(), num_workers=0)
    with pytest.raises(OSError, match="memory ran out" if dies else "reset by peer"):
        watched._next(Broken())


def test_worker_that_dies_while_the_model_computes():
    """torch raises an error at any point of the training."""
    batches = iter(WatchedLoader(Pids(), num_workers=1, timeout=60))
    pid = next(batches).item()

    def compute():
        os.kill(pid, signal.SIGKILL)
        threading.Event().wait(10)

    with pytest.raises(RuntimeError) as caught:
        compute()
    assert explain(caught.value, ".") == LOADER_DIED


def test_error_in_a_worker_keeps_its_type():
    with pytest.raises(ZeroDivisionError):
        list(WatchedLoader(Pids(lambda: 1 / 0), num_workers=1, timeout=60))
