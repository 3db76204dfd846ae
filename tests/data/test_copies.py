"""Images that are there more than once."""

import check_dataset
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageFilter

from atss.data import copies
from atss.data.copies import find_copies, join_groups


def photograph(seed, size=(120, 90)):
    """Smooth noise, as different from others as photographs are."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (90, 120, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(3))
    return image.resize(size)


@pytest.fixture
def files(tmp_path):
    """Twenty images of different content: a list of their paths."""
    names = [tmp_path / f"{i}.png" for i in range(20)]
    for i, name in enumerate(names):
        photograph(i).save(name)
    return list(map(str, names))


def test_different_images_are_no_copies(files):
    assert find_copies(files) == []


def test_equal_bytes_and_resized_copies(files, tmp_path):
    (tmp_path / "same.png").write_bytes((tmp_path / "3.png").read_bytes())
    photograph(3, (60, 45)).save(tmp_path / "small.jpg", quality=70)
    photograph(7, (200, 150)).save(tmp_path / "large.jpg", quality=90)
    more = [f"{tmp_path}/{name}" for name in ("same.png", "small.jpg", "large.jpg")]
    assert find_copies([*files, *more]) == [[3, 20, 21], [7, 22]]
    assert find_copies([more[1], *files[:4]]) == [[0, 4]]


def test_without_imagehash_equal_bytes_alone(files, tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "can_see_resized", lambda: False)
    (tmp_path / "same.png").write_bytes((tmp_path / "3.png").read_bytes())
    photograph(3, (60, 45)).save(tmp_path / "small.jpg")
    found = find_copies([*files, f"{tmp_path}/same.png", f"{tmp_path}/small.jpg"])
    assert found == [[3, 20]]


def test_what_cannot_be_compared_is_no_copy(files, tmp_path):
    """Missing, empty and broken files, and those of one colour, whose hashes are equal."""
    for i in range(2):
        (tmp_path / f"broken{i}.png").write_text("no image" * (i + 1))
        (tmp_path / f"empty{i}.png").write_text("")
        Image.new("RGB", (40, 40 + i), (i, i, i)).save(tmp_path / f"plain{i}.png")
    kinds = ("broken", "plain", "missing", "empty")
    odd = [f"{tmp_path}/{x}{i}.png" for x in kinds for i in range(2)]
    assert find_copies([*files, *odd]) == []


def test_pairs_of_hashes_are_those_of_all(monkeypatch):
    """Against a look at every pair, near the threshold."""
    generator = np.random.default_rng(0)
    base = generator.integers(0, 2, (6, copies.SIDE**2)).astype(bool)
    hashes = [None]
    for row in base:
        for flips in (0, 1, 6, 12, 13, 36):  # of 256 bits, 12 are near
            other = row.copy()
            where = generator.choice(copies.SIDE**2, flips, replace=False)
            other[where] ^= True
            hashes.append(other)
    near = [
        (i, j)
        for i in range(1, len(hashes))
        for j in range(i + 1, len(hashes))
        if (hashes[i] != hashes[j]).sum() <= 12
    ]
    assert join_groups(len(hashes), copies._near(hashes)) == join_groups(len(hashes), near)
    assert len(near) > 20


def test_a_camera_that_sees_nothing_move():
    """Each image is near to some others, and all of them are one group."""
    generator = np.random.default_rng(0)
    hashes = [np.zeros(copies.SIDE**2, dtype=bool)]
    for _ in range(3000):
        other = hashes[-1].copy()
        other[generator.choice(copies.SIDE**2, 3, replace=False)] ^= True
        hashes.append(other)
    assert join_groups(3001, copies._near(hashes)) == [list(range(3001))]


def test_coco_has_no_copies(real_data):
    files = sorted(map(str, (real_data / "coco").glob("*2017/*.jpg")))
    assert len(files) > 200
    assert find_copies(files) == []


def test_groups_are_joined():
    assert join_groups(6, [[4, 2], [2, 5]], [[0, 3]]) == [[0, 3], [1], [2, 4, 5]]
    assert join_groups(3) == [[0], [1], [2]]
    assert join_groups(4, [[0, 1], [2, 3]], [[1, 2]]) == [[0, 1, 2, 3]]


def test_check_dataset_names_what_another_split_has(tmp_path, capsys):
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
    assert "another split" not in capsys.readouterr().out
    photograph(1, (60, 45)).save(tmp_path / "val/images/9.jpg")
    assert check_dataset.main(argv) == 0
    said = capsys.readouterr().out
    assert "1  images that another split has too, by their bytes, or resized" in said
    assert f"train/images/1.png, which is {tmp_path}/val/images/9.jpg" in said
    (tmp_path / "empty").mkdir()
    (tmp_path / "val.json").write_text(
        '{"images": [{"id": 1, "file_name": "1.png", "width": 9, "height": 9}], "annotations": [], '
        '"categories": [{"id": 1, "name": "cat"}]}'
    )
    against = f"{tmp_path}/val.json:{tmp_path}/empty"
    assert check_dataset.main([str(yaml), "train", "--against", against, *config]) == 2
    assert "1 images of other splits do not exist, such as" in capsys.readouterr().err
