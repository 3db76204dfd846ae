"""How many classes there are, and what they are called: the data tell, or the config."""

from detectron2.config import CfgNode

from ..data.datasets import classes_of, follow, ids_of, without_classes
from ..errors import UserError


def resolve_num_classes(cfg: CfgNode) -> int:
    """The number of classes: MODEL.ATSS.NUM_CLASSES, or that of the data sets where it is -1.

    Raises:
        ValueError: where config and data contradict each other, or nothing tells the number.
    """
    wanted = cfg.MODEL.ATSS.NUM_CLASSES
    names = list(dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)))
    known = {name: len(c) for name in names if (c := classes_of(name)) is not None}
    for name, count in known.items():
        if wanted == -1:
            wanted = count
        elif wanted != count:
            first = "MODEL.ATSS.NUM_CLASSES is"
            if cfg.MODEL.ATSS.NUM_CLASSES == -1:
                first = f"data set {next(iter(known))} has"
            sets = ""
            if cfg.DATASETS.TRAIN != cfg.DATASETS.TEST:  # one of them may be the config's own
                sets = f" (DATASETS.TRAIN is {cfg.DATASETS.TRAIN}, TEST is {cfg.DATASETS.TEST})"
            raise UserError(f"{first} {wanted}, but data set {name} has {count} classes{sets}")
    if wanted == -1 and (nameless := without_classes(names)):
        raise UserError(
            f"data set {nameless[0]} has no thing_classes in its metadata, whose number "
            "MODEL.ATSS.NUM_CLASSES -1 asks for: name them, or set the number"
        )
    if wanted == -1:
        raise UserError(
            "MODEL.ATSS.NUM_CLASSES is -1 (as many as the data have), but none of the data sets "
            f"{names} is registered: register one, or set the number"
        )
    if wanted < 1:
        raise UserError(f"MODEL.ATSS.NUM_CLASSES must be positive, or -1, not {wanted}")
    return wanted


def set_num_classes(cfg: CfgNode) -> None:
    """Fills in, in place, the number of classes, as the data sets have them."""
    cfg.MODEL.ATSS.NUM_CLASSES = resolve_num_classes(cfg)


def complete_classes(cfg: CfgNode, training: bool = True) -> None:
    """Fills in, in place, the number of classes and their names: those of the data sets, or, where
    nothing is trained, those that the config of a run names. All data sets follow their order.

    Raises:
        ValueError: as :func:`resolve_num_classes`, or where data sets have different classes.
    """
    set_num_classes(cfg)
    of_run = list(cfg.MODEL.ATSS.CLASS_NAMES)
    cfg.MODEL.ATSS.CLASS_NAMES = []
    names = class_names(cfg)
    cfg.MODEL.ATSS.CLASS_NAMES = names if training or not of_run else of_run
    follow_classes(cfg)
    cfg.MODEL.ATSS.CLASS_IDS = []
    cfg.MODEL.ATSS.CLASS_IDS = class_ids(cfg)


def follow_classes(cfg: CfgNode) -> None:
    """Has the data sets of the config number their classes as MODEL.ATSS.CLASS_NAMES does; in each
    process, once data sets are registered.

    Raises:
        ValueError: where one has other classes.
    """
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        follow(name, cfg.MODEL.ATSS.CLASS_NAMES)


def class_ids(cfg: CfgNode) -> list[int]:
    """MODEL.ATSS.CLASS_IDS, or else those of the first data set that is registered; or none."""
    known = list(cfg.MODEL.ATSS.CLASS_IDS)
    data_sets = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    return known or next(filter(None, map(ids_of, data_sets)), [])


def class_names(cfg: CfgNode) -> list[str]:
    """MODEL.ATSS.CLASS_NAMES, or else those of the first data set that is registered; or none."""
    data_sets = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    known = list(cfg.MODEL.ATSS.CLASS_NAMES)
    return known or list(next(filter(None, map(classes_of, data_sets)), []))
