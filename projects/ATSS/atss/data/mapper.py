"""Detectron2's mapper, with errors that name the file."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

from atss_runner.planes import FORMAT, Planes, resize_planes

from ..errors import UserError
from .crops import FullSizeCrop, share_inside
from .images import blame_file, blame_unreadable, pixel_format, read_image

RESIZES = (T.Resize, T.ResizeShortestEdge, T.ResizeScale)


class Mapper(DatasetMapper):
    """Detectron2's DatasetMapper, which opens a file once and names it in errors.

    It refuses boxes that are not finite, which Detectron2 drops, and images of 16 bits, which would
    turn white. Boxes without area or outside the image are dropped.

    Raises:
        UserError: if labels or pixels cannot be used.
        OSError: if the file cannot be read.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        arguments = super().from_config(cfg, is_train)
        if is_train and cfg.INPUT.SCALE_JITTER:
            side = cfg.INPUT.SCALE_JITTER_SIZE
            arguments["augmentations"] = [
                T.ResizeScale(*cfg.INPUT.SCALE_JITTER, side, side),
                T.FixedSizeCrop((side, side)),
                *(x for x in arguments["augmentations"] if not isinstance(x, T.ResizeShortestEdge)),
            ]
        arguments["augmentations"] = [stretched(x, cfg) for x in arguments["augmentations"]]
        if is_train and (share := cfg.INPUT.FULL_SIZE_CROP):
            arguments["augmentations"] = [
                FullSizeCrop(x, share, cfg.INPUT.FULL_SIZE_CROP_MIN_AREA)
                if isinstance(x, RESIZES)
                else x
                for x in arguments["augmentations"]
            ]
        jitter = cfg.INPUT.COLOR_JITTER
        if is_train and jitter:
            low_high = (1 - jitter, 1 + jitter)
            colours = (T.RandomBrightness, T.RandomContrast, T.RandomSaturation)
            arguments["augmentations"] += [colour(*low_high) for colour in colours]
        arguments["image_format"] = pixel_format(cfg)
        if isinstance(arguments["image_format"], Planes):
            arguments["augmentations"] = [
                _by_planes(x)
                for x in arguments["augmentations"]
                if not isinstance(x, T.RandomSaturation)
            ]
        return arguments

    def __call__(self, dataset_dict: dict) -> dict:
        name = dataset_dict["file_name"]
        for annotation in dataset_dict.get("annotations", ()):
            if not np.isfinite(annotation["bbox"]).all():
                raise UserError(f"{name} has a box that is not finite: {annotation['bbox']}")
        mapped = copy.deepcopy(dataset_dict)
        if self.use_instance_mask:  # Detectron2 fails on objects without a mask
            objects = mapped.get("annotations", ())
            mapped["annotations"] = [x for x in objects if "segmentation" in x]
        labelled = None
        if "width" in mapped and "height" in mapped:
            labelled = mapped["width"], mapped["height"]
        image = read_image(name, self._resizes(), labelled, self.image_format)
        sem_seg = None
        if sem_seg_file := mapped.pop("sem_seg_file_name", None):
            with blame_unreadable(sem_seg_file):
                sem_seg = utils.read_image(sem_seg_file, "L").squeeze(2)
        with blame_file(name):
            self._map(mapped, image, sem_seg)
        mapped["image"] = single(mapped["image"])
        return mapped

    def _resizes(self) -> list[tuple[int, int]]:
        """Return (shorter side, longest side) of possible resizing."""
        augmentations = map(_resize_of, self.augmentations.augs)
        resizes = [x for x in augmentations if isinstance(x, T.ResizeShortestEdge)]
        return [(side, x.max_size) for x in resizes for side in x.short_edge_length]

    def _map(self, mapped: dict, image: np.ndarray, sem_seg: np.ndarray | None) -> None:
        """Augment image (H, W, C), classes of pixels (H, W), and annotations."""
        utils.check_image_size(mapped, image)
        crops = [x for x in self.augmentations.augs if isinstance(x, FullSizeCrop)]
        boxes = None
        if crops:
            objects = [x for x in mapped.get("annotations", ()) if not x.get("iscrowd", 0)]
            height, width = image.shape[:2]
            boxes = _boxes(objects).clip(0, (width, height, width, height))
        augmented = T.AugInput(image, boxes=boxes, sem_seg=sem_seg)
        transforms = self.augmentations(augmented)
        size = augmented.image.shape[:2]
        for crop in crops:
            shares = share_inside(augmented.boxes, (0, 0, size[1], size[0]))
            kept = shares >= crop.min_area
            mapped["annotations"] = [x for x, stays in zip(objects, kept, strict=True) if stays]
        mapped["image"] = torch.as_tensor(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
        if sem_seg is not None:
            mapped["sem_seg"] = torch.as_tensor(augmented.sem_seg.astype("long"))
        if self.proposal_topk is not None:
            utils.transform_proposals(mapped, size, transforms, proposal_topk=self.proposal_topk)
        if not self.is_train:
            mapped.pop("annotations", None)
        elif "annotations" in mapped:
            self._transform_annotations(mapped, transforms, size)


def _boxes(annotations: Sequence[dict]) -> np.ndarray:
    """Return the (M, 4) corners of the boxes of Detectron2's annotations."""
    boxes = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in annotations]
    return np.array(boxes, dtype=float).reshape(-1, 4)


