"""Joins data sets, and divides one into splits, in COCO's format."""

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from .choice import ABSENT, PARTLY_MARKED
from .formats import Labels


def join(sets: Sequence[Labels]) -> tuple[dict, str]:
    """One content of several, and the folder in which its file names begin. Classes are one by
    their name; ids of images and annotations are new where there are several sets.

    Raises:
        ValueError: where LVIS's json is among others, whose images are marked in full.
    """
    kinds = {labels.evaluator for labels in sets}
    if len(kinds) > 1:
        raise ValueError(
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
            raise ValueError(
                f"--split takes NAME=SHARE ..., such as train=0.8 val=0.2, not {text!r}"
            )
    if len(shares) < len(texts) or not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
        total = sum(shares.values())
        raise ValueError(f"the shares of --split make {total:g} of different splits, in place of 1")
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
        raise ValueError(f"--group {pattern!r} is no regular expression: {error}") from error
    found = [compiled.search(name) for name in file_names]
    return [x and (x[1] if compiled.groups else x[0]) for x in found]


def divide(
    content: dict, groups: Sequence[Sequence[int]], shares: Sequence[float], seed: int
) -> np.ndarray:
    """(number of images,) which split each image is in: the same for a group, and of every class
    about the share of its objects (iterative stratification, Sechidis et al., ECML 2011).

    Classes are dealt in the order of their rarity, the groups that have most of it first, each to
    the split that lacks most of the class, then of images, then has fewest. None stays empty where
    there are groups enough.

    Args:
        groups: of positions of images that stay together, each image in one.
        shares: of the splits, 1 in all.
        seed: of what decides between equals.
    """
    position = {image["id"]: i for i, image in enumerate(content["images"])}
    group_of = np.empty(len(position), dtype=np.int64)
    for g, members in enumerate(groups):
        group_of[list(members)] = g
    order = np.random.default_rng(seed).permutation(len(groups))
    objects = [Counter[object]() for _ in groups]
    for annotation in content["annotations"]:
        objects[group_of[position[annotation["image_id"]]]][annotation["category_id"]] += 1
    total: Counter[object] = Counter()
    groups_with: dict[object, list[int]] = defaultdict(list)
    for g in order:
        total.update(objects[g])
        for c in objects[g]:
            groups_with[c].append(g)
    lacks = {c: np.multiply(shares, n) for c, n in total.items()}
    lacks_images = np.multiply(shares, len(position))
    split_of = np.full(len(groups), -1)
    dealt = np.zeros(len(shares))  # groups

    def give(g: int, lack: np.ndarray) -> None:
        most = np.flatnonzero(np.isclose(lack, lack.max()))
        most = most[np.isclose(lacks_images[most], lacks_images[most].max())]
        split = most[np.argmin(dealt[most] / np.array(shares)[most])]
        split_of[g] = split
        dealt[split] += 1
        lacks_images[split] -= len(groups[g])
        for c, n in objects[g].items():
            lacks[c][split] -= n

    left = Counter(total)
    while left:
        rarest = min(left, key=lambda c: (left[c], str(c)))  # of those left, maybe none at all
        with_it = [g for g in groups_with[rarest] if split_of[g] < 0]
        for g in sorted(with_it, key=lambda g: -objects[g][rarest]):
            give(g, lacks[rarest])
            for c, n in objects[g].items():
                left[c] -= n
        del left[rarest]
    for g in sorted((g for g in order if split_of[g] < 0), key=lambda g: -len(groups[g])):
        give(g, lacks_images)
    for split in range(len(shares)):
        if not dealt[split] and dealt.max() > 1:
            of_most = [g for g in order if split_of[g] == dealt.argmax()]
            smallest = min(of_most, key=lambda g: (len(groups[g]), sum(objects[g].values())))
            dealt[[split_of[smallest], split]] += -1, 1
            split_of[smallest] = split
    return split_of[group_of]


def part(content: dict, inside: Sequence[bool]) -> dict:
    """The images of a split with their objects, and all classes."""
    images = [image for image, there in zip(content["images"], inside, strict=True) if there]
    ids = {image["id"] for image in images}
    annotations = [a for a in content["annotations"] if a["image_id"] in ids]
    return {**content, "images": images, "annotations": annotations}


def page(content: dict, split_of: Sequence[int], names: Sequence[str]) -> str:
    """Images and objects of each class in each split, for people."""
    position = {image["id"]: i for i, image in enumerate(content["images"])}
    counts: Mapping[object, Counter[int]] = {c["id"]: Counter() for c in content["categories"]}
    for annotation in content["annotations"]:
        counts[annotation["category_id"]][split_of[position[annotation["image_id"]]]] += 1
    images = Counter(split_of)
    rows = [("images", images)] + [(c["name"], counts[c["id"]]) for c in content["categories"]]
    lines = ["".join(f"{name:>18}" for name in names)]
    for what, of_split in rows:
        total = max(sum(of_split.values()), 1)
        cells = (f"{of_split[i]:>9,} ({of_split[i] / total:>5.1%})" for i in range(len(names)))
        lines.append("".join(f"{cell:>18}" for cell in cells) + f"  {what}")
    return "\n".join(lines)
