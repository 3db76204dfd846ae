"""ATSS's head: two convolution towers, three predictors, one learned scale per level."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from detectron2.layers import get_norm
from torch import Tensor, nn

from ..deprecated import renamed_names
from ..errors import UserError, WrongValue, check_choice, check_range
from ..structures import HeadOutput
from .box_coding import BoxCode
from .deform_conv import DeformConv, DeformConvLayer
from .level_copies import PerLevel, for_levels, replace

__getattr__ = renamed_names(__name__)

# Norms by Detectron2's names, "" for none.
NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N", "LN")
# Norms with statistics over a batch: each level has its own.
BATCH_NORMS = ("BN", "SyncBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")


class Scale(nn.Module):
    """Learned scale, one number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def flatten_levels(maps: Sequence[Tensor], dim: int) -> Tensor:
    """Flatten (N, A * dim, H_l, W_l) maps to (N, R, dim), in the order of anchors."""
    flat = [x.unflatten(1, (-1, dim)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in maps]
    return torch.cat(flat, dim=1)


class FusedConvs(nn.Module):
    """Several 3 x 3 convolutions of one input as one, made for each forward pass.

    On CPUs the gradient of a convolution with 1 or 4 channels takes as long as with 80.
    """

    def __init__(self, *predictors: nn.Conv2d):
        super().__init__()
        parameters = zip(*(x.parameters() for x in predictors), strict=True)
        self.conv = replace(predictors[0], {x[0]: torch.cat(x) for x in parameters})
        self.channels = [predictor.out_channels for predictor in predictors]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.conv(x).split(self.channels, dim=1)


def make_tower(
    channels: int,
    num_levels: int,
    num_convs: int,
    norm: str = "GN",
    bias: bool = True,
    deformable: Mapping[int, str] | None = None,
    deform_groups: int = 1,
) -> nn.Sequential:
    """Return a stack of 3 x 3 convolutions, each with a norm and a ReLU.

    Args:
        norm: one of NORMS; each level has its own batch norm.
        bias: whether convolutions have a bias before a norm.
        deformable: {index of a convolution: "v1" or "v2"}.
        deform_groups: groups of channels with their own offsets.
    """
    layers: list[nn.Module] = []
    for i in range(num_convs):
        if deformable and i in deformable:
            modulated = deformable[i] == "v2"
            layers.append(DeformConvLayer(channels, modulated, bias or not norm, deform_groups))
        else:
            layers.append(nn.Conv2d(channels, channels, 3, padding=1, bias=bias or not norm))
        layers += norm_and_relu(channels, num_levels, norm)
    return nn.Sequential(*layers)


def norm_and_relu(channels: int, num_levels: int, norm: str) -> list[nn.Module]:
    """Return the layers after a convolution of :func:`make_tower`."""
    relu = nn.ReLU(inplace=True)
    if norm in BATCH_NORMS:
        return [PerLevel(get_norm(norm, channels) for _ in range(num_levels)), relu]
    return [get_norm(norm, channels), relu] if norm else [relu]


def run_tower(tower: nn.Sequential, x: Tensor, level: int) -> Tensor:
    for layer in tower:
        x = (layer[level] if isinstance(layer, PerLevel) else layer)(x)
    return x


def initialise(head: nn.Module, prior_prob: float, *class_layers: nn.Module) -> None:
    """Set RetinaNet's initial weights in place (section 4.1): normal with deviation 0.01, biases 0,
    and class predictors that predict ``prior_prob``."""
    for name, module in head.named_modules():
        # Offsets of deformable convolutions start at 0.
        if isinstance(module, (nn.Conv2d, nn.Linear, DeformConv)) and not name.endswith("offset"):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for layer in class_layers:
        nn.init.constant_(layer.get_parameter("bias"), -math.log((1 - prior_prob) / prior_prob))


class DistributionQuality(nn.Module):
    """Quality of a box from the highest probabilities of its sides' distributions and their mean
    (GFLv2, arXiv 2011.12885, section 3.2)."""

    TOP, HIDDEN = 4, 64

    def __init__(self, bins: int):
        super().__init__()
        self.bins = bins
        self.hidden = nn.Linear(4 * (self.TOP + 1), self.HIDDEN)
        self.quality = nn.Linear(self.HIDDEN, 1)

    def forward(self, box_regression: Tensor) -> Tensor:
        """Return (...) logits from (..., 4 * bins) logits."""
        probabilities = box_regression.unflatten(-1, (4, self.bins)).softmax(-1)
        top = probabilities.topk(self.TOP, dim=-1).values
        statistics = torch.cat([top, top.mean(-1, keepdim=True)], dim=-1).flatten(-2)
        return self.quality(self.hidden(statistics).relu()).squeeze(-1)


class ATSSHead(nn.Module):
    """RetinaNet's head with GroupNorm, centerness from the box tower and a learned scale on each
    level's regression (paper, section 3.2: "universal improvements"), each of them optional.

    Under autocast the box tower's predictors stay in float32: a bfloat16 delta moves a box on a
    coarse level by whole pixels.

    Args:
        num_levels, num_classes, num_anchors, box_channels: L, K, A, D.
        num_convs: convolutions per tower.
        norm: one of NORMS; each level has its own batch norm, as in Detectron2's RetinaNet.
        tower_bias: whether convolutions have a bias before a norm; mmdet's have none.
        prior_prob: class probability at initialisation (RetinaNet, section 4.1).
        centerness: source of the quality: "box" or "cls", a convolution on that tower;
            "distribution", which multiplies class probabilities (GFLv2); "", none.
        level_scale: whether each level's box regression has a learned scale.
        box_bias: box regression at initialisation.
        bins: of each side's distribution; 0 without distributions.
        code: decodes the box regression.
        deform: version of one deformable convolution in each tower, "v1" or "v2"; "" for none.
        deform_at: its position, "last" or "first" (DDOD).
        tower: module in place of both towers: L feature maps -> L feature maps.

    Attributes:
        class_layers: {name: A} of the layers with a row for each anchor and class, anchor by
            anchor: training from weights of other classes keeps the rows of common classes. Every
            head has this attribute.

    Raises:
        UserError: for distribution quality or a box code that does not fit.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_levels: int,
        num_classes: int,
        num_anchors: int = 1,
        num_convs: int = 4,
        norm: str = "GN",
        tower_bias: bool = True,
        prior_prob: float = 0.01,
        centerness: str = "box",
        level_scale: bool = True,
        box_bias: float = 0.0,
        box_channels: int = 4,
        bins: int = 0,
        code: BoxCode | None = None,
        deform: str = "",
        deform_at: str = "last",
        tower: nn.Module | None = None,
    ):
        super().__init__()
        check_range("num_convs", num_convs, 0)
        check_range("prior_prob", prior_prob, 1e-9, 1 - 1e-9)
        check_choice("norm", norm, NORMS)
        check_choice("centerness", centerness, ("box", "cls", "distribution", ""))
        check_choice("deform", deform, ("v1", "v2", ""))
        check_choice("deform_at", deform_at, ("first", "last"))
        # A subclass may decode by itself.
        decodes = type(self).forward is not ATSSHead.forward
        if code is not None and not code.relative and not decodes:
            raise UserError(
                f"the box regression of {type(code).__name__} does not count from the anchor: set "
                "MODEL.ATSS.REGRESSION to box, point or distribution"
            )
        num_convs = num_convs if tower is None else 0
        if deform and not num_convs:
            raise UserError("MODEL.ATSS.DEFORM_TOWER needs a tower of at least one convolution")
        if centerness == "distribution" and bins < DistributionQuality.TOP:
            raise WrongValue(
                "centerness",
                "is 'distribution': set MODEL.ATSS.REGRESSION distribution, with at least "
                f"{DistributionQuality.TOP} bins",
            )
        self.num_classes, self.box_channels = num_classes, box_channels
        self.class_layers = {"cls_score": num_anchors}
        self.tower = tower
        deformable = {0 if deform_at == "first" else num_convs - 1: deform} if deform else None
        self.cls_subnet, self.bbox_subnet = (
            make_tower(in_channels, num_levels, num_convs, norm, tower_bias, deformable)
            for _ in range(2)
        )
        self.cls_score = nn.Conv2d(in_channels, num_anchors * num_classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(in_channels, num_anchors * box_channels, 3, padding=1)
        self.centerness = centerness
        on_tower = centerness in ("box", "cls")
        self.ctrness = nn.Conv2d(in_channels, num_anchors, 3, padding=1) if on_tower else None
        self.box_quality = DistributionQuality(bins) if centerness == "distribution" else None
        scale = Scale if level_scale else nn.Identity
        self.scales = PerLevel(scale() for _ in range(num_levels))

        initialise(self, prior_prob, self.cls_score)
        nn.init.constant_(self.bbox_pred.get_parameter("bias"), box_bias)

    def towers(self, features: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        levels = features if self.tower is None else self.tower(features)
        subnets = for_levels(len(levels), self.cls_subnet, self.bbox_subnet)
        for level, (x, (cls_subnet, bbox_subnet)) in enumerate(zip(levels, subnets, strict=True)):
            yield run_tower(cls_subnet, x, level), run_tower(bbox_subnet, x, level)

    def forward(self, features: Sequence[Tensor]) -> HeadOutput:
        """Return the predictions for all R anchors, from L maps (N, C, H_l, W_l)."""
        cls_predictors, box_predictors = [self.cls_score], [self.bbox_pred]
        if self.ctrness is not None:
            (box_predictors if self.centerness == "box" else cls_predictors).append(self.ctrness)
        from_cls, from_box = FusedConvs(*cls_predictors), FusedConvs(*box_predictors)
        predictors = for_levels(len(features), from_cls, from_box, precise=(from_box.conv,))
        classes, box_regression = [], []
        quality: list[Tensor] = []
        for (cls_feature, box_feature), scale, (predict_classes, predict_boxes) in zip(
            self.towers(features), self.scales, predictors, strict=True
        ):
            cls_maps = predict_classes(cls_feature)
            with torch.autocast(box_feature.device.type, enabled=False):
                precise = box_feature.to(self.bbox_pred.weight.dtype)
                box_maps = predict_boxes(precise)
                box_regression.append(scale(box_maps[0]))
            classes.append(cls_maps[0])
            quality += [*cls_maps[1:], *box_maps[1:]]
        output = HeadOutput(
            classes=flatten_levels(classes, self.num_classes),
            box_regression=flatten_levels(box_regression, self.box_channels),
            quality=flatten_levels(quality, 1).squeeze(-1) if quality else None,
        )
        return output if self.box_quality is None else self._multiply(output, self.box_quality)

    @staticmethod
    def _multiply(output: HeadOutput, box_quality: DistributionQuality) -> HeadOutput:
        with torch.autocast(output.box_regression.device.type, enabled=False):
            quality = box_quality(output.box_regression).sigmoid()
            classes = output.map(lambda x: x.to(quality.dtype)).probability() * quality[..., None]
        return output._replace(classes=classes, probabilities=True)
