"""How many classes there are, and what they are called: the data tell, or the config."""

from detectron2.config import CfgNode

from ..data.datasets import classes_of


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
            raise ValueError(f"{first} {wanted}, but data set {name} has {count} classes")
    if wanted == -1:
        raise ValueError(
            "MODEL.ATSS.NUM_CLASSES is -1 (as many as the data have), but none of the data sets "
            f"{names} is registered: register one, or set the number"
        )
    if wanted < 1:
        raise ValueError(f"MODEL.ATSS.NUM_CLASSES must be positive, or -1, not {wanted}")
    return wanted


def set_num_classes(cfg: CfgNode) -> None:
    """Fills in, in place, the number of classes, as the data sets have them."""
    cfg.MODEL.ATSS.NUM_CLASSES = resolve_num_classes(cfg)


def complete_classes(cfg: CfgNode) -> None:
    """Fills in, in place, the number of classes and their names, as the data sets have them.

    Raises:
        ValueError: as :func:`resolve_num_classes`.
    """
    set_num_classes(cfg)
    cfg.MODEL.ATSS.CLASS_NAMES = []  # not those of a run whose config this was
    cfg.MODEL.ATSS.CLASS_NAMES = class_names(cfg)


def class_names(cfg: CfgNode) -> list[str]:
    """MODEL.ATSS.CLASS_NAMES, or else those of the first data set that is registered; or none."""
    data_sets = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    known = list(cfg.MODEL.ATSS.CLASS_NAMES)
    return known or list(next(filter(None, map(classes_of, data_sets)), []))