def _resize_of(augmentation: T.Augmentation) -> T.Augmentation:
    """Return the resizing that others wrap."""
    while hasattr(augmentation, "resize"):
        augmentation = augmentation.resize
    return augmentation


class ByPlanes(T.Augmentation):
    """Resizing of each plane by Pillow, as Detectron2 resizes RGB images."""

    def __init__(self, resize: T.Augmentation):
        super().__init__()
        self.resize = resize

    def get_transform(self, image: np.ndarray) -> T.Transform:
        resize = self.resize.get_transform(image)
        if isinstance(resize, T.ResizeTransform):
            return ResizePlanes(resize.h, resize.w, resize.new_h, resize.new_w)
        return resize


class ResizePlanes(T.ResizeTransform):
    """Resizing of images with any number of planes."""

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        return resize_planes(img, self.new_h, self.new_w)


def _by_planes(augmentation: T.Augmentation) -> T.Augmentation:
    if isinstance(augmentation, FullSizeCrop):
        augmentation.resize = ByPlanes(augmentation.resize)
    return ByPlanes(augmentation) if isinstance(augmentation, RESIZES) else augmentation


def build_test_resize(cfg: CfgNode) -> T.Augmentation:
    """Build the resizing of images for detection."""
    short, longest = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    resize = stretched(T.ResizeShortestEdge([short, short], longest), cfg)
    return ByPlanes(resize) if cfg.INPUT.FORMAT == FORMAT else resize


def single(image: torch.Tensor) -> torch.Tensor:
    """Convert float64 images, which Detectron2 makes of YUV, to float32."""
    return image.float() if image.dtype == torch.float64 else image


def stretched(augmentation: Any, cfg: CfgNode) -> Any:
    """Return a resizing to (shorter side, longest side) as one to (height, width) if INPUT.RESIZE
    is "stretch", another augmentation as it is."""
    if cfg.INPUT.RESIZE != "stretch" or not isinstance(augmentation, T.ResizeShortestEdge):
        return augmentation
    return T.Resize((augmentation.short_edge_length[0], augmentation.max_size))


def without_augmentation(cfg: CfgNode) -> CfgNode:
    plain = cfg.clone()
    plain.defrost()
    plain.INPUT.CROP.ENABLED = False
    plain.INPUT.SCALE_JITTER = []
    plain.INPUT.COLOR_JITTER = 0.0
    return plain
