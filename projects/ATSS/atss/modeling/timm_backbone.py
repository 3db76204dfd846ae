"""Backbones of timm, an optional dependency, as Detectron2's bottom-ups."""

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
from ..weights import fit_names, widen_first
from .depthwise import speed_up_gradients
from .pretrained import require_loaded
from .timm_models import register_models

# Sizes of trial images: multiples of 32, but of no larger number.
TRIAL_SIZES = ((352, 352), (96, 160), (320, 448))
# Arguments that make models of one image size accept any; each family has another.
ANY_SIZE: tuple[dict, ...] = ({"strict_img_size": False}, {"dynamic_img_size": True}, {})


class TimmBackbone(Backbone):
    """Bottom-up of a timm model with feature maps "s8", "s16", ..., named by their strides.

    Modules that no map depends on are removed, or frozen if the model needs them to run.

    Args:
        name: such as "resnet18" or, with the tag of its weights, "resnet18.a1_in1k".
        strides: of the maps, fine to coarse; the last map of each stride is used.
        weights: of the whole model, with names of timm or of its authors; None: random.
        freeze_at: layers before the map of stride 2^freeze_at are frozen; 0: none.
        freeze_statistics: whether batch norms keep their means and variances in training.
        channels: of images; timm widens the first convolution of weights for three.

    Raises:
        UserError: if timm, the model, a map or a weight is missing, or an image size is refused.
    """

    def __init__(
        self,
        name: str,
        strides: Sequence[int] = (8, 16, 32),
        *,
        weights: Mapping[str, Tensor] | None = None,
        freeze_at: int = 0,
        freeze_statistics: bool = False,
        channels: int = 3,
    ):
        super().__init__()
        with torch.device("meta"):
            trial = _create(name)
        # Index of the last map of each stride.
        index = {x["reduction"]: i for i, x in enumerate(trial.feature_info.info)}
        missing = [stride for stride in strides if stride not in index]
        if missing:
            raise UserError(
                f"{name} has feature maps of strides {sorted(index)}, not of {missing}: choose a "
                "model with stages"
            )
        options: dict[str, Any] = {"out_indices": [index[stride] for stride in strides]}
        if weights is not None:
            with torch.device("meta"):
                names = _require(name).create_model(name).state_dict().keys()
            weights = fit_names(dict(weights), names)
            options |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": weights}}
        with _quiet():
            self.net = _create(name, in_chans=channels, **options)
        if weights is not None:
            weights = widen_first(weights, self.net, channels)
            require_loaded(self.net, weights, name)
        self.channels_come_last = _channels_come_last(self.net)
        self._out_features = [f"s{stride}" for stride in strides]
        self._out_feature_strides = dict(zip(self._out_features, strides, strict=True))
        widths = self.net.feature_info.channels()
        self._out_feature_channels = dict(zip(self._out_features, widths, strict=True))
        # Its parameters have the same names for any number of channels.
        used = _find_used(name, tuple(options["out_indices"]), tuple(strides))
        removed = _find_removable(name, tuple(options["out_indices"]), tuple(strides))
        for path in removed:
            self.net.set_submodule(path, nn.Identity())
        speed_up_gradients(self.net)
        self._removed = tuple(f"net.{path}." for path in removed)
        if freeze_at and 2**freeze_at not in index:
            raise UserError(
                f"MODEL.BACKBONE.FREEZE_AT {freeze_at} needs a map of stride {2**freeze_at}, but "
                f"the maps of {name} have strides {sorted(index)}"
            )
        frozen: Set[str] = frozenset()
        if freeze_at:
            frozen = _find_used(name, (index[2**freeze_at],), (2**freeze_at,))
        for parameter_name, parameter in self.net.named_parameters():
            # Unused parameters would get weight decay, and DDP would wait for their gradients.
            if parameter_name in frozen or parameter_name not in used:
                parameter.requires_grad_(False)
        self.freeze_statistics = freeze_statistics
        # Read by the checkpointer.
        self.relies_on_weights = freeze_statistics or freeze_at > 0
        self.train()

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return {name: (N, C, H / stride, W / stride)} from (N, C, H, W)."""
        maps = self.net(image)
        if self.channels_come_last:
            maps = [x.permute(0, 3, 1, 2).contiguous() for x in maps]
        return dict(zip(self._out_features, maps, strict=True))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Ignore weights of removed modules, which checkpoints of 0.2.0 contain."""
        for key in [x for x in state_dict if x.removeprefix(prefix).startswith(self._removed)]:
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
        """Keep batch norms with frozen statistics in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm) and (
                self.freeze_statistics or not any(x.requires_grad for x in module.parameters())
            ):
                module.eval()
        return self


def pixels_of(name: str) -> tuple[str, list[float], list[float]]:
    """Return INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD of a model's weights."""
    config = _require(name).get_pretrained_cfg(name)
    if config is None:
        raise UserError(
            f"timm has no pixel mean and std of {name}: set MODEL.TIMM.PIXELS False, and "
            "INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD"
        )
    mean, std = ([255 * x for x in values] for values in (config.mean, config.std))
    return "RGB", mean, std


