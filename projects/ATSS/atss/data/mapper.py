"""Detectron2's mapper, with errors that name the file."""

import copy

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T

from atss_runner.planes import Planes, resize_planes

from ..errors import UserError
from .images import blame_file, blame_unreadable, pixel_format, read_image

RESIZES = (T.ResizeShortestEdge, T.ResizeScale)


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
        jitter = cfg.INPUT.COLOR_JITTER
        if is_train and jitter:
            low_high = (1 - jitter, 1 + jitter)
            colours = (T.RandomBrightness, T.RandomContrast, T.RandomSaturation)
            arguments["augmentations"] += [colour(*low_high) for colour in colours]
        arguments["image_format"] = pixel_format(cfg)
        if isinstance(arguments["image_format"], Planes):
            arguments["augmentations"] = [
                ByPlanes(x) if isinstance(x, RESIZES) else x
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
        augmentations = [getattr(x, "inner", x) for x in self.augmentations.augs]
        resizes = [x for x in augmentations if isinstance(x, T.ResizeShortestEdge)]
        return [(side, x.max_size) for x in resizes for side in x.short_edge_length]

    def _map(self, mapped: dict, image: np.ndarray, sem_seg: np.ndarray | None) -> None:
        """Augment image (H, W, C), classes of pixels (H, W), and annotations."""
        utils.check_image_size(mapped, image)
        augmented = T.AugInput(image, sem_seg=sem_seg)
        transforms = self.augmentations(augmented)
        size = augmented.image.shape[:2]
        mapped["image"] = torch.as_tensor(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
        if sem_seg is not None:
            mapped["sem_seg"] = torch.as_tensor(augmented.sem_seg.astype("long"))
        if self.proposal_topk is not None:
            utils.transform_proposals(mapped, size, transforms, proposal_topk=self.proposal_topk)
        if not self.is_train:
            mapped.pop("annotations", None)
        elif "annotations" in mapped:
            self._transform_annotations(mapped, transforms, size)


class ByPlanes(T.Augmentation):
    """Resizing of each plane by Pillow, as Detectron2 resizes RGB images."""

    def __init__(self, inner: T.Augmentation):
        super().__init__()
        self.inner = inner

    def get_transform(self, image: np.ndarray) -> T.Transform:
        resize = self.inner.get_transform(image)
        if isinstance(resize, T.ResizeTransform):
            return ResizePlanes(resize.h, resize.w, resize.new_h, resize.new_w)
        return resize


class ResizePlanes(T.ResizeTransform):
    """Resizing of images with any number of planes."""

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        return resize_planes(img, self.new_h, self.new_w)


def single(image: torch.Tensor) -> torch.Tensor:
    """Convert float64 images, which Detectron2 makes of YUV, to float32."""
    return image.float() if image.dtype == torch.float64 else image


def without_augmentation(cfg: CfgNode) -> CfgNode:
    plain = cfg.clone()
    plain.defrost()
    plain.INPUT.CROP.ENABLED = False
    plain.INPUT.SCALE_JITTER = []
    plain.INPUT.COLOR_JITTER = 0.0
    return plain
