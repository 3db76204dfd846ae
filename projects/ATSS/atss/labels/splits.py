"""Joining data sets in COCO's format, and dividing one."""

import math
import os
import re
from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import UserError
from .classes import ABSENT, PARTLY_MARKED
from .findings import LABEL_LINE
from .formats import Labels

# The first rows of the table count images. Each weighs as much as that many classes, because
# --split sets shares of images, and a data set may have hundreds of classes.
IMAGE_ROWS = 3
IMAGES_WEIGHT = 10
# Deviation from the share above which a number of the table is marked.
MARKED = 0.02
# Rounds of exchanges. The cost of an exchange grows with the number of groups, so that fewer are
# tried if there are many, which are balanced without them.
PASSES = 5
EXCHANGE_WORK = 20_000_000
MIN_GAIN = 1e-9


def join(sets: Sequence[Labels]) -> tuple[dict, str]:
    """Join data sets, and merge classes of one name. Several sets get new ids.

    Returns:
        the content, and the folder in which its file names begin.

    Raises:
        UserError: if only some sets are LVIS's, whose images are not fully annotated.
    """
    if len({labels.evaluator for labels in sets}) > 1:
        raise UserError(
            "LVIS's json, whose images are not fully annotated, cannot be joined with other formats"
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
    """Parse ``train=0.8 val=0.2``.

    Raises:
        UserError: if a text is invalid, or the shares do not sum to 1.
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
                f"--split takes NAME=SHARE ..., such as train=0.8 val=0.2, got {text!r}"
            )
    if len(shares) < len(texts) or not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
        total = sum(shares.values())
        raise UserError(f"the shares of --split must sum to 1 over different splits, got {total:g}")
    return shares


def group_by_name(file_names: Sequence[str], pattern: str) -> list[str | None]:
    """Return the match of the pattern, or of its first group, in each name, or None.

    Raises:
        UserError: if the pattern is no regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--group {pattern!r} is no regular expression: {error}") from error
    matches = [compiled.search(name) for name in file_names]
    return [x and (x[1] if compiled.groups else x[0]) for x in matches]


def divide(
    content: dict, groups: Sequence[Sequence[int]], shares: Sequence[float], seed: int
) -> np.ndarray:
    """Divide images so that each split has its share of every row of :func:`format_report`.

    Groups are dealt from the heaviest to the lightest, each to the split whose error grows least.
    Then pairs of groups are exchanged while the error falls: Pearson's chi-squared, summed over
    rows. With at least as many groups as splits, no split is empty.

    Args:
        groups: positions of images that stay together; each image is in one.
        shares: of the splits; they sum to 1.
        seed: decides between equal groups.

    Returns:
        (number of images,) index of each image's split.
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
    rows_of = [slice(start[g], start[g + 1]) for g in range(len(groups))]
    share = np.array(shares)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(groups))
    order = order[np.argsort(-square[order], kind="stable")]
    split_of = np.full(len(groups), -1)
    load = np.zeros((len(names), len(shares)))
    dealt = np.zeros(len(shares), dtype=np.int64)  # groups

    def put(g: int, split: int, sign: int = 1) -> None:
        load[row[rows_of[g]], split] += sign * value[rows_of[g]]
        dealt[split] += sign
        split_of[g] = split

    def cost(g: int) -> np.ndarray:
        """Return (splits,) the growth of the error by putting a group into each."""
        return (2 * value[rows_of[g]] @ load[row[rows_of[g]]] + square[g]) / share

    for left, g in zip(range(len(groups), 0, -1), order, strict=True):
        unfit = (dealt > 0) & (left <= (dealt == 0).sum())
        put(g, int(np.where(unfit, np.inf, cost(g)).argmin()))
    for _ in range(PASSES):
        before = split_of.copy()
        for g in generator.permutation(len(groups))[: EXCHANGE_WORK // len(value)]:
            old = split_of[g]
            put(g, old, -1)
            growth = cost(g)
            best = (-MIN_GAIN, g, old)
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
    """Return the content of some images, for a json: without lines of other files."""
    images = [image for image, chosen in zip(content["images"], inside, strict=True) if chosen]
    ids = {image["id"] for image in images}
    annotations = [
        {key: value for key, value in a.items() if key != LABEL_LINE}
        for a in content["annotations"]
        if a["image_id"] in ids
    ]
    return {**content, "images": images, "annotations": annotations}


def format_report(content: dict, split_of: Sequence[int], shares: Mapping[str, float]) -> str:
    """Format a table of images and objects of each split, and mark numbers more than ``MARKED``
    away from the share.

    Args:
        split_of: index of each image's split.
    """
    names, row, image = _rows(content)
    cells = row * len(shares) + np.asarray(split_of)[image]
    table = np.bincount(cells, minlength=len(names) * len(shares)).reshape(len(names), -1)
    lines = ["".join(f"{name:>18} " for name in shares)]
    for name, numbers in zip(names, table, strict=True):
        parts = numbers / max(numbers.sum(), 1)
        off = (np.abs(parts - list(shares.values())) > MARKED + 1e-9) & numbers.any()
        texts = (f"{n:>9,} ({x:>5.1%})" for n, x in zip(numbers, parts, strict=True))
        marked = (f"{t:>18}{'*' if x else ' '}" for t, x in zip(texts, off, strict=True))
        lines.append("".join(marked) + f" {name}")
    if any("*" in line for line in lines[1:]):
        lines.append(f"* more than {100 * MARKED:g} points away from its share")
    return "\n".join(lines)


def _rows(content: dict) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return the rows: images, images without objects, crowded images (at most a tenth), objects,
    and those of each class.

    Returns:
        names of the R rows; (N,) row and (N,) image of each of N counted items.
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
