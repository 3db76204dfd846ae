"""Tiles of large images, from a config and training data."""

from detectron2.config import CfgNode
from torch import nn

from atss_runner.tiles import GREATEST_OVERLAP, LEAST_SIZE, OVERLAPS, Tiles, tile_size

from ..data.datasets import mean_area
from ..data.mapper import build_test_resize
from ..errors import UserError, check_choice, check_range
from ..modeling.tiles import ATSSWithTiles
from .derive import is_two_stage


def complete_tiles(cfg: CfgNode) -> None:
    """Set TEST.TILES.SIZE_OF_DATA, in place, by the objects of the training sets of --register."""
    cfg.TEST.TILES.SIZE_OF_DATA = tile_size(mean_area(cfg.DATASETS.TRAIN))


def build_tiles(cfg: CfgNode, need_size: bool = True) -> Tiles:
    """Build the layout of tiles.

    Args:
        need_size: whether a size of 0, which neither config nor training data give, is an error.

    Raises:
        UserError: for a value out of range.
    """
    node = cfg.TEST.TILES
    if not (size := node.SIZE or node.SIZE_OF_DATA) and need_size:
        raise UserError(
            "TEST.TILES.SIZE is 0, the size for the training data, but TEST.TILES.SIZE_OF_DATA is "
            "not set, as in configs of the zoo and of trainings by older versions: set "
            "TEST.TILES.SIZE, in pixels; tools/check_dataset.py prints a size for a data set"
        )
    if size:
        check_range("TEST.TILES.SIZE", size, LEAST_SIZE)
    check_range("TEST.TILES.OVERLAP", node.OVERLAP, 0, GREATEST_OVERLAP)
    check_range("TEST.TILES.BATCH", node.BATCH, 1)
    check_choice("TEST.TILES.MERGE", node.MERGE, OVERLAPS)
    suppression = cfg.MODEL.ATSS.NMS_THRESH_TEST, cfg.MODEL.ATSS.CLASS_AGNOSTIC_NMS
    if is_two_stage(cfg):  # where these keys are of no detections
        suppression = cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST, False
    return Tiles(size, node.OVERLAP, node.WHOLE, node.MERGE, *suppression)


def build_tiled(cfg: CfgNode, model: nn.Module) -> ATSSWithTiles:
    return ATSSWithTiles(
        model,
        build_tiles(cfg),
        resize=build_test_resize(cfg),
        limit=cfg.TEST.DETECTIONS_PER_IMAGE,
        batch=cfg.TEST.TILES.BATCH,
    )
