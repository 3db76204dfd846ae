"""The head: two convolution towers, three predictors, one learned scale per level."""

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

# Detectron2's names.
NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N", "LN")
# Those with statistics over a batch, which are of one level: others have others.
OF_A_BATCH = ("BN", "SyncBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")


class Scale(nn.Module):
    """Multiplies by one learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def flatten_levels(maps: Sequence[Tensor], dim: int) -> Tensor:
    """Per level (N, A * dim, H, W) -> (N, R, dim), in the order of the anchors."""
    flat = [x.unflatten(1, (-1, dim)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in maps]
    return torch.cat(flat, dim=1)


class FusedConvs(nn.Module):
    """Several 3 x 3 convolutions of one input as one convolution: on CPUs the gradient of one with
    1 or 4 channels takes as long as that of one with 80. Made anew for each forward, for all
    levels."""

    def __init__(self, *predictors: nn.Conv2d):
        super().__init__()
        pairs = zip(*(x.parameters() for x in predictors), strict=True)
        self.conv = replace(predictors[0], {x[0]: torch.cat(x) for x in pairs})
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
    """3 x 3 convolutions, each with a norm and a ReLU.

    Args:
        channels: in and out.
        norm: Detectron2's name, "" for none. Of those with statistics over a batch each level has
            its own.
        bias: whether convolutions have one where a norm follows.
        deformable: {number of a convolution: version, "v1" or "v2"}.
        deform_groups: of their channels, each with offsets of its own.
    """
    layers: list[nn.Module] = []
    for i in range(num_convs):
        if deformable and i in deformable:
            version = deformable[i] == "v2"
            layers.append(DeformConvLayer(channels, version, bias or not norm, deform_groups))
        else:
            layers.append(nn.Conv2d(channels, channels, 3, padding=1, bias=bias or not norm))
        layers += norm_and_relu(channels, num_levels, norm)
    return nn.Sequential(*layers)


def norm_and_relu(channels: int, num_levels: int, norm: str) -> list[nn.Module]:
    """What follows a convolution; arguments as of :func:`make_tower`."""
    relu = nn.ReLU(inplace=True)
    if norm in OF_A_BATCH:
        return [PerLevel(get_norm(norm, channels) for _ in range(num_levels)), relu]
    return [get_norm(norm, channels), relu] if norm else [relu]


def through(tower: nn.Sequential, x: Tensor, level: int) -> Tensor:
    """What a tower makes of the features of a level."""
    for layer in tower:
        x = (layer[level] if isinstance(layer, PerLevel) else layer)(x)
    return x


def initialise(head: nn.Module, prior_prob: float, *class_layers: nn.Module) -> None:
    """RetinaNet's initial weights (section 4.1), in place: normal ones with a deviation of 0.01, no
    biases, and class predictors that say ``prior_prob``."""
    for name, module in head.named_modules():
        # Offsets of deformable convolutions begin at zero.
        if isinstance(module, (nn.Conv2d, nn.Linear, DeformConv)) and not name.endswith("offset"):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for layer in class_layers:
        nn.init.constant_(layer.get_parameter("bias"), -math.log((1 - prior_prob) / prior_prob))


class DistributionQuality(nn.Module):
    """How good a box is, from how sharp the distributions of its sides are: their highest
    probabilities, and the mean of these (GFLv2, arXiv 2011.12885, section 3.2).

    Args:
        bins: of each side's distribution.
    """

    TOP, HIDDEN = 4, 64

    def __init__(self, bins: int):
        super().__init__()
        self.bins = bins
        self.hidden = nn.Linear(4 * (self.TOP + 1), self.HIDDEN)
        self.quality = nn.Linear(self.HIDDEN, 1)

    def forward(self, numbers: Tensor) -> Tensor:
        """(..., 4 * bins) logits -> (...) logits."""
        shares = numbers.unflatten(-1, (4, self.bins)).softmax(-1)
        top = shares.topk(self.TOP, dim=-1).values
        statistics = torch.cat([top, top.mean(-1, keepdim=True)], dim=-1).flatten(-2)
        return self.quality(self.hidden(statistics).relu()).squeeze(-1)


class ATSSHead(nn.Module):
    """RetinaNet's head with GroupNorm, centerness from the box tower, and a learned scale on each
    level's regression (paper, section 3.2: the "universal improvements"), each of which can be
    left out.

    Towers and predictors are shared by all levels. Under autocast the towers and what is predicted
    from the class tower take its precision; what is predicted from the box tower stays in float32,
    because a bfloat16 delta moves a box on a coarse level by whole pixels.

    Args:
        in_channels: channels of every level.
        num_levels: L.
        num_classes: K.
        num_anchors: A.
        num_convs: convolutions per tower.
        norm: Detectron2's name of the towers' normalisation, "" for none. Of those with statistics
            over a batch each level has its own, as in Detectron2's RetinaNet.
        tower_bias: whether the towers' convolutions have biases where a norm follows; mmdet's have
            none.
        prior_prob: class probability at initialisation (RetinaNet, section 4.1).
        centerness: what predicts it, or another quality: "box" or "cls", a convolution on that
            tower; "distribution", the shape of the numbers, if they are such, by which class
            probabilities are multiplied (GFLv2); "" for nothing.
        level_scale: whether each level's regression has a learned scale.
        box_bias: what the box predictor gives at initialisation.
        box_channels: numbers of a box.
        bins: of the distribution that they are for each side; 0: they are none.
        code: that reads the numbers.
        deform: version of the deformable convolution in each tower, "v1" or "v2"; "" for none.
        deform_at: which convolution that is, the "last" or the "first" (DDOD).
        tower: what all levels go through together, in place of these two towers, for both tasks: L
            feature maps -> as many. None: these it is.

    Attributes:
        class_layers: {name of a layer: A} of the layers that have a row for each anchor and class,
            anchor by anchor: where a training begins from weights of other classes, those that it
            knows keep their rows. Every head has it.

    Raises:
        ValueError: for an unknown tower or version, quality from what is no distribution, or a code
            whose numbers do not count from the anchor.
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
        # A class that extends this one may decode by itself.
        decodes = type(self).forward is not ATSSHead.forward
        if code is not None and not code.relative and not decodes:
            raise UserError(
                "it predicts numbers that count from the anchor, which those of "
                f"{type(code).__name__} do not: set MODEL.ATSS.REGRESSION to box, point or "
                "distribution"
            )
        num_convs = num_convs if tower is None else 0
        if deform and not num_convs:
            raise UserError("a tower without convolutions has none to be deformable")
        if centerness == "distribution" and bins < DistributionQuality.TOP:
            raise WrongValue(
                "centerness",
                "'distribution' wants a box code of distributions, MODEL.ATSS.REGRESSION "
                f"distribution, of {DistributionQuality.TOP} bins at least",
            )
        self.num_classes, self.box_channels = num_classes, box_channels
        self.class_layers = {"cls_score": num_anchors}
        self.tower = tower
        at = {"first": 0, "last": num_convs - 1}[deform_at]
        convs = (
            in_channels,
            num_levels,
            num_convs,
            norm,
            tower_bias,
            {at: deform} if deform else None,
        )
        self.cls_subnet, self.bbox_subnet = make_tower(*convs), make_tower(*convs)
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
        """L feature maps -> class and box features of each level."""
        levels = features if self.tower is None else self.tower(features)
        subnets = for_levels(len(levels), self.cls_subnet, self.bbox_subnet)
        for level, (x, (cls_subnet, bbox_subnet)) in enumerate(zip(levels, subnets, strict=True)):
            yield through(cls_subnet, x, level), through(bbox_subnet, x, level)

    def forward(self, features: Sequence[Tensor]) -> HeadOutput:
        """L feature maps (N, C, H_l, W_l) -> predictions for all R anchors."""
        cls_predictors, box_predictors = [self.cls_score], [self.bbox_pred]
        if self.ctrness is not None:
            (box_predictors if self.centerness == "box" else cls_predictors).append(self.ctrness)
        together = FusedConvs(*cls_predictors), FusedConvs(*box_predictors)
        predictors = for_levels(len(features), *together, precise=(together[1].conv,))
        classes, numbers = [], []
        quality: list[Tensor] = []
        for (cls_feature, box_feature), scale, (predict_classes, predict_boxes) in zip(
            self.towers(features), self.scales, predictors, strict=True
        ):
            from_cls = predict_classes(cls_feature)
            with torch.autocast(box_feature.device.type, enabled=False):
                precise = box_feature.to(self.bbox_pred.weight.dtype)
                from_box = predict_boxes(precise)
                numbers.append(scale(from_box[0]))
            classes.append(from_cls[0])
            quality += [*from_cls[1:], *from_box[1:]]
        output = HeadOutput(
            classes=flatten_levels(classes, self.num_classes),
            box_regression=flatten_levels(numbers, self.box_channels),
            quality=flatten_levels(quality, 1).squeeze(-1) if quality else None,
        )
        return output if self.box_quality is None else self._joint(output, self.box_quality)

    @staticmethod
    def _joint(output: HeadOutput, box_quality: DistributionQuality) -> HeadOutput:
        """With class probabilities that are multiplied by the quality of the box."""
        with torch.autocast(output.box_regression.device.type, enabled=False):
            quality = box_quality(output.box_regression).sigmoid()
            classes = output.map(lambda x: x.to(quality.dtype)).probability() * quality[..., None]
        return output._replace(classes=classes, probabilities=True)
