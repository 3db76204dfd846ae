"""Config keys, config files, derived values, and building from configs."""

from .backbones import (
    begins_pretrained,
    build_atss_resnet_fpn_backbone,
    build_timm_fpn_backbone,
)
from .branches import build_branches, build_criterion, for_inference, prune
from .build import (
    ATSSDetector,
    GridAnchorGenerator,
    build_assigner,
    build_box_coder,
    build_postprocess,
    build_tta,
    check_model,
)
from .derive import (
    class_ids,
    class_names,
    complete_classes,
    complete_schedule,
    enter_schedule,
    follow_classes,
    input_size,
    resolve_num_classes,
    set_num_classes,
    uses_atss,
)
from .execution import (
    autocast_dtype,
    images_per_test_batch,
    one_image_at_a_time,
    use_available_device,
)
from .files import (
    RECIPE,
    config_names,
    find_config,
    get_config,
    get_config_file,
    load_config,
    merge_options,
)
from .keys import add_atss_config
from .proposals import ATSSProposals
from .sampling import (
    Sampling,
    build_sampling,
    candidates_per_object,
    rule_arguments,
    with_rule,
)
from .tiles import build_tiled, build_tiles, complete_tiles

__all__ = [
    "RECIPE",
    "ATSSDetector",
    "ATSSProposals",
    "GridAnchorGenerator",
    "Sampling",
    "add_atss_config",
    "autocast_dtype",
    "begins_pretrained",
    "build_assigner",
    "build_atss_resnet_fpn_backbone",
    "build_box_coder",
    "build_branches",
    "build_criterion",
    "build_postprocess",
    "build_sampling",
    "build_tiled",
    "build_tiles",
    "build_timm_fpn_backbone",
    "build_tta",
    "candidates_per_object",
    "check_model",
    "class_ids",
    "class_names",
    "complete_classes",
    "complete_schedule",
    "complete_tiles",
    "config_names",
    "enter_schedule",
    "find_config",
    "follow_classes",
    "for_inference",
    "get_config",
    "get_config_file",
    "images_per_test_batch",
    "input_size",
    "load_config",
    "merge_options",
    "one_image_at_a_time",
    "prune",
    "resolve_num_classes",
    "rule_arguments",
    "set_num_classes",
    "use_available_device",
    "uses_atss",
    "with_rule",
]
