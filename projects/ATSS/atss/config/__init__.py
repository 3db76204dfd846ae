"""From config files to parts: the keys, reading them, building."""

from .build import (
    Sampling,
    autocast_dtype,
    build_assigner,
    build_box_coder,
    build_box_loss,
    build_sampling,
    candidates_per_object,
    check_model,
    images_per_test_batch,
    one_image_at_a_time,
    with_rule,
)
from .classes import class_names, complete, resolve_num_classes
from .keys import add_atss_config
from .read import config_names, get_config, get_config_file, load_config
from .tta import build_tta

__all__ = [
    "Sampling",
    "add_atss_config",
    "autocast_dtype",
    "build_assigner",
    "build_box_coder",
    "build_box_loss",
    "build_sampling",
    "build_tta",
    "candidates_per_object",
    "check_model",
    "class_names",
    "complete",
    "config_names",
    "get_config",
    "get_config_file",
    "images_per_test_batch",
    "load_config",
    "one_image_at_a_time",
    "resolve_num_classes",
    "with_rule",
]
