"""Backbones of timm as Detectron2's bottom-ups. timm, an extra of this package, is imported when
one is asked for."""

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError
from ..weights import fit_names
from .pretrained import require_loaded

# Of trial images: what training meets, multiples of 32 and of nothing larger.
TRIAL_SIZES = ((352, 352), (96, 160), (320, 448))
# What lets models that were made for one size take any, in the words of their families.
ANY_SIZE: tuple[dict, ...] = ({"strict_img_size": False}, {"dynamic_img_size": True}, {})


class TimmBackbone(Backbone):
    """Feature maps "s8", "s16", ... of a model of timm, named by their strides. Modules on which no
    map depends are left out; if the others cannot run without one, it stays and is not trained.

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
        # The last map of each stride.
        where = {made: i for i, made in enumerate(x["reduction"] for x in trial.feature_info.info)}
        missing = [stride for stride in strides if stride not in where]
        if missing:
            raise UserError(
                f"{name} makes feature maps of strides {sorted(where)}, none of {missing}: choose "
                "a model with stages"
            )
        options: dict[str, Any] = {"out_indices": [where[stride] for stride in strides]}
        if weights is not None:
            with torch.device("meta"):
                names = _require(name).create_model(name).state_dict().keys()
            weights = fit_names(dict(weights), names)
            options |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": weights}}
        with _quiet():
            self.net = _create(name, **options)
        if weights is not None:
            require_loaded(self.net, weights, name)
        self.channels_come_last = _channels_come_last(self.net)
        self._out_features = [f"s{stride}" for stride in strides]
        self._out_feature_strides = dict(zip(self._out_features, strides, strict=True))
        channels = self.net.feature_info.channels()
        self._out_feature_channels = dict(zip(self._out_features, channels, strict=True))
        needed = _needed(name, tuple(options["out_indices"]), tuple(strides))
        left_out = _left_out(name, tuple(options["out_indices"]), tuple(strides))
        for path in left_out:
            self.net.set_submodule(path, nn.Identity())
        self._left_out = tuple(f"net.{path}." for path in left_out)
        if freeze_at and 2**freeze_at not in where:
            raise UserError(
                f"MODEL.BACKBONE.FREEZE_AT {freeze_at} asks for the map of stride {2**freeze_at}, "
                f"but those of {name} have strides {sorted(where)}"
            )
        frozen: Set[str] = frozenset()
        if freeze_at:
            frozen = _needed(name, (where[2**freeze_at],), (2**freeze_at,))
        for parameter_name, parameter in self.net.named_parameters():
            # What no map depends on would wait for gradients, and decay.
            if parameter_name in frozen or parameter_name not in needed:
                parameter.requires_grad_(False)
        self.freeze_statistics = freeze_statistics
        # For whoever loads weights.
        self.relies_on_weights = freeze_statistics or freeze_at > 0
        self.train()

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> by name (N, C, H / stride, W / stride)."""
        maps = self.net(image)
        if self.channels_come_last:
            maps = [x.permute(0, 3, 1, 2).contiguous() for x in maps]
        return dict(zip(self._out_features, maps, strict=True))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Checkpoints of version 0.2.0 hold weights of modules that are left out: ignore them."""
        for key in [x for x in state_dict if x.removeprefix(prefix).startswith(self._left_out)]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)

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


def pixels_of(name: str) -> tuple[str, list[float], list[float]]:
    """INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD as the weights of a model want them.

    Raises:
        ValueError: as :class:`TimmBackbone`.
    """
    known = _require(name).get_pretrained_cfg(name)
    if known is None:
        raise UserError(
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
        raise UserError(
            "MODEL.BACKBONE.NAME build_timm_fpn_backbone needs timm: "
            "pip install 'atss-detectron2[timm]'"
        ) from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"MODEL.TIMM.NAME is {name!r}, which timm does not know{hint}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = [x.partition(".")[2] for x in timm.list_pretrained(f"{name.partition('.')[0]}.*")]
        raise UserError(f"MODEL.TIMM.NAME is {name!r}: {error}: choose from {tags}") from error
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
            raise UserError(f"{name} of timm gives no feature maps: {error}") from error
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


def _make_trial(name: str, indices: Sequence[int]) -> Any:
    """A model that computes shapes and what depends on what, but no numbers."""
    with torch.device("meta"):
        return _create(name, out_indices=list(indices)).eval()


# Both take a second for some models, and a command builds its model more than once.
@cache
def _needed(name: str, indices: tuple[int, ...], strides: tuple[int, ...]) -> frozenset[str]:
    """As :func:`_try`, of a model of timm."""
    return frozenset(_try(_make_trial(name, indices), name, strides))


@cache
def _left_out(name: str, indices: tuple[int, ...], strides: tuple[int, ...]) -> tuple[str, ...]:
    """As :func:`_leave_out`, of a model of timm."""
    trial = _make_trial(name, indices)
    return tuple(_leave_out(trial, _needed(name, indices, strides), name, strides))


def _try(
    trial: nn.Module,
    name: str,
    strides: Sequence[int],
    sizes: Sequence[tuple[int, int]] = TRIAL_SIZES,
) -> set[str]:
    """Names of the parameters that the maps depend on, whatever the family calls its stages.

    Raises:
        ValueError: where images of some size are not taken, or their maps not of the sizes that
            the strides say.
    """
    with torch.device("meta"), torch.enable_grad():
        for height, width in sizes:
            try:
                maps = trial(torch.empty(1, 3, height, width))
            except (AssertionError, IndexError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"{name} does not take images of any size, such as {height} x {width}: "
                    f"{str(error).partition(chr(10))[0]}"
                ) from error
            axes = (1, 2) if _channels_come_last(trial) else (2, 3)
            found = [tuple(x.shape[axis] for axis in axes) for x in maps]
            wanted = [(height // stride, width // stride) for stride in strides]
            if found != wanted:
                raise UserError(
                    f"of an image of {height} x {width}, {name} makes maps of {found}, where "
                    f"strides {list(strides)} mean {wanted}"
                )
        names, parameters = zip(*trial.named_parameters(), strict=True)
        total = torch.stack([x.sum() for x in maps]).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return {n for n, gradient in zip(names, gradients, strict=True) if gradient is not None}


def _leave_out(trial: nn.Module, needed: Set[str], name: str, strides: Sequence[int]) -> list[str]:
    """Replaces modules on which no map depends, in place.

    Args:
        needed: names of the parameters that the maps depend on.

    Returns:
        their paths; the model runs with ``nn.Identity`` in their places.
    """
    left_out = []
    # From the last: one that feeds another has to fit it.
    for path in reversed([*_without(needed, trial)]):
        module = trial.get_submodule(path)
        # Elementwise like nn.Identity, but with a parameter, which shows whether a map depends on
        # what comes out.
        trial.set_submodule(path, nn.PReLU(device="meta"))
        try:
            depends = _try(trial, name, strides, TRIAL_SIZES[:1]) != needed
        except Exception:  # The code around it expects more than a module that takes a tensor.
            depends = True
        if depends:
            trial.set_submodule(path, module)
        else:
            left_out.append(path)
    return left_out


def _without(names: Set[str], module: nn.Module, path: str = "") -> Iterator[str]:
    """Paths of the largest modules that have parameters, but none of these."""
    parameters = {name for name, _ in module.named_parameters(prefix=path)}
    if parameters and names.isdisjoint(parameters):
        yield path
    elif parameters:
        for name, child in module.named_children():
            yield from _without(names, child, f"{path}.{name}" if path else name)


def _channels_come_last(net: Any) -> bool:
    return str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")
