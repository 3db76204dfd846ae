"""Copies of images, and photographs of one scene."""

from pathlib import Path

import check_dataset
import numpy as np
import pytest
from conftest import ROOT, photograph
from PIL import Image

from atss.labels import copies
from atss.labels.copies import find_copies, join_groups


@pytest.fixture
def files(tmp_path):
    """Twenty images of different content: a list of their paths."""
    names = [tmp_path / f"{i}.png" for i in range(20)]
    for i, name in enumerate(names):
        photograph(i).save(name)
    return list(map(str, names))


def test_different_images_are_no_copies(files):
    assert find_copies(files)[1:] == ([], [])


def test_equal_and_resized_files_are_copies(files, tmp_path):
    (tmp_path / "same.png").write_bytes((tmp_path / "3.png").read_bytes())
    photograph(3, (60, 45)).save(tmp_path / "small.jpg", quality=70)
    photograph(7, (200, 150)).save(tmp_path / "large.jpg", quality=90)
    more = [f"{tmp_path}/{name}" for name in ("same.png", "small.jpg", "large.jpg")]
    assert find_copies([*files, *more])[1:] == 2 * ([[3, 20, 21], [7, 22]],)
    assert find_copies([more[1], *files[:4]])[1:] == 2 * ([[0, 4]],)


def test_mirrored_and_brighter_images_are_copies(files, tmp_path):
    photograph(3).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirrored.png")
    photograph(7).point(lambda x: min(1.3 * x, 255)).save(tmp_path / "bright.png")
    photograph(9).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(tmp_path / "upside_down.png")
    more = [f"{tmp_path}/{name}.png" for name in ("mirrored", "bright", "upside_down")]
    assert find_copies([*files, *more])[1] == [[3, 20], [7, 21]]


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (0, "a040b105c0b566d222b5f34db4afcff123e2131834bc6a7e7a92e495e03f3f7a"),
        (1, "f5e7d597dca34d933ea35fb24c44b3c834c7bf8976062b9334a2652a7021164a"),
        (2, "a2bbaa69a33df17f1faf9918a2bee36b2561c82bc8245c08db0245b039dbc754"),
    ],
)
def test_hash_equals_imagehash(tmp_path, seed, expected):
    """By imagehash 4.3.2: np.packbits(phash(image, hash_size=16).hash.ravel())."""
    photograph(seed).save(tmp_path / "x.png")
    assert copies._hash(str(tmp_path / "x.png")).tobytes().hex() == expected


def test_unreadable_and_plain_images_are_no_copies(files, tmp_path):
    """Images of one colour would have equal hashes."""
    for i in range(2):
        (tmp_path / f"broken{i}.png").write_text("no image" * (i + 1))
        (tmp_path / f"empty{i}.png").write_text("")
        Image.new("RGB", (40, 40 + i), (i, i, i)).save(tmp_path / f"plain{i}.png")
    kinds = ("broken", "plain", "missing", "empty")
    odd = [f"{tmp_path}/{x}{i}.png" for x in kinds for i in range(2)]
    assert find_copies([*files, *odd])[1:] == ([], [])


def pack(bits):
    return np.packbits(bits).view(np.uint64)


@pytest.mark.parametrize("pairs", [copies.PAIRS, 100])  # in one chunk, in many
def test_near_pairs_equal_those_of_brute_force(monkeypatch, pairs):
    """With distances at the thresholds, plain and mirrored."""
    monkeypatch.setattr(copies, "PAIRS", pairs)
    generator = np.random.default_rng(0)
    base = generator.integers(0, 2, (6, 16, 16)).astype(bool)
    hashes = [None]
    for number, row in enumerate(base):
        for flips in (0, 1, 40, 41, 80, 81):  # of 256 bits
            other = row.copy()
            if number % 2 and flips:  # odd columns of frequencies are antisymmetric
                other[:, 1::2] ^= True
            other.ravel()[generator.choice(256, flips, replace=False)] ^= True
            hashes.append(other)
    distances = {
        (i, j): min(np.sum(a != b), np.sum((a != b) ^ (np.arange(16) % 2 == 1)))
        for i, a in enumerate(hashes)
        for j, b in enumerate(hashes[:i])
        if a is not None and b is not None
    }
    found = copies._near([x if x is None else pack(x.ravel()) for x in hashes])
    for radius, groups in zip((40, 80), found, strict=True):
        near = [pair for pair, distance in distances.items() if distance <= radius]
        assert len(near) >= 15
        assert join_groups(len(hashes), groups) == join_groups(len(hashes), near)


