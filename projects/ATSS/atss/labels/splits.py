"""Joins data sets, and divides one into splits, in COCO's format."""

import math
import os
import re
from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import UserError
from .classes import ABSENT, PARTLY_MARKED
from .formats import Labels

# The first rows of the page, of images, and how many classes' errors theirs weigh: --split asks for
# shares of images, and there may be hundreds of classes.
IMAGE_ROWS = 3
IMAGES_WEIGHT = 10
# A split's part of a row is marked if it differs from the share by more than two points.
MARKED = 0.02
# Rounds of exchanges. An exchange reads every number of every group, so that the more
# there are, the fewer are tried: many groups are even without.
PASSES = 5
EXCHANGE_WORK = 20_000_000
LEAST_GAIN = 1e-9


def join(sets: Sequence[Labels]) -> tuple[dict, str]:
    """One content of several, and the folder in which its file names begin. Classes are one by
    their name; ids of images and annotations are new where there are several sets.

    Raises:
        ValueError: where LVIS's json is among others, whose images are marked in full.
    """
    kinds = {labels.evaluator for labels in sets}
    if len(kinds) > 1:
        raise UserError(
            "LVIS's json, whose images are not marked in full, cannot be joined with others"
        )
    folder = os.path.commonpath([os.path.abspath(labels.image_dir) for labels in sets])
    if len(sets) == 1:
        return sets[0].content, os.path.abspath(sets[0].image_dir)
    categories: dict[str, dict] = {}
    images: list[dict] = []
    annotations: list[dict] = []
    for labels in sets:
        content, names = labels.content, {}
        for category in sorted(content["categories"], key=lambda c: c["id"]):
            new = {**category, "id": len(categories) + 1}
            names[category["id"]] = categories.setdefault(category["name"], new)["id"]
        start = os.path.relpath(os.path.abspath(labels.image_dir), folder)
        numbers = {}
        for image in content["images"]:
            numbers[image["id"]] = len(images) + 1
            lists = {k: [names[i] for i in image[k]] for k in (ABSENT, PARTLY_MARKED) if k in image}
            name = os.path.normpath(os.path.join(start, image["file_name"]))
            images.append({**image, **lists, "id": len(images) + 1, "file_name": name})
        for annotation in content["annotations"]:
            new = {"id": len(annotations) + 1, "image_id": numbers[annotation["image_id"]]}
            new["category_id"] = names[annotation["category_id"]]
            annotations.append({**annotation, **new})
    joined = {"images": images, "annotations": annotations}
    return {**joined, "categories": list(categories.values())}, folder


def parse_shares(texts: Sequence[str]) -> dict[str, float]:
    """``train=0.8 val=0.2``: a share of each split.

    Raises:
        ValueError: with a sentence that says what is wrong.
    """
    shares: dict[str, float] = {}
    for text in texts:
        name, _, share = text.partition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            shares[name] = math.nan
        if not re.fullmatch(r"\w[\w.-]*", name) or not 0 < shares[name] < 1:
            raise UserError(
                f"--split takes NAME=SHARE ..., such as train=0.8 val=0.2, not {text!r}"
            )
    if len(shares) < len(texts) or not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
        total = sum(shares.values())
        raise UserError(f"the shares of --split make {total:g} of different splits, in place of 1")
    return shares


