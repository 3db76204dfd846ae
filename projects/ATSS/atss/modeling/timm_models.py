"""Architectures that timm builds but has no name for, in its registry."""

from functools import cache
from typing import Any

from torch import nn

# Read by timm. OTX's weights are of RGB from 0 to 1.
default_cfgs = {"mobilenetv2_w1": {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}}
# Blocks of each stage, as timm writes them. pytorchcv's MobileNetV2 has an expansion of 32 to 32
# channels in its first block, timm's mobilenetv2_100 has none.
STAGES = {
    "mobilenetv2_w1": (
        *("ir_r1_k3_s1_e1_c16", "ir_r2_k3_s2_e6_c24", "ir_r3_k3_s2_e6_c32"),
        *("ir_r4_k3_s2_e6_c64", "ir_r3_k3_s1_e6_c96", "ir_r3_k3_s2_e6_c160"),
        "ir_r1_k3_s1_e6_c320",
    )
}


@cache
def register_models() -> None:
    """Add STAGES to the models of timm, as MobileNetV2 with other blocks."""
    from timm.models import register_model
    from timm.models.efficientnet import _create_effnet, decode_arch_def

    def add(name: str, stages: tuple[str, ...]) -> None:
        def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
            blocks = decode_arch_def([[stage] for stage in stages])
            options = {"block_args": blocks, "num_features": 1280, "stem_size": 32}
            return _create_effnet(name, pretrained, act_layer=nn.ReLU6, **options, **kwargs)

        build.__name__ = name
        register_model(build)

    for name, stages in STAGES.items():
        add(name, stages)
