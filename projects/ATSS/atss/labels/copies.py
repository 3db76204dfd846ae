"""Images that a data set contains more than once (the same bytes, resized, compressed anew or
mirrored), and photographs of one scene: in two splits they make an AP too good."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from PIL import Image

from ..errors import UserError
from .coco import is_empty
from .findings import Finding
from .folders import THREADS
from .formats import Labels

# Side of the perceptual hash, imagehash's phash: signs of the lowest frequencies of the image's
# discrete cosine transform at 4 * SIDE pixels, against their median.
SIDE = 16
# Differing bits, of 256. Copies of a quarter to 1.3 times the size, at JPEG qualities 60 and 90,
# differ in 8 at most, brighter ones in 40; photographs of one scene, seconds apart, in 32 to 98.
# Of 790,000 pairs of COCO's, BCCD's and Aquarium's images, none of two scenes differ in 80 or less.
COPY = 40
SCENE = 80
FREQUENCIES = np.cos(
    np.pi / (4 * SIDE) * (np.arange(4 * SIDE) + 0.5) * np.arange(SIDE)[:, None]
)  # (SIDE, 4 * SIDE)
# A mirrored image has the opposite sign at odd horizontal frequencies.
MIRROR = np.packbits(np.arange(SIDE**2) % 2).view(np.uint64)
# Pairs of hashes that are compared at once: 8 bytes each, and as many in between.
PAIRS = 2**22


def find_copies(
    files: Sequence[str], progress: Callable[..., Iterable] = lambda items, **_: items
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Group files of equal bytes, files that show one image, and files that show one scene. Only
    the bytes of files that are no images are compared.

    Args:
        progress: wraps what takes long, as tqdm does.

    Returns:
        positions of equal files, of copies of each image, equal ones among them, and of
        photographs of each scene, copies among them.
    """
    sizes = [os.path.getsize(f) or None if os.path.isfile(f) else None for f in files]
    of_one_size = [i for group in by_key(sizes) for i in group]
    same_bytes = [
        [of_one_size[i] for i in group] for group in by_key(_digest(files[i]) for i in of_one_size)
    ]
    with ThreadPoolExecutor(THREADS) as pool:
        looks = pool.map(_hash, files)
        hashes = list(progress(looks, total=len(files), unit="image", desc="copies"))
    copies, scenes = (join_groups(len(files), same_bytes, groups) for groups in _near(hashes))
    return same_bytes, [g for g in copies if len(g) > 1], [g for g in scenes if len(g) > 1]


def find_in_others(
    labels: Labels,
    others: Sequence[Labels],
    progress: Callable[..., Iterable] = lambda items, **_: items,
) -> list[Finding]:
    """Images of a split that other splits have too, or whose scene other splits show.

    Args:
        progress: as of :func:`find_copies`.

    Raises:
        ValueError: where images of other splits are not there to be compared.
    """
    sets = (labels, *others)
    files = [os.path.join(x.image_dir, str(e["file_name"])) for x in sets for e in images_of(x)]
    own = len(images_of(labels))
    missing = [file for file in files[own:] if not os.path.isfile(file)]
    if missing:
        raise UserError(f"{len(missing)} images of other splits do not exist, such as {missing[0]}")
    findings: list[Finding] = []
    known: set[int] = set()  # a copy is of the same scene, and is named once
    kinds = (
        ("image_in_other_split", "is"),
        ("image_of_same_scene_in_other_split", "looks like"),
    )
    for (kind, verb), groups in zip(kinds, find_copies(files, progress)[1:], strict=True):
        where = {
            i: f"{files[i]}, which {verb} {next(files[j] for j in group if j >= own)}"
            for group in groups
            if group[-1] >= own
            for i in group
            if i < own and i not in known
        }
        known |= where.keys()
        if where:
            findings.append(Finding(kind, sorted(where), where.__getitem__))
    return findings


def images_of(labels: Labels) -> list[dict]:
    """Those that have a file's name."""
    return [e for e in labels.content["images"] if not is_empty(e.get("file_name"))]


def by_key(keys: Iterable[Hashable]) -> list[list[int]]:
    """Positions of equal keys, where there are several; None is equal to nothing."""
    found: dict[Hashable, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        if key is not None:
            found[key].append(i)
    return [group for group in found.values() if len(group) > 1]


def join_groups(size: int, *groupings: Iterable[Sequence[int]]) -> list[list[int]]:
    """Groups of all positions such that no group of any grouping is torn apart, in the order of
    their first; who is in none is alone."""
    parent = list(range(size))

    def first(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for group in (group for groups in groupings for group in groups):
        for i, j in pairwise(group):
            low, high = sorted((first(i), first(j)))
            parent[high] = low
    joined: dict[int, list[int]] = defaultdict(list)
    for i in range(size):
        joined[first(i)].append(i)
    return list(joined.values())


def _digest(file: str) -> str | None:
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return None


def _hash(file: str) -> np.ndarray | None:
    """(SIDE * SIDE / 64,) uint64; None for what cannot be read, or is of one colour, like many
    others."""
    try:
        with Image.open(file) as image:
            image.draft("L", (16 * SIDE, 16 * SIDE))  # a JPEG is decoded smaller, and faster
            grey = image.convert("L")
            low, high = grey.getextrema()
            if low == high:
                return None
            pixels = np.asarray(grey.resize((4 * SIDE, 4 * SIDE), Image.Resampling.LANCZOS))
    except Exception:  # damaged files make Pillow raise errors of many types
        return None
    signal = FREQUENCIES @ pixels @ FREQUENCIES.T
    return np.packbits(signal > np.median(signal)).view(np.uint64)


def _near(hashes: Sequence[np.ndarray | None]) -> list[list[list[int]]]:
    """Compare all pairs, in chunks.

    Returns:
        for COPY and for SCENE, groups of positions in which each hash, or its mirror image, differs
        in so many bits at most from another one.
    """
    there = np.array([i for i, x in enumerate(hashes) if x is not None], dtype=np.int64)
    words = np.array([x for x in hashes if x is not None]).reshape(len(there), -1)
    labels = {radius: np.arange(len(there)) for radius in (COPY, SCENE)}  # equal in a group
    step = PAIRS // max(len(there), 1) + 1
    for start in range(0, len(there), step):
        rows, columns = words[start : start + step, None], words[start:]
        differing = np.zeros((2, len(rows), len(columns)), dtype=np.uint16)
        for word, mirror in enumerate(MIRROR):
            bits = rows[..., word] ^ columns[:, word]
            differing[0] += np.bitwise_count(bits)
            differing[1] += np.bitwise_count(bits ^ mirror)
        distance = differing.min(axis=0)
        for radius, label in labels.items():
            for near in distance <= radius:
                joined = np.unique(label[start:][near])  # at least its own
                if len(joined) > 1:
                    label[np.isin(label, joined)] = joined[0]
    return [
        [there[members].tolist() for members in by_key(label.tolist())] for label in labels.values()
    ]
