"""Backbones of timm as Detectron2's bottom-ups. timm, an extra of this package, is imported when
one is asked for."""

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .pretrained import require_loaded

# Of a trial image: no square, and divisible by all strides and windows that are in use.
TRIAL_SIZE = (448, 896)
# What lets models that were made for one size take any, in the words of their families.
ANY_SIZE: tuple[dict, ...] = ({"strict_img_size": False}, {"dynamic_img_size": True}, {})


class TimmBackbone(Backbone):
    """Feature maps "s8", "s16", ... of a model of timm, named by their strides.

    Args:
        name: of the model, with or without the tag of its weights, such as "resnet18.a1_in1k".
        strides: of the maps, fine to coarse. Where several maps have one, the last of them counts.
        weights: of the whole model, in the names of timm or of its authors; None for random ones.
        freeze_at: what comes before the map of stride 2^freeze_at is not trained; 0: all is.
        freeze_statistics: batch norms keep their means and variances in training, too; their scales
            and shifts are trained.

    Raises:
        ValueError: with a sentence, where timm is absent or has no such model, or the model makes
            no such maps or only of images of one size, or a weight of it is missing.
    """

    def __init__(
        self,
        name: str,
        strides: Sequence[int] = (8, 16, 32),
        *,
        weights: Mapping[str, Tensor] | None = None,
        freeze_at: int = 0,
        freeze_statistics: bool = False,
    ):
        super().__init__()
        with torch.device("meta"):
            trial = _create(name)
        where = {made: i for i, made in enumerate(x["reduction"] for x in trial.feature_info.info)}
        missing = [stride for stride in strides if stride not in where]
        if missing:
            raise ValueError(
                f"{name} makes feature maps of strides {sorted(where)}, none of {missing}: choose "
                "a model with stages"
            )
        options: dict[str, Any] = {"out_indices": [where[stride] for stride in strides]}
        if weights is not None:
            options |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": weights}}
        with _quiet():
            self.net = _create(name, **options)
        if weights is not None:
            require_loaded(self.net, weights, name)
        self.channels_come_last = str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC")
        self._out_features = [f"s{stride}" for stride in strides]
        self._out_feature_strides = dict(zip(self._out_features, strides, strict=True))
        channels = self.net.feature_info.channels()
        self._out_feature_channels = dict(zip(self._out_features, channels, strict=True))
        _try(name, trial)
        if freeze_at:
            if 2**freeze_at not in where:
                raise ValueError(
                    f"MODEL.BACKBONE.FREEZE_AT {freeze_at} asks for the map of stride "
                    f"{2**freeze_at}, but those of {name} have strides {sorted(where)}"
                )
            self._freeze(name, where[2**freeze_at])
        self.freeze_statistics = freeze_statistics
        self.train()

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> by name (N, C, H / stride, W / stride), rounded up."""
        maps = self.net(image)
        if self.channels_come_last:
            maps = [x.permute(0, 3, 1, 2).contiguous() for x in maps]
        return dict(zip(self._out_features, maps, strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=self._out_feature_channels[name], stride=stride)
            for name, stride in self._out_feature_strides.items()
        }

    @property
    def size_divisibility(self) -> int:
        return max(self._out_feature_strides.values())

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Batch norms that keep their statistics stay in evaluation: all, or those not trained."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm) and (
                self.freeze_statistics or not any(x.requires_grad for x in module.parameters())
            ):
                module.eval()
        return self

    def _freeze(self, name: str, index: int) -> None:
        """What the map of this index depends on, whatever the family calls its stages."""
        with torch.device("meta"):
            trial = _create(name, out_indices=[index])
            (made,) = trial(torch.empty(1, 3, *TRIAL_SIZE))
        names, parameters = zip(*trial.named_parameters(), strict=True)
        gradients = torch.autograd.grad(made.sum(), parameters, allow_unused=True)
        needed = {n for n, gradient in zip(names, gradients, strict=True) if gradient is not None}
        for parameter_name, parameter in self.net.named_parameters():
            if parameter_name in needed:
                parameter.requires_grad_(False)


def pixels_of(name: str) -> tuple[str, list[float], list[float]]:
    """INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD as the weights of a model want them.

    Raises:
        ValueError: as :class:`TimmBackbone`.
    """
    known = _require(name).get_pretrained_cfg(name)
    if known is None:
        raise ValueError(
            f"timm does not say what pixels {name} wants: set MODEL.TIMM.PIXELS False, and "
            "INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD"
        )
    mean, std = ([255 * x for x in values] for values in (known.mean, known.std))
    return "RGB", mean, std


def _require(name: str) -> Any:
    """timm, if it is there and has the model."""
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            "MODEL.BACKBONE.NAME build_timm_fpn_backbone needs timm: "
            "pip install 'atss-detectron2[timm]'"
        ) from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"MODEL.TIMM.NAME is {name!r}, which timm does not know{hint}")
    return timm


def _create(name: str, **options: Any) -> Any:
    timm = _require(name)
    fixed = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
    for any_size in ANY_SIZE if fixed else ({},):
        try:
            return timm.create_model(name, features_only=True, **any_size, **options)
        except TypeError as error:
            refusal = error
        except (AttributeError, RuntimeError) as error:
            raise ValueError(f"{name} of timm gives no feature maps: {error}") from error
    raise refusal


@contextmanager
def _quiet() -> Iterator[None]:
    """timm warns of weights that a backbone has no use for: those of the classifier."""
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _try(name: str, trial: Any) -> None:
    """Whether it takes images of any size."""
    try:
        trial(torch.empty(1, 3, *TRIAL_SIZE, device="meta"))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"{name} does not take images of any size: {str(error).partition(chr(10))[0]}"
        ) from error
