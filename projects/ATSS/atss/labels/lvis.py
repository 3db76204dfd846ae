"""Differences between LVIS's json and COCO's."""

from pathlib import PurePosixPath
from urllib.parse import urlsplit

from .classes import ABSENT, FREQUENCIES, PARTLY_MARKED
from .findings import Finding, show


def is_lvis(content: dict) -> bool:
    """Return whether images list absent classes, or those not marked in full (arXiv 1908.03195,
    section 2)."""
    return any(ABSENT in image or PARTLY_MARKED in image for image in content["images"])


def complete(content: dict) -> dict:
    """Add COCO's ``iscrowd``, 0, and ``file_name``, the end of the image's URL."""
    images = [_with_file_name(image) for image in content["images"]]
    annotations = [{"iscrowd": 0, **annotation} for annotation in content["annotations"]]
    return {**content, "images": images, "annotations": annotations}


def _with_file_name(image: dict) -> dict:
    url = image.get("coco_url")
    if "file_name" in image or not isinstance(url, str):
        return image
    try:
        path = PurePosixPath(urlsplit(url).path)
    except ValueError:  # half a bracket, for example
        return image
    return {**image, "file_name": "/".join(path.parts[-2:])}


def find(content: dict) -> list[Finding]:
    """Find faults of fields that only LVIS's evaluation reads."""
    ids = {c["id"] for c in content["categories"] if isinstance(c.get("id"), int)}

    def is_id_list(value: object) -> bool:
        return isinstance(value, list) and all(type(i) is int and i in ids for i in value)

    images = [
        f"image {image.get('id')} ({image.get('file_name')}), "
        + ", ".join(f"{key} {show(image.get(key))}" for key in (ABSENT, PARTLY_MARKED))
        for image in content["images"]
        if not (is_id_list(image.get(ABSENT)) and is_id_list(image.get(PARTLY_MARKED)))
    ]
    categories = [
        f"category {category.get('id')} ({category.get('name')}), "
        f"frequency {show(category.get('frequency'))}"
        for category in content["categories"]
        if category.get("frequency") not in tuple(FREQUENCIES)
    ]
    texts = all(isinstance(image.get("id"), str) for image in content["images"])
    bad_ids = [
        f"image {image.get('id')} ({image.get('file_name')})"
        for image in content["images"]
        if texts or (type(image.get("id")) is int and not 0 <= image["id"] < 2**63)
    ]
    places = (
        ("category_lists_malformed", images),
        ("frequency_malformed", categories),
        ("lvis_id", bad_ids),
    )
    return [Finding(kind, range(len(p)), p.__getitem__) for kind, p in places if p]