def _require(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise UserError(
            "MODEL.BACKBONE.NAME build_timm_fpn_backbone needs timm: "
            "pip install 'atss-detectron2[timm]'"
        ) from error
    register_models()
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"unknown MODEL.TIMM.NAME {name!r}: timm has no such model{hint}")
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
            type_error = error
        except (AttributeError, RuntimeError) as error:
            raise UserError(f"{name} of timm has no feature maps: {error}") from error
    raise type_error


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _make_trial(name: str, indices: Sequence[int]) -> Any:
    """Return the model on the device "meta", without values."""
    with torch.device("meta"):
        return _create(name, out_indices=list(indices)).eval()


# Both take a second for some models, and a command builds its model more than once.
@cache
def _find_used(name: str, indices: tuple[int, ...], strides: tuple[int, ...]) -> frozenset[str]:
    return frozenset(_try(_make_trial(name, indices), name, strides))


@cache
def _find_removable(name: str, indices: tuple[int, ...], strides: tuple[int, ...]) -> list[str]:
    used = _find_used(name, indices, strides)
    return _prune(_make_trial(name, indices), used, name, strides)


def _try(
    trial: nn.Module,
    name: str,
    strides: Sequence[int],
    sizes: Sequence[tuple[int, int]] = TRIAL_SIZES,
) -> set[str]:
    """Return the names of the parameters that the maps depend on, by backpropagation.

    Raises:
        UserError: if an image size is refused, or a map does not have its stride.
    """
    with torch.device("meta"), torch.enable_grad():
        for height, width in sizes:
            try:
                maps = trial(torch.empty(1, 3, height, width))
            except (AssertionError, IndexError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"{name} does not accept all image sizes, such as {height} x {width}: "
                    f"{str(error).partition(chr(10))[0]}"
                ) from error
            axes = (1, 2) if _channels_come_last(trial) else (2, 3)
            map_sizes = [tuple(x.shape[axis] for axis in axes) for x in maps]
            expected = [(height // stride, width // stride) for stride in strides]
            if map_sizes != expected:
                raise UserError(
                    f"the feature maps of {name} for an image of {height} x {width} must be "
                    f"{expected} at strides {list(strides)}, got {map_sizes}"
                )
        names, parameters = zip(*trial.named_parameters(), strict=True)
        total = torch.stack([x.sum() for x in maps]).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return {n for n, gradient in zip(names, gradients, strict=True) if gradient is not None}


def _prune(trial: nn.Module, used: Set[str], name: str, strides: Sequence[int]) -> list[str]:
    """Replace modules that no map depends on by ``nn.Identity``, in place, if the model still runs,
    and return their paths. ``used`` names the other parameters."""
    removed = []
    # From the last, because an earlier module may feed a later one and must fit it.
    for path in reversed([*_unused_modules(used, trial)]):
        module = trial.get_submodule(path)
        # Elementwise like nn.Identity, but with a parameter, whose gradient shows whether a map
        # depends on the module's output.
        trial.set_submodule(path, nn.PReLU(device="meta"))
        try:
            depends = _try(trial, name, strides, TRIAL_SIZES[:1]) != used
        except Exception:  # The code around it needs more than a module that takes a tensor.
            depends = True
        if depends:
            trial.set_submodule(path, module)
        else:
            removed.append(path)
    return removed


def _unused_modules(used: Set[str], module: nn.Module, path: str = "") -> Iterator[str]:
    """Yield paths of the largest modules whose parameters are all unused."""
    parameters = {name for name, _ in module.named_parameters(prefix=path)}
    if parameters and used.isdisjoint(parameters):
        yield path
    elif parameters:
        for name, child in module.named_children():
            yield from _unused_modules(used, child, f"{path}.{name}" if path else name)


def _channels_come_last(net: Any) -> bool:
    return str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")
