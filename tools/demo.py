#!/usr/bin/env python3
"""Draws detections on images, folders of images or videos, and writes them as json.

    tools/demo.py --config-file output/cells/config.yaml --weights output/cells/model_final.pth \\
        --input new_images photo.jpg film.mp4 --output output/pictures
"""

import argparse
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from detectron2.structures import BoxMode, Instances
from detectron2.utils.visualizer import Visualizer
from tqdm import tqdm

from atss.config_file import load_config
from atss.data.datasets import classes_of
from atss.engine import SafeCheckpointer

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm"}


class Detector:
    """Several images at a time through a trained model.

    Args:
        config_file: as train_net.py left it in the output folder, or any config.
        weights: a checkpoint.
        opts: KEY VALUE pairs.
    """

    def __init__(self, config_file: str, weights: str, opts: list[str]):
        cfg = load_config(config_file, opts=opts)
        if not torch.cuda.is_available():
            cfg.MODEL.DEVICE = "cpu"
        names = cfg.MODEL.ATSS.CLASS_NAMES
        for data_set in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
            names = names or classes_of(data_set) or []
        self.metadata = Metadata(thing_classes=list(names)) if names else Metadata()
        self.model = build_model(cfg).eval()
        SafeCheckpointer(self.model).load(weights)
        short = cfg.INPUT.MIN_SIZE_TEST
        self.resize = T.ResizeShortestEdge([short, short], cfg.INPUT.MAX_SIZE_TEST)
        self.input_format = cfg.INPUT.FORMAT

    @torch.no_grad()
    def __call__(self, images: list[np.ndarray]) -> list[Instances]:
        """(H, W, 3) BGR images of any sizes -> detections on the CPU, in each image's pixels."""
        inputs = []
        for image in images:
            height, width = image.shape[:2]
            if self.input_format == "RGB":
                image = image[:, :, ::-1]
            image = self.resize.get_transform(image).apply_image(image)
            tensor = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
            inputs.append({"image": tensor, "height": height, "width": width})
        return [x["instances"].to("cpu") for x in self.model(inputs)]

    def draw(self, image: np.ndarray, instances: Instances) -> np.ndarray:
        """The BGR image with boxes, class names and scores on it."""
        visualizer = Visualizer(image[:, :, ::-1], self.metadata)
        return visualizer.draw_instance_predictions(instances).get_image()[:, :, ::-1]


def find_inputs(names: list[str]) -> list[Path]:
    """The images and videos that are named, or lie in the folders that are named.

    Raises:
        ValueError: naming what does not exist, or is neither.
    """
    found = []
    for path in map(Path, names):
        if path.is_dir():
            inside = [p for p in sorted(path.iterdir()) if p.suffix.lower() in IMAGES | VIDEOS]
            if not inside:
                raise ValueError(f"the folder {path} holds no image and no video")
            found += inside
        elif not path.is_file():
            raise ValueError(f"the input {path} does not exist")
        elif path.suffix.lower() not in IMAGES | VIDEOS:
            raise ValueError(f"the input {path} is neither an image nor a video by its ending")
        else:
            found.append(path)
    return found


def batches(items: Iterator, size: int) -> Iterator[list]:
    """Lists of up to ``size`` items."""
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def as_records(instances: Instances, threshold: float, **where: object) -> list[dict]:
    """Detections above the threshold in COCO's form; category_id counts the classes from 1."""
    boxes = BoxMode.convert(instances.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    columns = (boxes.tolist(), instances.scores.tolist(), instances.pred_classes.tolist())
    return [
        {**where, "category_id": k + 1, "bbox": [round(v, 2) for v in box], "score": round(s, 4)}
        for box, s, k in zip(*columns, strict=True)
        if s >= threshold
    ]


def run_images(detector: Detector, paths: list[Path], args: argparse.Namespace) -> list[dict]:
    """Pictures into the output folder; returns the records."""

    def readable() -> Iterator[tuple[Path, np.ndarray]]:
        for path in paths:
            try:
                yield path, read_image(str(path), format="BGR")
            except OSError as error:
                print(f"skipped {path}: {error}", file=sys.stderr)

    records, stems = [], Counter()
    with tqdm(total=len(paths), unit="image") as progress:
        for batch in batches(readable(), args.batch):
            for (path, image), found in zip(batch, detector([i for _, i in batch]), strict=True):
                shown = found[found.scores >= args.score_threshold]
                # Two folders may hold images of one name.
                number = f"_{stems[path.stem]}" if stems[path.stem] else ""
                stems[path.stem] += 1
                target = args.output / f"{path.stem}{number}.png"
                cv2.imwrite(str(target), detector.draw(image, shown))
                records += as_records(found, args.score_threshold, file_name=str(path))
            progress.update(len(batch))
    return records


def run_video(detector: Detector, path: Path, args: argparse.Namespace) -> list[dict]:
    """A video with detections into the output folder; returns the records, by frame."""
    source = cv2.VideoCapture(str(path))
    width = int(source.get(cv2.CAP_PROP_FRAME_WIDTH))
    height = int(source.get(cv2.CAP_PROP_FRAME_HEIGHT))
    rate = source.get(cv2.CAP_PROP_FPS) or 25.0
    target = cv2.VideoWriter(
        str(args.output / f"{path.stem}.mp4"),
        cv2.VideoWriter_fourcc(*"mp4v"),
        rate,
        (width, height),
    )

    def frames() -> Iterator[np.ndarray]:
        while True:
            ok, frame = source.read()
            if not ok:
                return
            yield frame

    records, number = [], 0
    total = int(source.get(cv2.CAP_PROP_FRAME_COUNT)) or None
    with tqdm(total=total, unit="frame", desc=path.name) as progress:
        for batch in batches(frames(), args.batch):
            for frame, found in zip(batch, detector(batch), strict=True):
                shown = found[found.scores >= args.score_threshold]
                target.write(np.ascontiguousarray(detector.draw(frame, shown)))
                where = {"file_name": str(path), "frame": number}
                records += as_records(found, args.score_threshold, **where)
                number += 1
            progress.update(len(batch))
    source.release()
    target.release()
    if number == 0:
        print(f"skipped {path}: no frame could be read", file=sys.stderr)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--input", nargs="+", required=True, help="images, folders or videos")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--score-threshold", type=float, default=0.4, help="what is shown from")
    parser.add_argument("--batch", type=int, default=4, help="images at a time")
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="config changes")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    try:
        paths = find_inputs(args.input)
        detector = Detector(args.config_file, args.weights, args.opts)
    except (ValueError, KeyError, AssertionError, OSError) as error:
        sys.exit(f"error: {error}")
    args.output.mkdir(parents=True, exist_ok=True)
    images = [path for path in paths if path.suffix.lower() in IMAGES]
    records = run_images(detector, images, args) if images else []
    for path in paths:
        if path.suffix.lower() in VIDEOS:
            records += run_video(detector, path, args)
    (args.output / "detections.json").write_text(json.dumps(records))
    print(f"{len(records)} detections: pictures and detections.json are in {args.output}")


if __name__ == "__main__":
    main()
