"""Joining data sets, and dividing them into splits."""

import json
import re
import shlex
from pathlib import Path

import broken
import check_dataset
import convert_dataset
import numpy as np
import pytest
from conftest import photograph
from PIL import Image

from atss.data.datasets import split_source
from atss.labels.copies import by_key, join_groups
from atss.labels.formats import read_labels
from atss.labels.splits import divide, format_report, group_by_name, join, parse_shares


def random_content(images=400, seed=0, classes=(0.7, 0.2, 0.07, 0.03)):
    """Images of 0 to 5 objects, of classes with these frequencies."""
    generator = np.random.default_rng(seed)
    content = {
        "images": [{"id": 10 + i, "file_name": f"{i // 4}_{i}.png"} for i in range(images)],
        "categories": [{"id": c, "name": f"class {c}"} for c in range(len(classes))],
        "annotations": [],
    }
    for image in content["images"]:
        for c in generator.choice(len(classes), generator.integers(0, 6), p=classes):
            entry = {"id": len(content["annotations"]), "image_id": image["id"]}
            content["annotations"].append(entry | {"category_id": int(c)})
    return content


def counts(content, split_of, splits):
    """Return (classes + 1, splits) the number of objects of each class, and of images."""
    position = {image["id"]: i for i, image in enumerate(content["images"])}
    table = np.zeros((len(content["categories"]) + 1, splits), dtype=int)
    for a in content["annotations"]:
        table[a["category_id"], split_of[position[a["image_id"]]]] += 1
    table[-1] = np.bincount(split_of, minlength=splits)
    return table


SHARES = [(0.8, 0.2), (0.7, 0.2, 0.1), (0.5, 0.5), (0.9, 0.1)]


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("seed", range(3))
def test_every_class_has_its_share(shares, seed):
    content = random_content(seed=seed)
    table = counts(content, divide(content, [[i] for i in range(400)], shares, seed), len(shares))
    off = np.abs(table - table.sum(axis=1, keepdims=True) * np.array(shares))
    assert off.max() <= 1  # object of a class, or image


@pytest.fixture(scope="module")
def real_sets(real_data):
    """{name: content of all its splits}."""
    coco, bccd, aquarium = (real_data / name for name in ("coco", "bccd", "aquarium"))
    sources = {
        "aquarium": [(aquarium / "data.yaml", x) for x in ("train", "val", "test")],
        "bccd": [(bccd / f"{x}.json", bccd / "images") for x in ("train", "val", "test")],
        "coco": [
            (coco / f"annotations/instances_{x}2017.json", coco / f"{x}2017")
            for x in ("train", "val")
        ],
    }
    return {
        name: join([read_labels(str(labels), str(images)) for labels, images in places])[0]
        for name, places in sources.items()
    }


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("name", ["aquarium", "bccd", "coco"])
def test_shares_of_real_sets_are_within_two_points(real_sets, name, shares):
    """Crowded images may deviate by one image, and rows of COCO's rare classes and crowded images
    by the objects of two images."""
    content = real_sets[name]
    row = {c["id"]: i for i, c in enumerate(content["categories"])}
    position = {image["id"]: i for i, image in enumerate(content["images"])}
    of_class = np.zeros((len(row), len(position)))
    for a in content["annotations"]:
        of_class[row[a["category_id"]], position[a["image_id"]]] += 1
    objects = of_class.sum(axis=0)
    crowded = objects >= (17 if name == "coco" else 20)  # at most a tenth
    rows = np.vstack([np.ones(len(position)), objects, of_class, crowded])
    total = rows.sum(axis=1)
    slack = 0.02 * total
    slack[-1] = max(slack[-1], 1)
    if name == "coco":
        slack[2:] = np.maximum(slack[2:], 2 * rows[2:].max(axis=1))
    for seed in range(10):
        split_of = divide(content, [[i] for i in range(len(position))], shares, seed)
        parts = np.stack([rows[:, split_of == i].sum(axis=1) for i in range(len(shares))], axis=1)
        off = np.abs(parts - total[:, None] * shares).max(axis=1)
        assert (off <= slack).all(), (seed, np.flatnonzero(off > slack))


