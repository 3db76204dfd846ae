"""Cases of tests/golden/error_analysis.json: ground truth, detections and figures of references;
and small scenes."""

import json

from conftest import GOLDEN

from atss.analysis.results import Results

CASES = json.loads((GOLDEN / "error_analysis.json").read_text())["cases"]
BOX, FAR = [10, 10, 40, 40], [120, 120, 40, 40]


def scene(boxes: dict[int, list], found: list[tuple], **fields) -> Results:
    """Return the results of one image per key, classes a and b, by (image, class, box, score)."""
    annotations = [
        {"image_id": i, "category_id": k, "bbox": box, **fields}
        for i, objects in boxes.items()
        for k, box in objects
    ]
    for i, x in enumerate(annotations, start=10):
        x["id"] = i
    size = {"width": 200, "height": 200}
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", **size} for i in boxes],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": annotations,
    }
    keys = ("image_id", "category_id", "bbox", "score")
    return Results(content, [dict(zip(keys, x, strict=True)) for x in found])