def group_by_name(file_names: Sequence[str], pattern: str) -> list[str | None]:
    """What of each name belongs together: what the pattern's first group finds, or the whole of it;
    None where it finds nothing.

    Raises:
        ValueError: where it is no pattern.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--group {pattern!r} is no regular expression: {error}") from error
    found = [compiled.search(name) for name in file_names]
    return [x and (x[1] if compiled.groups else x[0]) for x in found]


def divide(
    content: dict, groups: Sequence[Sequence[int]], shares: Sequence[float], seed: int
) -> np.ndarray:
    """Deal images into splits such that each split has its share of every row of :func:`page`.

    Groups are dealt from the heaviest to the lightest, each to the split where the error grows
    least. Then pairs of groups are exchanged while the error falls. The error is Pearson's
    chi-squared, summed over rows: the squared difference between what a split has and its
    share, divided by that share. No split is empty if there are as many groups as splits.

    Args:
        content: in COCO's format, with at least one image.
        groups: of positions of images that stay together, each image in one.
        shares: of the splits, 1 in all.
        seed: decides between equal groups.

    Returns:
        (number of images,) the index of the split of each image.
    """
    names, row, image = _rows(content)
    group_of = np.empty(len(content["images"]), dtype=np.int64)
    for g, members in enumerate(groups):
        group_of[list(members)] = g
    key, inverse = np.unique(group_of[image] * len(names) + row, return_inverse=True)
    group, row = np.divmod(key, len(names))
    count = np.bincount(inverse)
    value = count / np.sqrt(np.bincount(row, count))[row]
    value[row < IMAGE_ROWS] *= IMAGES_WEIGHT**0.5
    square = np.bincount(group, value**2)
    start = np.searchsorted(group, np.arange(len(groups) + 1))
    own = [slice(start[g], start[g + 1]) for g in range(len(groups))]
    share = np.array(shares)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(groups))
    order = order[np.argsort(-square[order], kind="stable")]
    split_of = np.full(len(groups), -1)
    load = np.zeros((len(names), len(shares)))
    dealt = np.zeros(len(shares), dtype=np.int64)  # groups

    def put(g: int, split: int, sign: int = 1) -> None:
        load[row[own[g]], split] += sign * value[own[g]]
        dealt[split] += sign
        split_of[g] = split

    def cost(g: int) -> np.ndarray:
        """(splits,) by how much the error grows if the group, now in none, is put into each."""
        return (2 * value[own[g]] @ load[row[own[g]]] + square[g]) / share

    for left, g in zip(range(len(groups), 0, -1), order, strict=True):
        unfit = (dealt > 0) & (left <= (dealt == 0).sum())
        put(g, int(np.where(unfit, np.inf, cost(g)).argmin()))
    for _ in range(PASSES):
        before = split_of.copy()
        for g in generator.permutation(len(groups))[: EXCHANGE_WORK // len(value)]:
            old = split_of[g]
            put(g, old, -1)
            growth = cost(g)
            best = (-LEAST_GAIN, g, old)
            for new in set(range(len(shares))) - {old}:
                put(g, new)
                ratio = load[:, old] / share[old] - load[:, new] / share[new]
                back = 2 * np.bincount(group, value * ratio[row])
                back += square * (1 / share[old] + 1 / share[new])
                back[(split_of != new) | (np.arange(len(groups)) == g)] = np.inf
                other = int(back.argmin())
                best = min(best, (growth[new] - growth[old] + back[other], other, new))
                put(g, new, -1)
            _, other, new = best
            if new != old:
                put(other, new, -1)
                put(other, old)
            put(g, new)
        if (split_of == before).all():
            break
    return split_of[group_of]


def part(content: dict, inside: Sequence[bool]) -> dict:
    """The images of a split with their objects, and all classes."""
    images = [image for image, there in zip(content["images"], inside, strict=True) if there]
    ids = {image["id"] for image in images}
    annotations = [a for a in content["annotations"] if a["image_id"] in ids]
    return {**content, "images": images, "annotations": annotations}


def format_report(content: dict, split_of: Sequence[int], shares: Mapping[str, float]) -> str:
    """A table for people: images and objects of each split, with a mark at each number that is more
    than ``MARKED`` away from its share.

    Args:
        split_of: the index of the split of each image.
        shares: of the splits, by name.
    """
    names, row, image = _rows(content)
    cells = row * len(shares) + np.asarray(split_of)[image]
    table = np.bincount(cells, minlength=len(names) * len(shares)).reshape(len(names), -1)
    lines = ["".join(f"{name:>18} " for name in shares)]
    for name, numbers in zip(names, table, strict=True):
        found = numbers / max(numbers.sum(), 1)
        off = (np.abs(found - list(shares.values())) > MARKED + 1e-9) & numbers.any()
        texts = (f"{n:>9,} ({x:>5.1%})" for n, x in zip(numbers, found, strict=True))
        marked = (f"{t:>18}{'*' if x else ' '}" for t, x in zip(texts, off, strict=True))
        lines.append("".join(marked) + f" {name}")
    if any("*" in line for line in lines[1:]):
        lines.append(f"* more than {100 * MARKED:g} points away from its share")
    return "\n".join(lines)


def _rows(content: dict) -> tuple[list[str], np.ndarray, np.ndarray]:
    """What splits share: images, images without objects, crowded ones (the fullest tenth at most),
    objects, and those of each class.

    Returns:
        names of the R rows; and of N things that are counted, (N,) the row and (N,) the image.
    """
    position = {image["id"]: i for i, image in enumerate(content["images"])}
    class_of = {category["id"]: i for i, category in enumerate(content["categories"])}
    annotations = content["annotations"]
    image = np.array([position[a["image_id"]] for a in annotations], dtype=np.int64)
    category = np.array([class_of[a["category_id"]] for a in annotations], dtype=np.int64)
    objects = np.bincount(image, minlength=len(position))
    crowded = np.sort(objects)[-1 - len(objects) // 10] + 1
    images = np.arange(len(objects))
    kinds = [images, images[objects == 0], images[objects >= crowded], image]
    row = [np.full(len(kind), i) for i, kind in enumerate(kinds)]
    names = [
        "images",
        "images without objects",
        f"images with {crowded} objects or more",
        "objects",
    ]
    return (
        names + [category["name"] for category in content["categories"]],
        np.concatenate([*row, len(names) + category]),
        np.concatenate([*kinds, image]),
    )
