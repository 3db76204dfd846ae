"""Which classes of a data set are used, in which order, and what counts as which: --classes."""

import csv
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from ..errors import UserError
from .findings import Finding

# Lists of ids of categories that LVIS's images have.
ABSENT, PARTLY_MARKED = "neg_category_ids", "not_exhaustive_category_ids"
# How rare a category of LVIS is: on at most 10 images, on at most 100, on more.
FREQUENCIES = "rcf"


def parse(text: str) -> dict[str, list[str]]:
    """``a,b=c``: the classes a and b in this order, c's objects counting as b's, with those of b
    where the data have it. A name with a comma stands in double quotes.

    Returns:
        each class, and the names in the data that count as it.

    Raises:
        ValueError: with a sentence that names what is wrong.
    """
    chosen: dict[str, list[str]] = {}
    for item in next(csv.reader([text], skipinitialspace=True), []):
        name, equals, other = (x.strip() for x in item.partition("="))
        if not name or (equals and not other):
            raise UserError(f"--classes takes NAME,NAME=OTHER,..., not {text!r}")
        names = chosen.setdefault(name, [name])
        if equals and other not in names:
            names.append(other)
    if not chosen:
        raise UserError("--classes names no class")
    counts = Counter(name for names in chosen.values() for name in names)
    for name, count in counts.items():
        if count > 1:
            twice = [new for new, names in chosen.items() if name in names]
            raise UserError(f"--classes has {name!r} count as both {' and '.join(twice)}")
    return chosen


def choose(
    content: dict, chosen: Mapping[str, Sequence[str]]
) -> tuple[dict, list[Finding], set[str]]:
    """Content in COCO's format with these classes, which get the ids 1, 2, ... in their order.

    Args:
        content: whatever its entries are: what is malformed stays so.
        chosen: as of :func:`parse`.
    Returns:
        the content; what was left out; the names in the data of which something was found.
    """
    named = [c for c in content["categories"] if isinstance(c.get("name"), str) and _is_id(c)]
    if len({c["id"] for c in named}) < len(content["categories"]):  # an error, by whatever reads it
        return content, [], {name for names in chosen.values() for name in names}
    number = {new: i for i, new in enumerate(chosen, start=1)}
    new_of = {name: number[new] for new, names in chosen.items() for name in names}
    ids = {c["id"]: new_of.get(c["name"].strip()) for c in named}
    # What else a category has is that of the one that counts as it and is the commonest in LVIS.
    by_rarity = sorted(named, key=lambda c: FREQUENCIES.find(str(c.get("frequency"))))
    commonest = {ids[c["id"]]: c for c in by_rarity}
    categories = [{**commonest.get(i, {}), "id": i, "name": new} for new, i in number.items()]
    annotations: list[dict] = []
    left_out: Counter[int | str] = Counter()
    for annotation in content["annotations"]:
        if "category_id" in annotation:
            old = annotation["category_id"]
            if isinstance(old, int | str) and old in ids:
                if ids[old] is None:
                    left_out[old] += 1
                    continue
                annotation = {**annotation, "category_id": ids[old]}
            else:
                annotation = {**annotation, "category_id": None}  # an unknown one, still
        annotations.append(annotation)
    marked: dict[object, set] = defaultdict(set)
    for annotation in content["annotations"]:
        if isinstance(annotation.get("image_id"), int | str):
            marked[annotation["image_id"]].add(str(annotation.get("category_id")))
    images = [_seen(image, ids, marked) for image in content["images"]]
    places = [f"{c['name']} ({left_out[c['id']]} objects)" for c in named if ids[c["id"]] is None]
    findings = [Finding("class_left_out", range(len(places)), places.__getitem__)] if places else []
    found = {c["name"].strip() for c in named} & set(new_of)
    new_content = {"images": images, "annotations": annotations, "categories": categories}
    return {**content, **new_content}, findings, found


def _is_id(category: dict) -> bool:
    return isinstance(category.get("id"), int | str)


def _seen(image: dict, ids: Mapping[int | str, int | None], marked: Mapping[object, set]) -> dict:
    """An image of LVIS whose lists of classes have the new ids. A class is absent where all that
    count as it are; where one of them is marked, and another partly, or nobody knows, it is partly
    marked."""
    lists = [image.get(ABSENT), image.get(PARTLY_MARKED)]
    if not all(isinstance(x, list) and all(isinstance(i, int) for i in x) for x in lists):
        return image
    absent, partly = (set(x or ()) for x in lists)
    number = image.get("id")
    marked_here = marked.get(number, ()) if isinstance(number, int | str) else ()
    members: dict[int, list] = defaultdict(list)
    for old, new in ids.items():
        if new is not None:
            members[new].append(old)
    new_lists: dict[str, list[int]] = {ABSENT: [], PARTLY_MARKED: []}
    for new, olds in members.items():
        seen = [old for old in olds if str(old) in marked_here]
        unknown = [old for old in olds if old not in absent and old not in seen]
        if all(old in absent for old in olds):
            new_lists[ABSENT].append(new)
        elif partly.intersection(olds) or (seen and unknown):
            new_lists[PARTLY_MARKED].append(new)
    return {**image, **{key: sorted(x) for key, x in new_lists.items()}}


def refuse_unknown(
    chosen: Mapping[str, Sequence[str]], found: set[str], there: Sequence[str]
) -> None:
    """A misspelt name would be a class without objects.

    Args:
        found: as of :func:`choose`, of all data sets together.
        there: the names that they have.

    Raises:
        ValueError: naming what --classes names and no data set has.
    """
    for new, names in chosen.items():
        # A class that others count as need not be one of the data's.
        missing = [name for name in names if name not in found and (name != new or len(names) == 1)]
        if missing:
            known = ", ".join(map(repr, there[:10])) + (", ..." if len(there) > 10 else "")
            raise UserError(
                f"--classes names {missing[0]!r}, which no data set has; there are {known}"
            )