def test_a_chain_of_near_images_is_one_group():
    """As from a fixed camera."""
    generator = np.random.default_rng(0)
    hashes = [np.zeros(256, dtype=bool)]
    for _ in range(3000):
        other = hashes[-1].copy()
        other[generator.choice(256, 3, replace=False)] ^= True
        hashes.append(other)
    assert copies._near(list(map(pack, hashes)))[0] == [list(range(3001))]


def test_no_copies_in_coco(real_data):
    files = sorted(map(str, (real_data / "coco").glob("*2017/*.jpg")))
    assert len(files) > 200
    assert find_copies(files)[1:] == ([], [])


def test_scenes_in_aquarium(real_data):
    """17 scenes of consecutive photographs, 7 of them in several splits."""
    files = sorted(map(str, (real_data / "aquarium").glob("*/images/*.jpg")))
    assert len(files) == 638
    _, found, scenes = find_copies(files)
    assert [[Path(files[i]).stem for i in group] for group in found] == [["IMG_2343", "IMG_2344"]]
    assert len(scenes) == 17
    assert sum(len({Path(files[i]).parts[-3] for i in scene}) > 1 for scene in scenes) == 7
    for scene in scenes:
        numbers = sorted(int(Path(files[i]).stem.removeprefix("IMG_")) for i in scene)
        assert numbers[-1] - numbers[0] <= 7


def test_groups_are_joined():
    assert join_groups(6, [[4, 2], [2, 5]], [[0, 3]]) == [[0, 3], [1], [2, 4, 5]]
    assert join_groups(3) == [[0], [1], [2]]
    assert join_groups(4, [[0, 1], [2, 3]], [[1, 2]]) == [[0, 1, 2, 3]]


def test_check_dataset_reports_images_of_other_splits(tmp_path, capsys):
    for split, seeds in (("train", (0, 1, 2)), ("val", (3, 4, 5))):
        (tmp_path / split / "images").mkdir(parents=True)
        (tmp_path / split / "labels").mkdir()
        for seed in seeds:
            photograph(seed).save(tmp_path / split / "images" / f"{seed}.png")
            (tmp_path / split / "labels" / f"{seed}.txt").write_text("0 0.5 0.5 0.5 0.5")
    yaml = tmp_path / "data.yaml"
    yaml.write_text("{train: train/images, val: val/images, names: [cat]}")
    config = ["--config-file", str(ROOT / "configs/ATSS_R_18_FPN_small.yaml")]
    argv = [str(yaml), "train", "--against", f"{yaml}:val", *config]
    assert check_dataset.main(argv) == 0
    out = capsys.readouterr().out
    assert "another split" not in out
    assert out.endswith(f"No image of {yaml}:train or its scene is in {yaml}:val\n")
    photograph(1, (60, 45)).save(tmp_path / "val/images/9.jpg")
    assert check_dataset.main(argv) == 0
    out = capsys.readouterr().out
    assert "No image of" not in out
    assert "1  images that another split contains too (equal bytes, resized or mirrored)" in out
    assert f"train/images/1.png, which is {tmp_path}/val/images/9.jpg" in out
    Image.open(tmp_path / "train/images/2.png").crop((4, 3, 118, 88)).save(
        tmp_path / "val/images/8.png"
    )
    assert check_dataset.main(argv) == 0
    out = capsys.readouterr().out
    assert "1  images of the same scene as an image of another split" in out
    assert f"train/images/2.png, which looks like {tmp_path}/val/images/8.png" in out
    (tmp_path / "empty").mkdir()
    (tmp_path / "val.json").write_text(
        '{"images": [{"id": 1, "file_name": "1.png", "width": 9, "height": 9}], "annotations": [], '
        '"categories": [{"id": 1, "name": "cat"}]}'
    )
    against = f"{tmp_path}/val.json:{tmp_path}/empty"
    assert check_dataset.main([str(yaml), "train", "--against", against, *config]) == 2
    assert "1 images of other splits do not exist, such as" in capsys.readouterr().err
