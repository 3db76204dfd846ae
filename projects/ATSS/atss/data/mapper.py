"""Loads one image with its objects; what is wrong with them is said here, with the file's name."""

import copy

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T

from ..errors import UserError
from .images import blame_file, read_image


class Mapper(DatasetMapper):
    """Detectron2's mapper, which names the file that it cannot use, and why.

    It refuses what would be silently wrong: boxes that are not finite, which Detectron2 drops, and
    images of 16 bits, which become white. Boxes without area or outside the image are dropped.

    Raises:
        ValueError, OSError: with a sentence that names the file.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        """As there, and INPUT.SCALE_JITTER and COLOR_JITTER."""
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
        return arguments

    def __call__(self, dataset_dict: dict) -> dict:
        """Detectron2's, which opens an image once."""
        name = dataset_dict["file_name"]
        for annotation in dataset_dict.get("annotations", ()):
            if not np.isfinite(annotation["bbox"]).all():
                raise UserError(f"{name} has a box that is not finite: {annotation['bbox']}")
        mapped = copy.deepcopy(dataset_dict)
        if self.use_instance_mask:  # it cannot learn an object without a mask
            objects = mapped.get("annotations", ())
            mapped["annotations"] = [x for x in objects if "segmentation" in x]
        labelled = None
        if "width" in mapped and "height" in mapped:
            labelled = mapped["width"], mapped["height"]
        image = read_image(name, labelled=labelled, image_format=self.image_format)
        with blame_file(name):
            self._map(mapped, image)
        mapped["image"] = single(mapped["image"])
        return mapped

    def _map(self, mapped: dict, image: np.ndarray) -> None:
        """Augment an image, of (H, W, C), and what belongs to it, in place."""
        utils.check_image_size(mapped, image)
        of_pixels = mapped.pop("sem_seg_file_name", None)
        classes = utils.read_image(of_pixels, "L").squeeze(2) if of_pixels else None
        augmented = T.AugInput(image, sem_seg=classes)
        transforms = self.augmentations(augmented)
        size = augmented.image.shape[:2]
        mapped["image"] = torch.as_tensor(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
        if of_pixels:
            mapped["sem_seg"] = torch.as_tensor(augmented.sem_seg.astype("long"))
        if self.proposal_topk is not None:
            utils.transform_proposals(mapped, size, transforms, proposal_topk=self.proposal_topk)
        if not self.is_train:
            mapped.pop("annotations", None)
        elif "annotations" in mapped:
            self._transform_annotations(mapped, transforms, size)


def single(image: torch.Tensor) -> torch.Tensor:
    """What Detectron2 reads as float64, as YUV, in float32, in which models are."""
    return image.float() if image.dtype == torch.float64 else image


def without_augmentation(cfg: CfgNode) -> CfgNode:
    """The config of the end of a training: crops and colours are off, sizes and flips stay."""
    plain = cfg.clone()
    plain.defrost()
    plain.INPUT.CROP.ENABLED = False
    plain.INPUT.SCALE_JITTER = []
    plain.INPUT.COLOR_JITTER = 0.0
    return plain
