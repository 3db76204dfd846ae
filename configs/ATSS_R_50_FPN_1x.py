"""ATSS_R_50_FPN_1x.yaml as a LazyConfig, for Detectron2's tools/lazyconfig_train_net.py."""

from pathlib import Path

import detectron2
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler
from torch.optim import SGD

from atss import ATSSDetector, GridAnchorGenerator
from atss.assigners import ATSS
from atss.modeling import ATSSHead, BoxDeltas, Criterion, PostProcessor, build_fpn

# Not by detectron2.model_zoo: it imports pkg_resources, which setuptools 82 removed.
COMMON = Path(detectron2.__file__).parent / "model_zoo" / "configs" / "common"

dataloader = LazyConfig.load(str(COMMON / "data" / "coco.py")).dataloader
dataloader.train.mapper.augmentations[0].short_edge_length = (800,)
dataloader.train.mapper.use_instance_mask = False

train = LazyConfig.load(str(COMMON / "train.py")).train
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.max_iter = 90000

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], milestones=[60000, 80000, 90000]),
    warmup_factor=1 / 3,
    warmup_length=500 / 90000,
    warmup_method="constant",
)

optimizer = L(SGD)(
    params=L(get_default_optimizer_params)(
        base_lr="${..lr}", bias_lr_factor=2.0, weight_decay_norm=1e-4, weight_decay_bias=0.0
    ),
    lr=0.01,
    momentum=0.9,
    weight_decay=1e-4,
)

model = L(ATSSDetector)(
    backbone=L(build_fpn)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
            stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=True, norm="FrozenBN"),
            out_features=["res3", "res4", "res5"],
            freeze_at=2,
        ),
        in_features=["res3", "res4", "res5"],
    ),
    head=L(ATSSHead)(in_channels=256, num_levels=5, num_classes="${..num_classes}"),
    anchor_generator=L(GridAnchorGenerator)(strides=[8, 16, 32, 64, 128]),
    assigner=L(ATSS)(top_k=9),
    box_coder=L(BoxDeltas)(),
    criterion=L(Criterion)(),
    postprocess=L(PostProcessor)(),
    num_classes=80,
    pixel_mean=[102.9801, 115.9465, 122.7717],
    pixel_std=[1.0, 1.0, 1.0],
)
