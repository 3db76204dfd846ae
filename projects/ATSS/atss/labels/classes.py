"""``--classes``: choose, order and merge classes."""

import csv
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from ..errors import UserError
from .findings import Finding

# LVIS's fields of an image, lists of category ids.
ABSENT, PARTLY_MARKED = "neg_category_ids", "not_exhaustive_category_ids"
# LVIS's frequencies: rare (at most 10 images), common (at most 100), frequent.
FREQUENCIES = "rcf"


def parse(text: str) -> dict[str, list[str]]:
    """Parse ``a,b=c``: the classes a and b, with c merged into b; quoted names may contain a comma.

    Returns:
        {class: names in the data that count as it}.

    Raises:
        UserError: if the text is invalid, or a name counts as two classes.
    """
    chosen: dict[str, list[str]] = {}
    for item in next(csv.reader([text], skipinitialspace=True), []):
        name, equals, other = (x.strip() for x in item.partition("="))
        if not name or (equals and not other):
            raise UserError(f"--classes takes NAME,NAME=OTHER,..., got {text!r}")
        names = chosen.setdefault(name, [name])
        if equals and other not in names:
            names.append(other)
    if not chosen:
        raise UserError("--classes names no class")
    counts = Counter(name for names in chosen.values() for name in names)
    for name, count in counts.items():
        if count > 1:
            both = [new for new, names in chosen.items() if name in names]
            raise UserError(f"--classes: {name!r} counts as both {' and '.join(both)}")
    return chosen


def choose(
    content: dict, chosen: Mapping[str, Sequence[str]]
) -> tuple[dict, list[Finding], set[str]]:
    """Keep the chosen classes, with the ids 1, 2, ... in their order.

    Args:
        content: in COCO's format; malformed entries stay, and are reported later.
        chosen: as from :func:`parse`.

    Returns:
        the content; a finding of the classes left out; the chosen names in the data.
    """
    named = [c for c in content["categories"] if isinstance(c.get("name"), str) and _is_id(c)]
    if len({c["id"] for c in named}) < len(content["categories"]):  # find_in_json reports it
        return content, [], {name for names in chosen.values() for name in names}
    number = {new: i for i, new in enumerate(chosen, start=1)}
    new_of = {name: number[new] for new, names in chosen.items() for name in names}
    ids = {c["id"]: new_of.get(c["name"].strip()) for c in named}
    # Merged categories get the other fields of the most frequent one.
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
                annotation = {**annotation, "category_id": None}  # stays unknown
        annotations.append(annotation)
    marked: dict[object, set] = defaultdict(set)
    for annotation in content["annotations"]:
        if isinstance(annotation.get("image_id"), int | str):
            marked[annotation["image_id"]].add(str(annotation.get("category_id")))
    images = [_renumber_lists(image, ids, marked) for image in content["images"]]
    places = [f"{c['name']} ({left_out[c['id']]} objects)" for c in named if ids[c["id"]] is None]
    findings = [Finding("class_left_out", range(len(places)), places.__getitem__)] if places else []
    found = {c["name"].strip() for c in named} & set(new_of)
    new_content = {"images": images, "annotations": annotations, "categories": categories}
    return {**content, **new_content}, findings, found


def _is_id(category: dict) -> bool:
    return isinstance(category.get("id"), int | str)


def _renumber_lists(
    image: dict, ids: Mapping[int | str, int | None], marked: Mapping[object, set]
) -> dict:
    """Give LVIS's lists the new ids. A merged class is absent if all its members are, partly marked
    if a member is, or if one is marked and another unknown."""
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
        present = [old for old in olds if str(old) in marked_here]
        unknown = [old for old in olds if old not in absent and old not in present]
        if all(old in absent for old in olds):
            new_lists[ABSENT].append(new)
        elif partly.intersection(olds) or (present and unknown):
            new_lists[PARTLY_MARKED].append(new)
    return {**image, **{key: sorted(x) for key, x in new_lists.items()}}


def refuse_unknown(
    chosen: Mapping[str, Sequence[str]], found: set[str], names_in_data: Sequence[str]
) -> None:
    """Raise UserError for a name that no data set has: a class without objects. ``found`` is from
    :func:`choose`, of all data sets."""
    for new, names in chosen.items():
        # A class into which others are merged may be new.
        missing = [name for name in names if name not in found and (name != new or len(names) == 1)]
        if missing:
            choices = [*map(repr, names_in_data[:10]), *["..."] * (len(names_in_data) > 10)]
            raise UserError(
                f"--classes: no data set has {missing[0]!r}: choose from [{', '.join(choices)}]"
            )
