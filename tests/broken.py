"""Broken data sets, and the expected result of training and of tools/check_dataset.py.

labels/test_check.py tests each case; broken_page.py writes them into docs/broken_input.md.
"""

import io
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

WIDTH, HEIGHT = 64, 48
COLOUR = (200, 120, 40)  # RGB of every image
OBJECTS = 12


@dataclass(frozen=True)
class Case:
    """A data set with one fault.

    Attributes:
        name: the fault, as in the page.
        change: called with the json's content and the folder of the data set; changes either.
        training: "stops"; "leaves out"; "trains".
        sentence: a part of the error ("stops") or of the log ("leaves out"); the handling, as in
            the page ("trains").
        kind: the key of KINDS that check_dataset.py reports; None if it cannot read the
            annotations; "" for none.
        thing: a text that the error and the report must contain.
        objects: the number of objects in training, unless it stops.
        colour: RGB of the changed image in training; None if not tested.
    """

    name: str
    change: Callable[[dict, Path], object]
    training: str
    sentence: str
    kind: str | None
    thing: str = "a.png"
    objects: int = OBJECTS
    colour: tuple[int, int, int] | None = None


def make_data(root: Path) -> dict:
    """Write four images, and return the content of a valid json with three objects on each."""
    (root / "images").mkdir(parents=True)
    images = []
    for i, name in enumerate(("a.png", "b.png", "c.png", "d.png"), start=1):
        plain().save(root / "images" / name)
        images.append({"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT})
    annotations = [
        {
            "id": 3 * i + j + 1,
            "image_id": i + 1,
            "category_id": 1 + j % 2,
            "bbox": [4 + 18 * j, 10 + i, 16, 20],
            "area": 320,
            "iscrowd": 0,
        }
        for i in range(4)
        for j in range(3)
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return {"images": images, "categories": categories, "annotations": annotations}


def write_yolo(content: dict, root: Path, **keys: object) -> Path:
    """Write the same data in YOLO's layout, and return its yaml, which has these keys too."""
    names = [c["name"] for c in content["categories"]]
    (root / "labels").mkdir()
    for image in content["images"]:
        lines = [
            label(a["category_id"] - 1, a["bbox"])
            for a in content["annotations"]
            if a["image_id"] == image["id"]
        ]
        (root / "labels" / image["file_name"]).with_suffix(".txt").write_text("\n".join(lines))
    yaml_file = root / "data.yaml"
    yaml_file.write_text(json.dumps({"train": "images", "names": names} | keys))  # json is yaml
    return yaml_file


def write_voc(content: dict, root: Path) -> Path:
    """Write the same data as Pascal VOC's xml, with a split "train", and return the folder."""
    names = {c["id"]: c["name"] for c in content["categories"]}
    (root / "Annotations").mkdir()
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for image in content["images"]:
        size = f"<width>{image['width']}</width><height>{image['height']}</height><depth>3</depth>"
        objects = [
            voc_object(names[a["category_id"]], a["bbox"])
            for a in content["annotations"]
            if a["image_id"] == image["id"]
        ]
        xml = f"<filename>{image['file_name']}</filename>\n<size>{size}</size>\n"
        path = (root / "Annotations" / image["file_name"]).with_suffix(".xml")
        path.write_text(f"<annotation>\n{xml}{''.join(objects)}</annotation>\n")
    stems = [Path(image["file_name"]).stem for image in content["images"]]
    (root / "ImageSets" / "Main" / "train.txt").write_text("\n".join(stems))
    return root


def voc_object(name: str, box: list[float]) -> str:
    """Return the element of a box (x, y, width, height) in pixels."""
    x, y, w, h = box
    corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
    bndbox = "".join(f"<{k}>{v}</{k}>" for k, v in corners.items())
    return f"<object><name>{name}</name><bndbox>{bndbox}</bndbox></object>\n"


def to_lvis(content: dict) -> None:
    """Replace COCO's fields by LVIS's."""
    for image in content["images"]:
        image["coco_url"] = f"http://images.example/images/{image.pop('file_name')}"
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": [2]}
    for category in content["categories"]:
        category["frequency"] = "r"
    for annotation in content["annotations"]:
        del annotation["iscrowd"]


def label(category: int, box: list[float]) -> str:
    """Return the line of a box (x, y, width, height) in pixels."""
    x, y, w, h = box
    numbers = (x + w / 2) / WIDTH, (y + h / 2) / HEIGHT, w / WIDTH, h / HEIGHT
    return f"{category} " + " ".join(f"{number:.6f}" for number in numbers)


def break_data(case: Case, root: Path, lvis: bool = False) -> tuple[Path, Path]:
    """Write the broken data set; return its json and image folder, or its yaml or folder and split.

    Args:
        lvis: write LVIS's fields, as for the cases of LVIS.
    """
    content = make_data(root)
    if lvis := lvis or case in LVIS:
        to_lvis(content)
    if case in YOLO:
        yaml_file = write_yolo(content, root)
        case.change(content, root)
        return yaml_file, Path("train")
    if case in VOC:
        write_voc(content, root)
        case.change(content, root)
        return root, Path("train")
    json_file = root / "annotations.json"
    json_file.write_text("")
    changed = case.change(content, root)
    if isinstance(changed, bytes):
        json_file.write_bytes(changed)
    elif json_file.exists():
        json_file.write_text(json.dumps(changed if isinstance(changed, list) else content))
    return json_file, root if lvis else root / "images"


# ------------------------------------------------------------------------------------------------
# Ways to break
# ------------------------------------------------------------------------------------------------


def put(*path: object) -> Callable:
    """Set the value at a path of keys and positions: ``put(*path, value)``."""
    *way, key, value = path

    def change(content: dict, root: Path) -> None:
        for step in way:
            content = content[step]
        content[key] = value

    return change


def drop(*path: object) -> Callable:
    *way, key = path

    def change(content: dict, root: Path) -> None:
        for step in way:
            content = content[step]
        del content[key]

    return change


def boxes(new: Callable[[list], list]) -> Callable:
    """Replace every box."""

    def change(content: dict, root: Path) -> None:
        for annotation in content["annotations"]:
            annotation["bbox"] = new(annotation["bbox"])

    return change


def each(key: str, value: object, image: int = 0) -> Callable:
    """Set a field of all annotations, or of those of one image."""

    def change(content: dict, root: Path) -> None:
        for annotation in content["annotations"]:
            if image in (0, annotation["image_id"]):
                annotation[key] = value

    return change


def rle(counts: list, size: Sequence | None = (HEIGHT, WIDTH)) -> dict:
    """Return run lengths in COCO's format."""
    return {"counts": counts, "size": size}


def copy(key: str, **other: object) -> Callable:
    """Repeat the first entry of a list, with these fields changed."""
    return lambda content, root: content[key].append(content[key][0] | other)


def fill(content: dict, root: Path) -> None:
    """Add objects to the first image, up to 101."""
    for i in range(98):
        box = [i % 14 * 4, i // 14 * 6, 5, 6]
        content["annotations"].append(content["annotations"][0] | {"id": 100 + i, "bbox": box})


def file(write: Callable[[Path], object], **fields: object) -> Callable:
    """Replace the file a.png, and set these fields of its entry."""

    def change(content: dict, root: Path) -> None:
        path = root / "images" / "a.png"
        path.unlink()
        write(path)
        content["images"][0] |= fields

    return change


def plain(mode: str = "RGB", size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    return Image.new("RGB", size, COLOUR).convert(mode)


def saved(
    image: Image.Image | np.ndarray, image_format: str = "PNG", **options: object
) -> Callable:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    return file(lambda path: image.save(path, format=image_format, **options))


def data(content: bytes) -> Callable:
    return file(lambda path: path.write_bytes(content))


def encoded(image_format: str = "PNG") -> bytes:
    """Return the bytes of an image of noise, long enough to be cut."""
    noise = np.random.default_rng(0).integers(0, 2, (HEIGHT, WIDTH, 3), dtype=np.uint8) * 255
    out = io.BytesIO()
    Image.fromarray(noise).save(out, format=image_format)
    return out.getvalue()


def cut(image_format: str) -> Callable:
    """Truncate a file."""
    whole = encoded(image_format)
    return data(whole[: len(whole) * 2 // 3])


def damaged() -> bytes:
    """Return a PNG damaged in its middle."""
    png = encoded()
    middle = len(png) // 2
    return png[:middle] + bytes(64) + png[middle + 64 :]


def huge() -> bytes:
    """Return a PNG whose header has 100,000 x 100,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + encoded()[33:]


def turned(
    orientation: int, before: tuple[int, int], image_format: str = "JPEG", **fields: object
) -> Callable:
    """Give the image an EXIF orientation, and this size before it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return file(
        lambda path: plain(size=before).save(path, format=image_format, exif=exif), **fields
    )


def one_of_each(content: dict, root: Path) -> None:
    """Make one image entry per object, as some converters do."""
    content["images"] = [
        content["images"][a["image_id"] - 1] | {"id": a["id"]} for a in content["annotations"]
    ]
    for annotation in content["annotations"]:
        annotation["image_id"] = annotation["id"]


def repeat(content: dict, root: Path) -> None:
    content["images"].append(content["images"][0] | {"id": 9})
    for j, annotation in enumerate(content["annotations"][:3]):
        content["annotations"].append(annotation | {"id": 20 + j, "image_id": 9})


def empty_image(content: dict, root: Path) -> None:
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 1]


def animation(image_format: str) -> Callable:
    second = Image.new("RGB", (WIDTH, HEIGHT), (0, 0, 255))
    options = {"save_all": True, "append_images": [second], "duration": 100}
    return saved(
        plain(), image_format, **options | ({} if image_format != "WEBP" else {"lossless": True})
    )


def line(text: str) -> Callable:
    """Replace the first label of a.png."""

    def change(content: dict, root: Path) -> None:
        path = root / "labels" / "a.txt"
        path.write_text("\n".join([text, *path.read_text().splitlines()[1:]]))

    return change


def key(name: str, value: object) -> Callable:
    """Set a key of the data.yaml; None removes it."""

    def change(content: dict, root: Path) -> None:
        path = root / "data.yaml"
        config = json.loads(path.read_text()) | {name: value}
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return change


def text(content: str) -> Callable:
    """Replace the content of the data.yaml."""
    return lambda c, root: (root / "data.yaml").write_text(content)


def key_points(shape: object, first: str = "") -> Callable:
    """Add key points of this shape to every label, and replace the first label of a.png."""

    def change(content: dict, root: Path) -> None:
        key("kpt_shape", shape)(content, root)
        for path in (root / "labels").iterdir():
            lines = [f"{x} {'0.1 0.9 2 ' * 2}" for x in path.read_text().splitlines()]
            path.write_text("\n".join(lines))
        if first:
            line(first)(content, root)

    return change


def no_labels(content: dict, root: Path) -> None:
    (root / "labels").rename(root / "annotations")


def xml(old: str, new: str) -> Callable:
    """Replace the first occurrence of a text in the xml of a.png."""

    def change(content: dict, root: Path) -> None:
        path = root / "Annotations" / "a.xml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


def split_list(content: str) -> Callable:
    """Replace the list of the split."""
    return lambda c, root: (root / "ImageSets" / "Main" / "train.txt").write_text(content)


def gone(name: str) -> Callable:
    """Remove a file or folder."""
    return lambda c, root: (root / name).rename(root.parent / "gone")


SIXTEEN_BITS = np.full((HEIGHT, WIDTH), 40_000, np.uint16)
DEEP_COLOUR = cv2.imencode(".png", np.full((HEIGHT, WIDTH, 3), 40_000, np.uint16))[1].tobytes()
FIRST = ("annotations", 0)
BOX = "annotation 1 of a.png"

# ------------------------------------------------------------------------------------------------
# The cases: a line or two each
# ------------------------------------------------------------------------------------------------

# fmt: off
STRUCTURE = [
    Case("the file is missing", lambda c, r: (r / "annotations.json").unlink(), "stops",
         "cannot read the annotations", None, "annotations.json"),
    Case("not json", lambda c, r: b"<annotation/>", "stops", "is not valid json", None,
         "annotations.json"),
    Case("json that ends early", lambda c, r: json.dumps(c).encode()[:-20], "stops",
         "is not valid json", None, "annotations.json"),
    Case("a binary file", lambda c, r: b"\xff\xfe\x00\x01", "stops", "is not valid json", None,
         "annotations.json"),
    Case("a list instead of a dict", lambda c, r: [c], "stops", "expected a dict", None,
         "annotations.json"),
    Case("no images", drop("images"), "stops", "it has no 'images'", None, "annotations.json"),
    Case("annotations by image, in a dict", put("annotations", {"a.png": []}), "stops",
         "expected 'annotations' to be a list, got a dict", None, "annotations.json"),
    Case("a number instead of an image", put("images", 1, 7), "stops",
         "expected entry 1 of 'images' to be a dict, got 7", None, "annotations.json"),
    Case("an empty list of images", put("images", []), "stops", "an empty list of 'images'", None,
         "annotations.json"),
    Case("an empty list of annotations", put("annotations", []), "stops",
         "has no annotations to train on", "nothing_annotated", "", 0),
    Case("an empty list of categories", put("categories", []), "stops",
         "an empty list of 'categories'", None, "annotations.json"),
    Case("a byte-order mark", lambda c, r: json.dumps(c).encode("utf-8-sig"), "trains",
         "without it", ""),
]
ENTRIES = [
    Case("an image without file_name", drop("images", 0, "file_name"), "stops",
         "entry 0 of 'images' has no 'file_name'", "field_missing", "entry 0"),
    Case("a category without name", drop("categories", 0, "name"), "stops",
         "entry 0 of 'categories' has no 'name'", "field_missing", "entry 0"),
    Case("an annotation without bbox", drop(*FIRST, "bbox"), "stops",
         "entry 0 of 'annotations' has no 'bbox'", "field_missing", "entry 0"),
    Case("an annotation without id", drop(*FIRST, "id"), "stops",
         "entry 0 of 'annotations' has no 'id'", "field_missing", "entry 0"),
    Case("an image's id is null", put("images", 0, "id", None), "stops",
         "ids that are not whole numbers", "id_malformed",
         "(a.png), id None is null, and ids are whole numbers"),
    Case("ids of images are text and numbers", put("images", 0, "id", "1"), "stops",
         "ids that are not whole numbers", "id_malformed",
         "(a.png), id '1' is text, and ids are whole numbers"),
    Case("an annotation's id is text", put(*FIRST, "id", "7"), "stops",
         "ids that are not whole numbers", "id_malformed",
         "annotation 7 of a.png, id '7' is text, and ids are whole numbers"),
    Case("a category's id is a decimal number", put("categories", 0, "id", 1.0), "stops",
         "ids that are not whole numbers", "id_malformed",
         "category 1.0 (cat), id 1.0 is a decimal number, and ids are whole numbers"),
    Case("a duplicate image id", copy("images", file_name="b.png"), "stops",
         "duplicate image ids", "image_id_twice"),
    Case("a duplicate annotation id", copy("annotations", image_id=2), "stops",
         "duplicate annotation ids", "annotation_id_twice", BOX),
    Case("a duplicate category id", copy("categories", name="cow"), "stops",
         "duplicate category ids", "category_id_twice", "category 1 (cat)"),
    Case("file_name has a backslash",
         lambda c, r: (put("images", 0, "file_name", "sub\\a.png")(c, r),
                       (r / "images/sub").mkdir(),
                       (r / "images/a.png").rename(r / "images/sub/a.png")), "trains",
         "with slashes, if only that file exists", ""),
    Case("file_name is null", put("images", 0, "file_name", None), "stops",
         "images whose file_name is empty or not text", "file_name_malformed", "file_name None"),
    Case("file_name is empty", put("images", 0, "file_name", " "), "stops",
         "images whose file_name is empty or not text", "file_name_malformed", "file_name ' '"),
    Case("an image's width is null", put("images", 0, "width", None), "stops",
         "width or height is not a positive whole number", "image_size_malformed"),
    Case("an image's height is 0", put("images", 0, "height", 0), "stops",
         "width or height is not a positive whole number", "image_size_malformed"),
    Case("an image's width is text", put("images", 0, "width", "64"), "stops",
         "width or height is not a positive whole number", "image_size_malformed"),
    Case("a category's name is empty", put("categories", 0, "name", ""), "stops",
         "categories whose name is empty or not text", "category_name_malformed",
         "category 1 (), name ''"),
    Case("a category's name is null", put("categories", 0, "name", None), "stops",
         "categories whose name is empty or not text", "category_name_malformed", "category 1"),
    Case("two categories of one name", put("categories", 1, "name", "cat"), "trains",
         "as two classes; logged", "category_name_twice", "category 2 (cat)"),
    Case("two names that differ by case", put("categories", 1, "name", "Cat"), "trains",
         "as two classes; logged", "category_name_similar", "category 2 (Cat), name 'Cat'"),
    Case("two names that differ by blanks", put("categories", 1, "name", "cat "), "trains",
         "as two classes; logged", "category_name_similar", "category 2 (cat ), name 'cat '"),
    Case("a category without objects", copy("categories", id=3, name="cow"), "trains",
         "with this class", "category_without_objects", "category 3 (cow)"),
    Case("two images of one file with different objects", one_of_each, "stops",
         "duplicate image files with different objects", "file_twice"),
    Case("two images of one file with the same objects", repeat, "trains", "twice as often; logged",
         "file_repeated", objects=15),
    Case("an image without annotations", empty_image, "leaves out", "", "image_dropped", objects=9),
]
ANNOTATIONS = [
    Case("an unknown image_id", put(*FIRST, "image_id", 77), "stops",
         "annotations with an unknown image_id", "image_unknown",
         "annotation 1 of image 77, image_id 77"),
    Case("image_id is text, but ids are numbers", put(*FIRST, "image_id", "1"), "stops",
         "annotations with an unknown image_id", "image_unknown",
         "annotation 1 of image 1, image_id '1' is text, and ids are whole numbers"),
    Case("an unknown category_id", put(*FIRST, "category_id", 77), "stops",
         "annotations with an unknown category_id", "category_unknown",
         f"{BOX}, category_id 77"),
    Case("category_id is a list", put(*FIRST, "category_id", [1]), "stops",
         "annotations with an unknown category_id", "category_unknown",
         f"{BOX}, category_id [1] is a list, and ids are whole numbers"),
    Case("category_id is text", put(*FIRST, "category_id", "1"), "stops",
         "annotations with an unknown category_id", "category_unknown",
         f"{BOX}, category_id '1' is text, and ids are whole numbers"),
    Case("category_id is a decimal number", put(*FIRST, "category_id", 1.0), "stops",
         "annotations with an unknown category_id", "category_unknown",
         f"{BOX}, category_id 1.0 is a decimal number, and ids are whole numbers"),
    Case("iscrowd is null", put(*FIRST, "iscrowd", None), "stops", "iscrowd is neither 0 nor 1",
         "crowd_malformed", f"{BOX}, iscrowd None"),
    Case("iscrowd is text", put(*FIRST, "iscrowd", "0"), "stops", "iscrowd is neither 0 nor 1",
         "crowd_malformed", f"{BOX}, iscrowd '0'"),
    Case("ignore is 1", put(*FIRST, "ignore", 1), "stops", "annotations with 'ignore'", "ignore",
         f"{BOX}, ignore 1"),
    Case("a segmentation that is one list of numbers",
         put(*FIRST, "segmentation", [1, 2, 9, 2, 9, 9]), "trains",
         "by its box; logged", "segmentation_unusable", BOX),
    Case("a segmentation that is text", put(*FIRST, "segmentation", "1 2"), "trains",
         "by its box; logged", "segmentation_unusable", BOX),
    Case("a segmentation of two points", put(*FIRST, "segmentation", [[1, 2, 9, 9]]), "trains",
         "by its box; logged", "segmentation_unusable", BOX),
    Case("run lengths without counts", put(*FIRST, "segmentation", {"size": [48, 64]}), "trains",
         "by its box; logged", "segmentation_unusable", BOX),
    Case("run lengths of text", put(*FIRST, "segmentation", rle(["a"])), "trains",
         "by its box; logged", "segmentation_unusable", BOX),
    Case("a negative run length", put(*FIRST, "segmentation", rle([-1, 5])), "trains",
         "by its box; logged", "segmentation_unusable", BOX),
    Case("run lengths of a size that is null", put(*FIRST, "segmentation", rle([9, 5], None)),
         "trains",
         "by its box; logged", "segmentation_unusable", BOX),
    Case("run lengths of a size of one number", put(*FIRST, "segmentation", rle([9, 5], [48])),
         "trains",
         "by its box; logged", "segmentation_unusable", BOX),
    Case("valid run lengths", put(*FIRST, "segmentation", rle([9, 5])), "trains",
         "by its box", ""),
    Case("key points with null among them", put(*FIRST, "keypoints", [1, None, 2]), "trains",
         "by its box; logged", "keypoints_unusable", BOX),
    Case("key points that are text", put(*FIRST, "keypoints", "1 2 2"), "trains",
         "by its box; logged", "keypoints_unusable", BOX),
    Case("valid key points", put(*FIRST, "keypoints", [5, 6, 2]), "trains", "by its box",
         ""),
    Case("crowds only, on one image", each("iscrowd", 1, image=1), "leaves out", "crowds (3)",
         "crowd", BOX, 9),
    Case("crowds only", each("iscrowd", 1), "stops",
         "has no annotations to train on, but crowds (12)", "nothing_to_learn", BOX),
    Case("boxes of zero width only", boxes(lambda b: [b[0], b[1], 0, b[3]]), "stops",
         "has no annotations to train on, but boxes of zero width or height (12)",
         "nothing_to_learn", BOX),
    Case("segmentations of two points only", each("segmentation", [[1, 2, 9, 9]]), "trains",
         "by its box; logged", "segmentation_unusable", BOX),
    Case("a crowd", put(*FIRST, "iscrowd", 1), "leaves out", "crowds (1)", "crowd", BOX, 11),
    Case("a box of three numbers", put(*FIRST, "bbox", [1, 2, 3]), "stops",
         "boxes that are not four numbers", "box_malformed", BOX),
    Case("an empty box", put(*FIRST, "bbox", []), "stops", "boxes that are not four numbers",
         "box_malformed", BOX),
    Case("a box that is null", put(*FIRST, "bbox", None), "stops",
         "boxes that are not four numbers", "box_malformed", BOX),
    Case("a box of text", put(*FIRST, "bbox", ["1", "2", "3", "4"]), "stops",
         "boxes that are not four numbers", "box_malformed", BOX),
    Case("a number too large for float64", put(*FIRST, "bbox", [1, 2, 3, 10**400]), "stops",
         "boxes that are not four numbers", "box_malformed", BOX),
    Case("NaN in a box", put(*FIRST, "bbox", [1, 2, float("nan"), 4]), "stops",
         "boxes with NaN or infinite coordinates", "box_not_finite", BOX),
    Case("infinity in a box", put(*FIRST, "bbox", [1, 2, float("inf"), 4]), "stops",
         "boxes with NaN or infinite coordinates", "box_not_finite", BOX),
    Case("a box of negative width", put(*FIRST, "bbox", [40, 20, -16, 20]), "stops",
         "boxes of negative width or height", "box_negative", BOX),
    Case("normalised boxes",
         boxes(lambda b: [b[0] / 64, b[1] / 48, b[2] / 64, b[3] / 48]), "stops",
         "COCO's boxes are in pixels", "box_units", BOX),
    Case("boxes [x1, y1, x2, y2]", boxes(lambda b: [20, b[1] + 5, 58, 47]), "stops",
         "boxes that all look like [x1, y1, x2, y2]", "box_corners", BOX),
    Case("a box of zero width", put(*FIRST, "bbox", [10, 10, 0, 20]), "leaves out",
         "boxes of zero width or height (1)", "box_empty", BOX, 11),
    Case("a box outside the image", put(*FIRST, "bbox", [64, 10, 20, 20]), "leaves out",
         "boxes outside their image (1)", "box_outside", BOX, 11),
    Case("a box beyond the image's border", put(*FIRST, "bbox", [50, 10, 30, 20]), "trains",
         "clipped; logged", "box_partly_outside", BOX),
    Case("one normalised box", put(*FIRST, "bbox", [0.1, 0.2, 0.5, 0.5]), "trains",
         "unchanged; logged", "box_small_units", BOX),
    Case("a duplicate object", copy("annotations", id=99), "trains",
         "but the second gets no anchor", "object_twice", "annotation 99 of a.png", 13),
    Case("101 objects on an image", fill, "trains", "with a warning of the limit of detections",
         "image_over_limit", "a.png", OBJECTS + 98),
    Case("no area", drop(*FIRST, "area"), "trains",
         "and evaluates with that of the box; logged", "area_unusable", f"{BOX}, no area"),
    Case("an area that is null", put(*FIRST, "area", None), "trains",
         "and evaluates with that of the box; logged", "area_unusable", f"{BOX}, area None"),
    Case("an area that is text", put(*FIRST, "area", "320"), "trains",
         "and evaluates with that of the box; logged", "area_unusable", BOX),
    Case("an area of 0", put(*FIRST, "area", 0), "trains",
         "and evaluates with that of the box; logged", "area_unusable", BOX),
    Case("an annotation with id 0", put(*FIRST, "id", 0), "trains", "and is evaluated", ""),
    Case("an object smaller than a pixel", put(*FIRST, "bbox", [10.2, 10.2, 0.3, 0.3]), "trains",
         "but no anchor learns it", "object_without_positive", BOX),
]
FILES = [
    Case("the file is missing", file(lambda path: None), "stops", "No such file or directory",
         "file_unreadable"),
    Case("a folder", file(lambda path: path.mkdir()), "stops", "Is a directory", "file_unreadable"),
    Case("an empty file", data(b""), "stops", "it is empty", "file_unreadable"),
    Case("text instead of an image", data(b"<html>404</html>"), "stops",
         "it is not an image, or of an unknown format", "file_unreadable"),
    Case("a header that ends early", data(encoded()[:20]), "stops", "cannot read the image",
         "file_unreadable"),
    Case("a truncated PNG", cut("PNG"), "stops", "Truncated", "file_truncated"),
    Case("a truncated JPEG", cut("JPEG"), "stops", "truncated", "file_truncated"),
    Case("a truncated WebP", cut("WEBP"), "stops", "cannot read the image",
         "file_unreadable"),
    Case("a truncated BMP", cut("BMP"), "stops", "truncated", "file_truncated"),
    Case("a truncated TIFF", cut("TIFF"), "stops", "truncated", "file_truncated"),
    Case("a PNG damaged in its middle", data(damaged()), "stops", "cannot read the image",
         "file_truncated"),
    Case("a header of 100,000 x 100,000 pixels", data(huge()), "stops", "exceeds limit",
         "file_unreadable"),
    Case("another size than in the annotations", saved(plain(size=(32, 48))), "stops",
         "is 32 x 48 pixels, but 64 x 48 according to the annotations", "image_size_wrong"),
    Case("EXIF rotates it, the annotated size is that before", turned(6, (WIDTH, HEIGHT)), "stops",
         "is 48 x 64 pixels after its EXIF orientation 6, but 64 x 48", "image_size_wrong"),
    Case("EXIF rotates it, the annotated size is that after", turned(6, (HEIGHT, WIDTH)), "trains",
         "rotated", "image_rotated", colour=COLOUR),
    Case("EXIF rotates it by 180 degrees", turned(3, (WIDTH, HEIGHT)), "trains", "rotated",
         "image_rotated", colour=COLOUR),
    Case("EXIF rotates a TIFF", turned(3, (WIDTH, HEIGHT), "TIFF"), "stops",
         "is a TIFF with EXIF orientation 3, which Detectron2 applies twice", "image_turned_twice"),
    Case("16 bits, greyscale PNG", saved(SIXTEEN_BITS), "stops", "more than 8 bits per channel",
         "image_high_depth"),
    Case("16 bits, greyscale TIFF", saved(SIXTEEN_BITS, "TIFF"), "stops",
         "more than 8 bits per channel", "image_high_depth"),
    Case("32 bits, TIFF", saved(SIXTEEN_BITS.astype(np.int32), "TIFF"), "stops",
         "more than 8 bits per channel", "image_high_depth"),
    Case("floating point, TIFF", saved(SIXTEEN_BITS.astype(np.float32), "TIFF"), "stops",
         "more than 8 bits per channel", "image_high_depth"),
    Case("16 bits, colour PNG", data(DEEP_COLOUR), "trains", "on its upper 8 bits", "",
         colour=(156, 156, 156)),
    Case("greyscale", saved(plain("L")), "trains", "as colour", "image_grey",
         colour=(135, 135, 135)),
    Case("black and white", saved(Image.new("1", (WIDTH, HEIGHT), 1)), "trains", "as colour",
         "image_grey", colour=(255, 255, 255)),
    Case("a palette", saved(plain("P")), "trains", "as colour", "image_palette"),
    Case("a palette with a transparent colour", saved(plain("P"), transparency=3), "trains",
         "without transparency", "image_alpha"),
    Case("CMYK", saved(plain("CMYK"), "JPEG", quality=95), "trains", "as colour, without profile",
         "image_cmyk", colour=COLOUR),
    Case("an alpha channel", saved(Image.new("RGBA", (WIDTH, HEIGHT), (*COLOUR, 0))), "trains",
         "on the colours, without alpha", "image_alpha", colour=COLOUR),
    Case("greyscale with alpha", saved(Image.new("LA", (WIDTH, HEIGHT), (90, 10))), "trains",
         "on the colours, without alpha", "image_alpha", colour=(90, 90, 90)),
    Case("an animated GIF", animation("GIF"), "trains", "on its first frame", "image_animated",
         colour=COLOUR),
    Case("an animated PNG", animation("PNG"), "trains", "on its first frame", "image_animated",
         colour=COLOUR),
    Case("an animated WebP", animation("WEBP"), "trains", "on its first frame", "image_animated",
         colour=COLOUR),
    Case("another format than its suffix", saved(plain(), "BMP"), "trains", "by its content", "",
         colour=COLOUR),
    Case("bytes after the end", lambda c, r: (r / "images/a.png").open("ab").write(bytes(99)),
         "trains", "without them", "", colour=COLOUR),
    Case("one pixel", file(lambda p: plain(size=(1, 1)).save(p), width=1, height=1), "trains",
         "enlarged; boxes outside are left out", "box_outside", objects=9),
    Case("one pixel wide, 5,000 long", lambda c, r: (put(*FIRST, "bbox", [0, 0, 20, 1])(c, r),
         file(lambda p: plain(size=(5000, 1)).save(p), width=5000, height=1)(c, r)), "stops",
         "too thin to be resized", "image_thin"),
]
LINE = "labels/a.txt line 1"
YAML = [
    Case("the yaml is missing", lambda c, r: (r / "data.yaml").unlink(), "stops",
         "cannot be read: No such file or directory", None, "data.yaml"),
    Case("not yaml", text("names: [cat, dog"), "stops", "line 1 is not valid yaml", None,
         "data.yaml"),
    Case("a tag that makes a Python object", text("names: !!python/name:os.system"), "stops",
         "line 1 is not valid yaml: could not determine a constructor", None, "data.yaml"),
    Case("a list instead of keys", text("[cat, dog]"), "stops", "it has no keys with values",
         None, "data.yaml"),
    Case("no names", key("names", None), "stops", "it has no 'names'", None, "data.yaml"),
    Case("names that are text", key("names", "cat dog"), "stops",
         "'names' must be a list or a dict, got a str", None, "data.yaml"),
    Case("a name that yaml reads as a boolean", text("names: [cat, no]"), "stops",
         "the name of class 1 is False: put it in quotes", None, "data.yaml"),
    Case("names as keys", key("names", {"cat": 0, "dog": 1}), "stops",
         "keys of 'names' must be numbers of classes, got 'cat'", None, "data.yaml"),
    Case("nc and names disagree", key("nc", 3), "stops", "'nc' is 3, but it has 2 names", None,
         "data.yaml"),
    Case("a missing split", key("train", None), "stops", "it has no split 'train'", None,
         "data.yaml"),
    Case("a folder that does not exist", key("train", "pictures"), "stops",
         "'pictures' of 'train' does not exist; tried", None, "data.yaml"),
    Case("a number instead of a folder", key("train", 7), "stops",
         "'train' must name folders or .txt files, got 7", None, "data.yaml"),
    Case("a file other than a .txt", key("train", "data.yaml"), "stops",
         "must name folders or .txt files, got 'data.yaml'", None, "data.yaml"),
    Case("a folder without images", key("train", "labels"), "stops",
         "no images in 'labels' of 'train'", None, "data.yaml"),
    Case("no label file at all", no_labels, "stops",
         "tried labels/a.txt and images/a.txt for images/a.png", None, "data.yaml"),
    Case("a list names an image that does not exist",
         lambda c, r: (key("train", "list.txt")(c, r),
                       (r / "list.txt").write_text("images/b.png\nimages/gone.png")), "stops",
         "missing or unreadable images (1)", "file_unreadable", "images/gone.png"),
    Case("kpt_shape is a number", key("kpt_shape", 17), "stops",
         "'kpt_shape' must be [number of key points, 2 or 3], got 17", None,
         "data.yaml"),
    Case("paths from Windows",
         lambda c, r: (text(r"{path: c:\set, train: .\list.txt, names: [cat, dog]}")(c, r),
                       (r / "list.txt").write_text("\n".join(f"images\\{x}.png" for x in "abcd"))),
         "trains", "with slashes instead of backslashes", ""),
    Case("text instead of one of YOLO's images", data(b"<html>404</html>"), "stops",
         "missing or unreadable images (1)", "file_unreadable", "images/a.png"),
]
LABELS = [
    Case("five numbers after the class", line("0 0.5 0.5 0.25 0.25 1.9"), "stops", "has 6 numbers",
         "label_malformed", LINE),
    Case("a score after the box", line("0 0.5 0.5 0.25 0.25 0.9"), "trains", "by the box; logged",
         "label_scored", LINE),
    Case("three numbers after the class", line("0 0.5 0.5 0.25"), "stops", "has 4 numbers",
         "label_malformed", LINE),
    Case("a class id only", line("1"), "stops", "has 1 number", "label_malformed", LINE),
    Case("key points that kpt_shape declares", key_points([2, 3]), "trains",
         "by the boxes before them", ""),
    Case("fewer key points than kpt_shape declares", key_points([2, 3], "0 .5 .5 .2 .2 .1 .9"),
         "stops", "has 7 numbers, expected 5 for a box or 11 for a box with key points",
         "label_malformed", LINE),
    Case("a word", line("cat 0.5 0.5 0.25 0.25"), "stops",
         "has 'cat', expected a number", "label_malformed", LINE),
    Case("a NaN", line("0 0.5 nan 0.25 0.25"), "stops", "has nan, expected a finite number",
         "label_malformed", LINE),
    Case("a class id of 0.5", line("0.5 0.5 0.5 0.25 0.25"), "stops",
         "has class 0.5, expected a whole number", "label_malformed", LINE),
    Case("a label file in UTF-16", lambda c, r: (r / "labels/a.txt").write_bytes(b"\xff\xfe0"),
         "stops", "it is not UTF-8 text", "label_malformed", "labels/a.txt"),
    Case("a class id without a name", line("2 0.5 0.5 0.25 0.25"), "stops",
         "labels with a class id that has no name (1)", "label_class_unknown", f"{LINE}, class 2"),
    Case("a negative class id", line("-1 0.5 0.5 0.25 0.25"), "stops",
         "labels with a class id that has no name (1)", "label_class_unknown", f"{LINE}, class -1"),
    Case("a label in pixels", line("0 32 24 16 12"), "stops",
         "fractions of the image, not pixels (1)", "label_units", f"{LINE}, 32 24 16 12"),
    Case("a label of negative width", line("0 0.5 0.5 -0.25 0.25"), "stops",
         "boxes of negative width or height", "box_negative", "a.txt, line 1"),
    Case("a label of zero width", line("0 0.5 0.5 0 0.25"), "leaves out",
         "boxes of zero width or height (1)", "box_empty", "a.txt, line 1", 11),
    Case("a label beyond the image's border", line("0 0.9 0.5 0.4 0.25"), "trains",
         "clipped; logged", "box_partly_outside", LINE),
    Case("a duplicate label", lambda c, r: (r / "labels/a.txt").write_text(
         "\n".join(2 * (r / "labels/a.txt").read_text().splitlines()[:1])), "trains",
         "but the second gets no anchor", "object_twice", "a.txt, line 2", 11),
    Case("an image without a label file", lambda c, r: (r / "labels/a.txt").unlink(), "leaves out",
         "images without a label file, used as images without objects (1)", "label_missing",
         "images/a.png", 9),
    Case("a label without an image", gone("images/a.png"), "stops",
         "missing or unreadable images (1): no image for labels/a.txt",
         "file_unreadable", "labels/a.txt"),
    Case("a label of two images", lambda c, r: plain().save(r / "images/a.bmp"), "stops",
         "several files for one label or line of a list", "label_ambiguous",
         "labels/a.txt: images/a.bmp or images/a.png"),
    Case("a label beside its image",
         lambda c, r: (r / "labels/a.txt").rename(r / "images/a.txt"), "trains",
         "if the folder of labels has none", ""),
    Case("two labels of an image", lambda c, r: (r / "images/a.txt").write_text(""), "stops",
         "or several labels for one file", "label_ambiguous",
         "labels/a.txt and images/a.txt: images/a.png"),
    Case("a file other than an image or a label",
         lambda c, r: (r / "labels/notes.json").write_text("{}"), "trains", "without it",
         "file_unused", "labels/notes.json"),
    Case("an empty label file", lambda c, r: (r / "labels/a.txt").write_text("\n"), "leaves out",
         "", "image_dropped", "images/a.png", 9),
]
FOLDER = [
    Case("no xml at all", gone("Annotations"), "stops", "it has no xml files", None, "data"),
    Case("a split that has no list", gone("ImageSets"), "stops", "it has no split 'train'; tried",
         None, "ImageSets/Main/train.txt"),
    Case("an empty list", split_list("\n \n"), "stops", "names no image", None, "train.txt"),
    Case("a list in UTF-16",
         lambda c, r: (r / "ImageSets/Main/train.txt").write_bytes(b"\xff\xfea"), "stops",
         "it is not UTF-8 text", None, "train.txt"),
    Case("a list of images without xml",
         lambda c, r: [gone("Annotations/d.xml")(c, r), split_list("d")(c, r)],
         "stops", "no image of 'train' has an xml", None, "images/d.png first"),
    Case("a list names a missing image", split_list("a\nb\nc\nd\nz"), "stops",
         "'z' in train.txt: no such image or xml", "file_unreadable", "'z'"),
    Case("a label without its image", gone("images/a.png"), "stops",
         "no image a.* or 'a.png' for Annotations/a.xml", "file_unreadable",
         "Annotations/a.xml"),
    Case("an image without an xml", gone("Annotations/a.xml"), "leaves out",
         "images without a label file, used as images without objects (1)", "label_missing",
         "images/a.png", 9),
    Case("an xml with two images of its stem",
         lambda c, r: [plain().save(r / "images/a.bmp"), xml("a.png", "x")(c, r)], "stops",
         "several files for one label or line of a list", "label_ambiguous",
         "Annotations/a.xml: images/a.bmp or images/a.png"),
    Case("labels in a folder of another name",
         lambda c, r: (r / "Annotations").rename(r / "marks"), "stops",
         "move images/a.png beside it, or images into JPEGImages and xml files into Annotations",
         "file_unreadable", "no image a.* or 'a.png' for marks/a.xml in its folder"),
    Case("a folder of masks", lambda c, r: [(r / "Masks").mkdir(), plain().save(r / "Masks/a.png"),
                                            gone("ImageSets")(c, r), (r / "train").mkdir(),
                                            (r / "Annotations").rename(r / "train/Annotations"),
                                            (r / "images").rename(r / "train/images"),
                                            (r / "Masks").rename(r / "train/Masks")], "trains",
         "without them", "folder_without_labels", "train/Masks (1 images)"),
    Case("an xml whose `<filename>` is another image", xml("a.png", "b.png"), "trains",
         "on the image of the same stem; logged", "label_of_another_image", "Annotations/a.xml"),
    Case("an xml whose `<filename>` does not exist", xml("a.png", "C:\\x\\a (1).png"), "trains",
         "on the image of the same stem", ""),
    Case("an xml without a size, text instead of an image",
         lambda c, r: [xml("<width>64", "<width>0")(c, r), data(b"<html>404</html>")(c, r)],
         "stops", "missing or unreadable images (1)", "file_unreadable", "images/a.png"),
    Case("an xml without a size", xml("<width>64</width>", ""), "trains", "with that of the image",
         ""),
]
XML = [
    Case("not xml", lambda c, r: (r / "Annotations/a.xml").write_text("0 0.5 0.5 0.1 0.1"),
         "stops", "invalid xml", "label_malformed", "Annotations/a.xml"),
    Case("an empty xml", lambda c, r: (r / "Annotations/a.xml").write_text(""), "stops",
         "invalid xml: no element found", "label_malformed", "Annotations/a.xml"),
    Case("an xml that ends early", xml("</annotation>", ""), "stops", "invalid xml",
         "label_malformed", "Annotations/a.xml"),
    Case("a DOCTYPE, whose entities may fill the memory",
         xml("<annotation>", "<!DOCTYPE x [<!ENTITY a 'b'>]><annotation>"), "stops",
         "DOCTYPE is not supported", "label_malformed", "Annotations/a.xml"),
    Case("an unknown encoding", xml("<annotation>", "<?xml version='1.0' encoding='x'?>"
         "<annotation>"), "stops", "unknown encoding", "label_malformed", "Annotations/a.xml"),
    Case("another root", lambda c, r: (r / "Annotations/a.xml").write_text("<html/>"), "stops",
         "expected the root 'annotation', got 'html'", "label_malformed", "Annotations/a.xml"),
    Case("an object without a name", xml("<name>cat</name>", "<name> </name>"), "stops",
         "object 1 has no name", "label_malformed", "Annotations/a.xml"),
    Case("a tag closed by another tag", xml("bndbox>", "box>"), "stops", "invalid xml",
         "label_malformed", "Annotations/a.xml"),
    Case("an object that has neither box nor polygon",
         xml(voc_object("cat", [4, 10, 16, 20]), "<object><name>cat</name></object>"), "stops",
         "object 1 (cat) has neither a bndbox nor a polygon", "label_malformed",
         "Annotations/a.xml"),
    Case("an object of two boxes", xml("<bndbox>", "<bndbox/><bndbox>"), "stops",
         "object 1 (cat) has 2 boxes", "label_malformed", "Annotations/a.xml"),
    Case("a box without xmax", xml("<xmax>20</xmax>", ""), "stops", "object 1 (cat) has no xmax",
         "label_malformed", "Annotations/a.xml"),
    Case("a word instead of a number", xml("<xmin>5", "<xmin>left"), "stops",
         "object 1 (cat) has xmin 'left', expected a number", "label_malformed",
         "Annotations/a.xml"),
    Case("an infinite number", xml("<xmax>20", "<xmax>1e999"), "stops",
         "object 1 (cat) has xmax inf, expected a finite number", "label_malformed",
         "Annotations/a.xml"),
    Case("a polygon of two points",
         xml("<bndbox><xmin>5</xmin><ymin>11</ymin><xmax>20</xmax><ymax>30</ymax></bndbox>",
             "<polygon><x1>5</x1><y1>11</y1><x2>20</x2><y2>30</y2></polygon>"), "stops",
         "object 1 (cat) has a polygon of 2 x and 2 y", "label_malformed", "Annotations/a.xml"),
    Case("a polygon of three points",
         xml("<bndbox><xmin>5</xmin><ymin>11</ymin><xmax>20</xmax><ymax>30</ymax></bndbox>",
             "<polygon><x1>5</x1><y1>11</y1><x2>9</x2><y2>15</y2><x3>20</x3><y3>30</y3></polygon>"),
         "trains", "by its extent", ""),
    Case("swapped corners", xml("<xmin>5</xmin><ymin>11</ymin><xmax>20</xmax>",
         "<xmin>20</xmin><ymin>11</ymin><xmax>5</xmax>"), "stops",
         "boxes of negative width or height", "box_negative", "annotation 1 of images/a.png"),
    Case("a box whose xmax is xmin - 1", xml("<xmax>20", "<xmax>4"), "leaves out",
         "boxes of zero width or height (1)", "box_empty", "annotation 1 of images/a.png", 11),
    Case("a box that begins at pixel 0", xml("<xmin>5", "<xmin>0"), "trains", "clipped; logged",
         "box_at_pixel_zero", "Annotations/a.xml, object 1 (cat)"),
    Case("an xml's box beyond the image's border", xml("<xmax>20", "<xmax>80"), "trains",
         "clipped; logged", "box_partly_outside", "annotation 1 of images/a.png"),
    Case("an xml's box outside the image", xml("<xmin>5</xmin><ymin>11</ymin><xmax>20</xmax>",
         "<xmin>70</xmin><ymin>11</ymin><xmax>90</xmax>"), "leaves out",
         "boxes outside their image (1)", "box_outside", "annotation 1 of images/a.png", 11),
    Case("another size than in the xml", xml("<width>64", "<width>128"), "stops",
         "is 64 x 48 pixels, but 128 x 48 according to the annotations", "image_size_wrong"),
    Case("an object marked difficult", xml("<object>", "<object><difficult>1</difficult>"),
         "trains", "ignored in evaluation; logged", "object_difficult",
         "annotation 1 of images/a.png"),
    Case("an xml without objects", lambda c, r: (r / "Annotations/a.xml").write_text(
         "<annotation><filename>a.png</filename></annotation>"), "leaves out", "", "image_dropped",
         "images/a.png", 9),
]
VOC = FOLDER + XML
LVIS = [
    Case("an image without coco_url", drop("images", 0, "coco_url"), "stops",
         "entry 0 of 'images' has no 'file_name'", "field_missing", "entry 0"),
    Case("a coco_url that is null", put("images", 0, "coco_url", None), "stops",
         "entry 0 of 'images' has no 'file_name'", "field_missing", "entry 0"),
    Case("an invalid coco_url", put("images", 0, "coco_url", "http://[half"), "stops",
         "entry 0 of 'images' has no 'file_name'", "field_missing", "entry 0"),
    Case("an empty coco_url", put("images", 0, "coco_url", ""), "stops",
         "images whose file_name is empty or not text", "file_name_malformed", "image 1"),
    Case("an image without neg_category_ids", drop("images", 0, "neg_category_ids"), "stops",
         "neg_category_ids or not_exhaustive_category_ids is not a list",
         "category_lists_malformed"),
    Case("neg_category_ids is null", put("images", 0, "neg_category_ids", None), "stops",
         "neg_category_ids or not_exhaustive_category_ids is not a list",
         "category_lists_malformed", "a.png), neg_category_ids None"),
    Case("not_exhaustive_category_ids with an unknown category",
         put("images", 0, "not_exhaustive_category_ids", [7]), "stops",
         "neg_category_ids or not_exhaustive_category_ids is not a list",
         "category_lists_malformed"),
    Case("a negative id of an image", lambda c, r: any(
         x.update({key: -1}) for entries, key in (("images", "id"), ("annotations", "image_id"))
         for x in c[entries] if x[key] == 1), "stops",
         "image ids that are not whole numbers >= 0", "lvis_id", "image -1 (images/a.png)"),
    Case("a category without frequency", drop("categories", 0, "frequency"), "stops",
         "categories whose frequency is not r, c or f", "frequency_malformed", "category 1 (cat)"),
    Case("a frequency in words", put("categories", 0, "frequency", "rare"), "stops",
         "categories whose frequency is not r, c or f", "frequency_malformed",
         "category 1 (cat), frequency 'rare'"),
]
YOLO = YAML + LABELS
# fmt: on

SECTIONS = {
    "Images": FILES,
    "Annotations: The file": STRUCTURE,
    "Annotations: Images and categories": ENTRIES,
    "Annotations: Objects": ANNOTATIONS,
    "YOLO's layout: The yaml and its images": YAML,
    "YOLO's layout: Labels": LABELS,
    "Pascal VOC's xml: The folder and its images": FOLDER,
    "Pascal VOC's xml: Labels": XML,
    "LVIS's fields": LVIS,
}
CASES = [case for cases in SECTIONS.values() for case in cases]