def test_exchanges_find_equal_halves_of_few_groups():
    """Groups of 8, 7, 6, 5 and 4 images: no single move improves 8 + 5 + 4 and 7 + 6, but 8 + 7 and
    6 + 5 + 4 are equal."""
    content = {"images": [{"id": i} for i in range(30)], "categories": [], "annotations": []}
    ends = np.cumsum([8, 7, 6, 5, 4])
    groups = [list(range(end - size, end)) for end, size in zip(ends, (8, 7, 6, 5, 4), strict=True)]
    for seed in range(5):
        split_of = divide(content, groups, (0.5, 0.5), seed)
        assert np.bincount(split_of).tolist() == [15, 15]


def test_report_marks_deviations_above_two_points():
    content = random_content(50, classes=(1.0,))
    content["categories"][0]["name"] = "fish"
    content["annotations"] = [{"image_id": 10 + i // 7, "category_id": 0} for i in range(77)]
    split_of = np.arange(50) >= 41  # two points too few
    lines = format_report(content, split_of.astype(int), {"train": 0.8, "val": 0.2}).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "train val",
        "41 (82.0%) 9 (18.0%) images",
        "30 (76.9%)* 9 (23.1%)* images without objects",
        "0 ( 0.0%) 0 ( 0.0%) images with 8 objects or more",
        "77 (100.0%)* 0 ( 0.0%)* objects",
        "77 (100.0%)* 0 ( 0.0%)* fish",
        "* more than 2 points away from its share",
    ]


def test_groups_stay_together_and_classes_keep_their_shares():
    content = random_content()
    names = [image["file_name"] for image in content["images"]]
    groups = join_groups(400, by_key(group_by_name(names, r"(\d+)_")))
    assert len(groups) == 100
    split_of = divide(content, groups, (0.75, 0.25), 0)
    assert all(len({split_of[i] for i in group}) == 1 for group in groups)
    table = counts(content, split_of, 2)
    of_group = max(
        counts(content, np.isin(np.arange(400), group).astype(int), 2)[:-1, 1].max()
        for group in groups
    )
    expected = table.sum(axis=1, keepdims=True) * np.array((0.75, 0.25))
    assert np.abs(table - expected).max() <= of_group


def test_splits_depend_on_the_seed_only():
    content = random_content()
    alone = [[i] for i in range(400)]
    first = divide(content, alone, (0.8, 0.2), 1)
    assert (divide(content, alone, (0.8, 0.2), 1) == first).all()
    assert (divide(content, alone, (0.8, 0.2), 2) != first).any()


def test_images_without_objects_are_divided_too():
    content = random_content() | {"annotations": []}
    split_of = divide(content, [[i] for i in range(400)], (0.9, 0.1), 0)
    assert np.bincount(split_of).tolist() == [360, 40]


def test_a_class_of_one_image_goes_to_the_largest_split():
    content = random_content(classes=(1.0,))
    content["categories"].append({"id": 1, "name": "once"})
    content["annotations"].append({"id": 9999, "image_id": 10, "category_id": 1})
    assert divide(content, [[i] for i in range(400)], (0.2, 0.8), 0)[0] == 1


@pytest.mark.parametrize(
    ("images", "shares", "expected"),
    [(5, (0.9, 0.1), [4, 1]), (4, (0.8, 0.1, 0.1), [2, 1, 1]), (2, (0.98, 0.01, 0.01), [1, 1, 0])],
)
def test_no_split_is_empty_if_images_suffice(images, shares, expected):
    content = {"images": [{"id": i} for i in range(images)], "categories": [{"id": 1, "name": ""}]}
    content["annotations"] = [{"image_id": i, "category_id": 1} for i in range(images)]
    split_of = divide(content, [[i] for i in range(images)], shares, 0)
    assert sorted(np.bincount(split_of, minlength=len(shares)).tolist(), reverse=True) == expected


def test_group_by_name():
    names = ["film1_001.png", "film1_002.png", "film2_001.png", "other.png"]
    assert group_by_name(names, r"(film\d)_") == ["film1", "film1", "film2", None]
    assert group_by_name(names, r"film\d") == ["film1", "film1", "film2", None]
    with pytest.raises(ValueError, match=r"--group '\(' is no regular expression"):
        group_by_name(names, "(")


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["train"], "--split takes NAME=SHARE ..., such as train=0.8 val=0.2, got 'train'"),
        (["train=x"], "got 'train=x'"),
        (["train=1", "val=0"], "got 'train=1'"),
        (["../a=0.5", "b=0.5"], "got '../a=0.5'"),
        (["train=nan", "val=0.5"], "got 'train=nan'"),
        (["a=0.5", "b=0.4"], "the shares of --split must sum to 1 over different splits, got 0.9"),
        (["a=0.5", "a=0.5"], "the shares of --split must sum to 1 over different splits, got 0.5"),
    ],
)
def test_invalid_shares_are_refused(texts, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        parse_shares(texts)


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    """Sources of two data sets whose classes have different ids."""
    first, second = (broken.make_data(tmp_path / name) for name in ("first", "second"))
    second["categories"] = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cow"}]
    for root, content in (("first", first), ("second", second)):
        (tmp_path / root / "a.json").write_text(json.dumps(content))
        for i, image in enumerate(content["images"]):  # plain images would be copies
            noise = np.random.default_rng(i + 9 * (root == "first")).integers(0, 256, (48, 64, 3))
            path = tmp_path / root / "images" / image["file_name"]
            broken.Image.fromarray(noise.astype(np.uint8)).save(path)
    return [f"{tmp_path}/{root}/a.json:{tmp_path}/{root}/images" for root in ("first", "second")]


def test_sets_are_joined_by_class_names(two, tmp_path, capsys):
    target = tmp_path / "out" / "both.json"
    assert convert_dataset.main([*two, "--output", str(target)]) == 0
    content = json.loads(target.read_text())
    assert [(c["id"], c["name"]) for c in content["categories"]] == [
        (1, "cat"), (2, "dog"), (3, "cow"),
    ]  # fmt: skip
    assert [i["file_name"] for i in content["images"]] == [
        f"{root}/images/{name}.png" for root in ("first", "second") for name in "abcd"
    ]
    assert [a["category_id"] for a in content["annotations"]] == [1, 2, 1] * 4 + [2, 3, 2] * 4
    assert [a["image_id"] for a in content["annotations"]] == [
        i for i in range(1, 9) for _ in "123"
    ]
    captured = capsys.readouterr()
    assert "first/a.json has no class 'cow': objects of such classes on its images" in captured.err
    assert "second/a.json has no class 'cat'" in captured.err
    assert f"atss train: --train or --val {target}:{tmp_path}" in captured.out.splitlines()
    register = captured.out.splitlines()[-1]
    assert register == f"--register both={target}:{tmp_path}"
    assert not read_labels(str(target), str(tmp_path)).findings


def test_a_single_set_keeps_its_ids_and_fields(two, tmp_path):
    annotations = two[0].split(":")[0]
    before = json.loads(Path(annotations).read_text()) | {"info": {"year": 2026}}
    before["images"][0]["id"] = 77
    for annotation in before["annotations"][:3]:
        annotation |= {"image_id": 77, "segmentation": [[1, 2, 9, 2, 9, 9]]}
    Path(annotations).write_text(json.dumps(before))
    assert convert_dataset.main([two[0], "--output", f"{tmp_path}/one.json"]) == 0
    assert json.loads((tmp_path / "one.json").read_text()) == before


def test_group_and_seed_of_the_command(two, tmp_path, capsys):
    """Images of one letter stay together; seeds give different splits."""
    files = {}
    for seed in range(8):
        argv = [*two, "--output", f"{tmp_path}/{seed}.json", "--seed", str(seed)]
        argv += ["--split", "train=0.5", "val=0.5", "--group", "([abc]).png"]
        assert convert_dataset.main(argv) == 0
        err = capsys.readouterr().err
        assert "does not match 2 names, such as first/images/d.png: each is a group of one" in err
        part = json.loads((tmp_path / f"{seed}_train.json").read_text())
        files[seed] = {image["file_name"] for image in part["images"]}
        for letter in "abc":
            assert len({x for x in files[seed] if x.endswith(f"{letter}.png")}) in (0, 2)
    assert len(set(map(frozenset, files.values()))) > 1


def test_empty_split_and_conflicting_sources_are_refused(two, tmp_path, capsys):
    argv = [two[0], "--output", f"{tmp_path}/x.json", "--split", "train=0.5", "val=0.5"]
    assert convert_dataset.main([*argv, "--group", "png"]) == 1
    assert "the split 'val' would have no image: 4 images make 1" in capsys.readouterr().err
    annotations = two[0].split(":")[0]
    other = json.loads(Path(annotations).read_text())
    other["annotations"] = other["annotations"][:3]
    (tmp_path / "other.json").write_text(json.dumps(other))
    other = f"{tmp_path}/other.json:{two[0].split(':')[1]}"
    assert convert_dataset.main([two[0], other, "--output", f"{tmp_path}/x.json"]) == 1
    err = capsys.readouterr().err
    assert "error: the joined data sets have duplicate image files with different objects" in err
    assert not list(tmp_path.glob("x*.json"))


def test_images_outside_the_folder_are_joined(tmp_path):
    """A data.yaml may name a folder outside its own."""
    content = broken.make_data(tmp_path / "far")
    (tmp_path / "near").mkdir()
    broken.write_yolo(content, tmp_path / "far")
    yaml = tmp_path / "near/data.yaml"
    yaml.write_text(f"{{train: {tmp_path}/far/images, names: [cat, dog]}}")
    (tmp_path / "far/a.json").write_text(json.dumps(content))
    sets = [
        read_labels(str(yaml), "train"),
        read_labels(f"{tmp_path}/far/a.json", f"{tmp_path}/far/images"),
    ]
    joined, folder = join(sets)
    paths = [Path(folder, image["file_name"]) for image in joined["images"]]
    assert paths == 2 * [tmp_path / f"far/images/{x}.png" for x in "abcd"]


def test_many_rare_classes_are_divided():
    """5,000 images of 1,000 classes."""
    generator = np.random.default_rng(0)
    content = {"images": [{"id": i} for i in range(5_000)]}
    content["categories"] = [{"id": c, "name": str(c)} for c in range(1000)]
    content["annotations"] = [
        {"image_id": i, "category_id": int(c)}
        for i in range(5_000)
        for c in generator.integers(0, 1000, 3)
    ]
    split_of = divide(content, [[i] for i in range(5_000)], (0.8, 0.2), 0)
    assert abs(int((split_of == 1).sum()) - 1000) <= 10


def test_split_files_keep_classes_and_copies_together(two, tmp_path, capsys):
    images = tmp_path / "first" / "images"
    (images / "d.png").write_bytes((images / "a.png").read_bytes())
    argv = [*two, "--output", f"{tmp_path}/both.json", "--split", "train=0.5", "val=0.5"]
    assert convert_dataset.main(argv) == 0
    out, err = capsys.readouterr()
    sources = [f"{tmp_path}/both_{x}.json:{tmp_path}" for x in ("train", "val")]
    assert f"\natss train: --train {sources[0]} --val {sources[1]}\n" in out
    assert "copies of one image: first/images/a.png, first/images/d.png" in err
    parts = [json.loads((tmp_path / f"both_{x}.json").read_text()) for x in ("train", "val")]
    files = [{image["file_name"] for image in part["images"]} for part in parts]
    assert [len(x) for x in files] == [4, 4]
    assert not files[0] & files[1]
    assert any({"first/images/a.png", "first/images/d.png"} <= x for x in files)
    assert parts[0]["categories"] == parts[1]["categories"]
    assert sum(len(part["annotations"]) for part in parts) == 2 * broken.OBJECTS
    again = [*argv[:3], f"{tmp_path}/again.json", *argv[4:]]
    assert convert_dataset.main(again) == 0
    for x, part in zip(("train", "val"), parts, strict=True):
        assert json.loads((tmp_path / f"again_{x}.json").read_text()) == part


@pytest.fixture
def scenes(tmp_path):
    """Source of twelve photographs: 0 to 2 show one scene, 3 is 4 mirrored."""
    (tmp_path / "images").mkdir()
    images = [photograph(i) for i in (0, 0, 0, 4, 4, *range(5, 12))]
    images[1] = images[0].crop((4, 3, 118, 88))
    images[2] = images[0].crop((2, 5, 116, 90))
    images[3] = images[4].transpose(broken.Image.Transpose.FLIP_LEFT_RIGHT)
    entries = []
    for i, image in enumerate(images):
        image.save(tmp_path / f"images/{i}.png")
        size = {"width": image.width, "height": image.height}
        entries.append({"id": i, "file_name": f"{i}.png", **size})
    content = {"images": entries, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "labels.json").write_text(json.dumps(content))
    return f"{tmp_path}/labels.json:{tmp_path}/images"


@pytest.mark.parametrize("group", [(), ("--group", r"(0\.png)$")])
def test_scenes_and_groups_stay_in_one_split(scenes, tmp_path, capsys, group):
    for seed in range(4):
        argv = [scenes, "--output", f"{tmp_path}/{seed}.json", "--seed", str(seed), *group]
        assert convert_dataset.main([*argv, "--split", "train=0.5", "val=0.5"]) == 0
        err = capsys.readouterr().err
        assert "photographs of one scene: 0.png, 1.png, 2.png" in err
        assert "copies of one image: 3.png, 4.png" in err
        part = json.loads((tmp_path / f"{seed}_train.json").read_text())
        ids = {image["id"] for image in part["images"]}
        for together in ({0, 1, 2, 10} if group else {0, 1, 2}, {3, 4}):
            assert len(together & ids) in (0, len(together))
    images = scenes.partition(":")[2]
    against = ["--against", f"{tmp_path}/3_val.json:{images}"]
    assert check_dataset.main([f"{tmp_path}/3_train.json:{images}", *against]) == 0
    assert "another split" not in capsys.readouterr().out


def test_scenes_larger_than_a_split_are_divided(scenes, tmp_path, capsys):
    """As from a fixed camera."""
    content = json.loads((tmp_path / "labels.json").read_text())
    content["images"] = content["images"][:5]
    (tmp_path / "labels.json").write_text(json.dumps(content))
    argv = [scenes, "--output", f"{tmp_path}/x.json", "--split", "train=0.5", "val=0.5"]
    assert convert_dataset.main(argv) == 0
    err = capsys.readouterr().err
    assert "3 of 5 images look alike, more than a split has: only copies and images of" in err


def test_frames_of_a_fixed_camera_are_divided(tmp_path):
    """All are copies by their hashes; files of equal bytes stay together."""
    (tmp_path / "images").mkdir()
    frames = [np.array(photograph(1)) for _ in range(6)]
    for i, frame in enumerate(frames[:5]):
        frame[5 * i : 5 * i + 3, :3] = 255
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    for i, frame in enumerate([*frames, frames[5]]):
        Image.fromarray(frame).save(tmp_path / "images" / f"{i}.png")
        image = {"id": i, "file_name": f"{i}.png", "width": 120, "height": 90}
        content["images"].append(image)
    (tmp_path / "labels.json").write_text(json.dumps(content))
    argv = [f"{tmp_path}/labels.json:{tmp_path}/images", "--output", f"{tmp_path}/x.json"]
    assert convert_dataset.main([*argv, "--split", "train=0.5", "val=0.5"]) == 0
    parts = [json.loads((tmp_path / f"x_{x}.json").read_text())["images"] for x in ("train", "val")]
    assert all(parts)
    assert any({5, 6} <= {x["id"] for x in part} for part in parts)


@pytest.mark.parametrize("name", ["a b.json", "it's $(x).json", "a=b.json"])
def test_register_line_can_be_pasted_into_a_shell(two, tmp_path, capsys, name):
    """With blanks and quotes in paths, and an equals sign in the name."""
    (tmp_path / "first" / "images").rename(tmp_path / "first" / "the images")
    source = f"{tmp_path}/first/a.json:{tmp_path}/first/the images"
    assert convert_dataset.main([source, "--output", f"{tmp_path}/{name}"]) == 0
    option, spec = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert option == "--register"
    assert len(read_labels(*split_source(spec.partition("=")[2])).content["images"]) == 4


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--split", "train=2"], "--split takes NAME=SHARE"),
        (["--group", "(.*)"], "--group keeps images together in one split: it needs --split"),
        (["--split", "a=0.5", "b=0.5", "--group", "film"], "--group 'film' does not match names"),
        (["--classes", "horse"], "--classes: no data set has 'horse'"),
        (["--classes", ","], "--classes takes NAME"),
    ],
)
def test_invalid_options_give_one_sentence(two, tmp_path, capsys, options, sentence):
    assert convert_dataset.main([two[0], "--output", f"{tmp_path}/x.json", *options]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert sentence in err
    assert not (tmp_path / "x.json").exists()


def test_existing_and_invalid_files_are_refused(two, tmp_path, capsys):
    annotations = two[0].split(":")[0]
    assert convert_dataset.main([two[0], "--output", annotations]) == 1
    assert f"{annotations} already exists" in capsys.readouterr().err
    for output in ("data.yaml", "folder/", ".json", "json"):
        assert convert_dataset.main([two[0], "--output", output]) == 1
        assert "error: --output must end in .json, got" in capsys.readouterr().err
    assert convert_dataset.main(["nowhere", "--output", f"{tmp_path}/x.json"]) == 1
    assert (
        "a source is annotations.json:image_dir, data.yaml:split or folder:split, got 'nowhere'"
        in capsys.readouterr().err
    )
    content = json.loads(Path(annotations).read_text())
    content["annotations"][0]["image_id"] = 99
    Path(annotations).write_text(json.dumps(content))
    assert convert_dataset.main([two[0], "--output", f"{tmp_path}/x.json"]) == 1
    assert "annotations with an unknown image_id" in capsys.readouterr().err


def test_lvis_is_not_joined_with_others(two, tmp_path):
    content = broken.make_data(tmp_path / "third")
    broken.to_lvis(content)
    content["images"][0]["neg_category_ids"] = [1]
    (tmp_path / "third/l.json").write_text(json.dumps(content))
    lvis = read_labels(f"{tmp_path}/third/l.json", f"{tmp_path}/third")
    with pytest.raises(ValueError, match=r"LVIS's json, .* cannot be joined with other formats"):
        join([lvis, read_labels(*two[0].split(":"))])
    swapped = json.loads((tmp_path / "third/l.json").read_text())
    swapped["categories"][0]["name"], swapped["categories"][1]["name"] = "dog", "cat"
    (tmp_path / "third/m.json").write_text(json.dumps(swapped))
    joined, _ = join([lvis, read_labels(f"{tmp_path}/third/m.json", f"{tmp_path}/third")])
    assert [image["neg_category_ids"] for image in joined["images"]][::4] == [[1], [2]]
