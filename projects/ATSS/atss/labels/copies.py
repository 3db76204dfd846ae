"""Copies of images (equal bytes, resized, compressed again or mirrored), and photographs of one
scene, which make the AP too high if two splits share them."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from PIL import Image

from ..errors import UserError
from .findings import Finding
from .folders import THREADS
from .formats import Labels
from .values import is_empty

# Side of the perceptual hash, as in imagehash's phash: the lowest frequencies of the discrete
# cosine transform at 4 * SIDE pixels, compared with their median.
SIDE = 16
# Largest numbers of differing bits, of 256. Measured: at most 8 for copies of 0.25 to 1.3 times the
# size at JPEG qualities 60 and 90, 40 for brighter copies, 32 to 98 for photographs of one scene
# seconds apart, more than 80 for 790,000 pairs of two scenes in COCO, BCCD and Aquarium.
COPY = 40
SCENE = 80
FREQUENCIES = np.cos(
    np.pi / (4 * SIDE) * (np.arange(4 * SIDE) + 0.5) * np.arange(SIDE)[:, None]
)  # (SIDE, 4 * SIDE)
# Mirroring an image flips the bits of odd horizontal frequencies.
MIRROR = np.packbits(np.arange(SIDE**2) % 2).view(np.uint64)
# Pairs of hashes compared at once: 16 bytes each.
PAIRS = 2**22


def find_copies(
    files: Sequence[str], progress: Callable[..., Iterable] = lambda items, **_: items
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Group files. Other files than images are only compared by their bytes.

    Returns:
        groups of positions: equal files; these and copies; these and photographs of one scene.
    """
    sizes = [os.path.getsize(f) or None if os.path.isfile(f) else None for f in files]
    of_one_size = [i for group in by_key(sizes) for i in group]
    same_bytes = [
        [of_one_size[i] for i in group] for group in by_key(_digest(files[i]) for i in of_one_size)
    ]
    with ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(_hash, files)
        hashes = list(progress(results, total=len(files), unit="image", desc="copies"))
    copies, scenes = (join_groups(len(files), same_bytes, groups) for groups in _near(hashes))
    return same_bytes, [g for g in copies if len(g) > 1], [g for g in scenes if len(g) > 1]


def find_in_others(
    labels: Labels,
    others: Sequence[Labels],
    progress: Callable[..., Iterable] = lambda items, **_: items,
) -> list[Finding]:
    """Find images of a split that other splits contain too, or whose scene they show.

    Raises:
        UserError: if images of other splits do not exist.
    """
    sets = (labels, *others)
    files = [os.path.join(x.image_dir, str(e["file_name"])) for x in sets for e in images_of(x)]
    count = len(images_of(labels))
    missing = [file for file in files[count:] if not os.path.isfile(file)]
    if missing:
        raise UserError(f"{len(missing)} images of other splits do not exist, such as {missing[0]}")
    findings: list[Finding] = []
    reported: set[int] = set()  # a copy is also of the same scene: report it once
    kinds = (
        ("image_in_other_split", "is"),
        ("image_of_same_scene_in_other_split", "looks like"),
    )
    for (kind, verb), groups in zip(kinds, find_copies(files, progress)[1:], strict=True):
        places = {
            i: f"{files[i]}, which {verb} {next(files[j] for j in group if j >= count)}"
            for group in groups
            if group[-1] >= count
            for i in group
            if i < count and i not in reported
        }
        reported |= places.keys()
        if places:
            place = places.__getitem__
            findings.append(Finding(kind, sorted(places), place, entries="images"))
    return findings


def images_of(labels: Labels) -> list[dict]:
    return [e for e in labels.content["images"] if not is_empty(e.get("file_name"))]


def by_key(keys: Iterable[Hashable]) -> list[list[int]]:
    """Return groups of at least two positions of equal keys, without None."""
    positions: dict[Hashable, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        if key is not None:
            positions[key].append(i)
    return [group for group in positions.values() if len(group) > 1]


def join_groups(size: int, *groupings: Iterable[Sequence[int]]) -> list[list[int]]:
    """Return the connected components of 0 to size - 1, by first member; positions of a group are
    connected."""
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
    """Return (SIDE * SIDE / 64,) uint64; None if unreadable, or of one colour."""
    try:
        with Image.open(file) as image:
            image.draft("L", (16 * SIDE, 16 * SIDE))  # decodes a JPEG smaller and faster
            grey = image.convert("L")
            low, high = grey.getextrema()
            if low == high:
                return None
            pixels = np.asarray(grey.resize((4 * SIDE, 4 * SIDE), Image.Resampling.LANCZOS))
    except Exception:  # damaged files make Pillow raise many types
        return None
    signal = FREQUENCIES @ pixels @ FREQUENCIES.T
    return np.packbits(signal > np.median(signal)).view(np.uint64)


def _near(hashes: Sequence[np.ndarray | None]) -> list[list[list[int]]]:
    """Return, for COPY and SCENE, groups connected by at most so many differing bits, plain or
    mirrored."""
    hashed = np.array([i for i, x in enumerate(hashes) if x is not None], dtype=np.int64)
    words = np.array([x for x in hashes if x is not None]).reshape(len(hashed), -1)
    labels = {radius: np.arange(len(hashed)) for radius in (COPY, SCENE)}  # equal in a group
    step = PAIRS // max(len(hashed), 1) + 1
    for start in range(0, len(hashed), step):
        rows, columns = words[start : start + step, None], words[start:]
        differing = np.zeros((2, len(rows), len(columns)), dtype=np.uint16)
        for word, mirror in enumerate(MIRROR):
            bits = rows[..., word] ^ columns[:, word]
            differing[0] += np.bitwise_count(bits)
            differing[1] += np.bitwise_count(bits ^ mirror)
        distance = differing.min(axis=0)
        for radius, label in labels.items():
            for near in distance <= radius:
                joined = np.unique(label[start:][near])  # its own label at least
                if len(joined) > 1:
                    label[np.isin(label, joined)] = joined[0]
    return [
        [hashed[members].tolist() for members in by_key(label.tolist())]
        for label in labels.values()
    ]
