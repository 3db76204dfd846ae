"""Images that are there more than once, as the same bytes or resized and compressed anew: in two
splits they make an AP too good."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from PIL import Image

from .coco_json import is_empty
from .findings import Finding
from .folders import THREADS
from .formats import Labels

# Sides of the perceptual hash. Of its 256 bits, copies of a quarter to 1.3 times the size, at JPEG
# qualities 60 and 90, differ in 8 at most, and two of 256 photographs of COCO in 90 at least.
SIDE = 16
FAR = 12
# Hashes no farther apart than that are equal in one of these parts at least.
PARTS = 16


def can_see_resized() -> bool:
    """Whether imagehash is installed, without which only equal bytes are found."""
    try:
        import imagehash  # noqa: F401
    except ImportError:
        return False
    return True


def find_copies(
    files: Sequence[str], progress: Callable[..., Iterable] = lambda items, **_: items
) -> list[list[int]]:
    """Positions of files that show one image, of each such image. Of what is no image the bytes
    alone are compared.

    Args:
        progress: wraps what takes long, as tqdm does.
    """
    sizes = [os.path.getsize(f) or None if os.path.isfile(f) else None for f in files]
    of_one_size = [i for group in by_key(sizes) for i in group]
    same_bytes = by_key(_digest(files[i]) for i in of_one_size)
    groupings: list[Iterable[Sequence[int]]] = [[[of_one_size[i] for i in g] for g in same_bytes]]
    if can_see_resized():
        with ThreadPoolExecutor(THREADS) as pool:
            looks = pool.map(_hash, files)
            hashes = list(progress(looks, total=len(files), unit="image", desc="copies"))
        groupings.append(_near(hashes))
    return [group for group in join_groups(len(files), *groupings) if len(group) > 1]


def find_in_others(
    labels: Labels,
    others: Sequence[Labels],
    progress: Callable[..., Iterable] = lambda items, **_: items,
) -> list[Finding]:
    """Images of a split that other splits have too.

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
        raise ValueError(
            f"{len(missing)} images of other splits do not exist, such as {missing[0]}"
        )
    where = {
        i: f"{files[i]}, which is {next(files[j] for j in group if j >= own)}"
        for group in find_copies(files, progress)
        if group[-1] >= own
        for i in group
        if i < own
    }
    return [Finding("image_in_other_split", sorted(where), where.__getitem__)] if where else []


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
    """(SIDE * SIDE,) bool; None for what cannot be read, or is of one colour, like many others."""
    import imagehash

    try:
        with Image.open(file) as image:
            image.draft("L", (16 * SIDE, 16 * SIDE))  # a JPEG is decoded smaller, and faster
            grey = image.convert("L")
            low, high = grey.getextrema()
            return None if low == high else imagehash.phash(grey, hash_size=SIDE).hash.ravel()
    except Exception:  # damaged files make Pillow raise errors of many types
        return None


def _near(hashes: Sequence[np.ndarray | None]) -> Iterator[list[int]]:
    """Groups of positions in which each hash differs in FAR bits at most from another one's."""
    known = {i: x for i, x in enumerate(hashes) if x is not None}
    if len(known) < 2:
        return
    there, bits = list(known), np.stack(list(known.values()))
    parts = np.packbits(bits, axis=1).reshape(len(there), PARTS, -1)
    for part in range(PARTS):
        for group in by_key(row.tobytes() for row in parts[:, part]):
            left = np.array(group)
            while len(left):
                near, left = [int(left[0])], left[1:]
                for i in near:  # which grows: what is near to one of them belongs to all
                    close = (bits[left] != bits[i]).sum(axis=1) <= FAR
                    near += left[close].tolist()
                    left = left[~close]
                if len(near) > 1:
                    yield [there[i] for i in near]
