"""Depthwise convolutions with gradients of their own."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from atss.modeling import depthwise
from atss.modeling.depthwise import Depthwise, speed_up_gradients
from atss.modeling.timm_backbone import TimmBackbone


@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (7, 7), (4, 4), (1, 7), (5, 2)])
@pytest.mark.parametrize("stride", [1, (2, 2), (1, 2), (3, 1)])
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_are_those_of_torch(kernel, stride, padded):
    torch.manual_seed(0)
    padding = tuple(k // 2 for k in kernel) if padded else 0
    tensors = [torch.randn(x, dtype=torch.float64) for x in ((2, 3, 11, 14), (3, 1, *kernel), (3,))]
    found = []
    for function in (F.conv2d, Depthwise.apply):
        leaves = [x.clone().requires_grad_() for x in tensors]
        options = {"groups": 3} if function is F.conv2d else {}
        output = function(*leaves, stride, padding, **options)
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        found.append((output, *torch.autograd.grad(output.mul(weights).sum(), leaves)))
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def function_of(conv: nn.Module, x: torch.Tensor, dtype: torch.dtype | None) -> str:
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        output = conv(x)
    return type(output.grad_fn).__name__


def test_only_slow_gradients_are_replaced():
    x = torch.randn(1, 8, 16, 16, requires_grad=True)
    fast = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    grouped = nn.Conv2d(8, 8, 5, groups=4)
    padded = nn.Conv2d(8, 8, 3, stride=2, padding=3, groups=8)
    named = nn.Conv2d(8, 8, 5, padding="same", groups=8)
    strided = nn.Conv2d(8, 8, 3, stride=2, groups=8)
    large = nn.Conv2d(8, 8, 5, groups=8)
    net = nn.ModuleList([fast, grouped, padded, named, strided, large])
    speed_up_gradients(net)
    replaced = [function_of(conv, x, torch.bfloat16) == "DepthwiseBackward" for conv in net]
    assert replaced == [False, False, False, False, True, True]
    for conv in (strided, large):
        assert function_of(conv, x, None) == "ConvolutionBackward0"
        assert function_of(conv, x, torch.float16) == "ConvolutionBackward0"
        assert function_of(conv, x[0], torch.bfloat16) != "DepthwiseBackward"
        with torch.no_grad():
            assert function_of(conv, x, torch.bfloat16) == "NoneType"
        assert conv.to("meta")(x.to("meta")).device.type == "meta"


def test_copy_has_its_own_gradients():
    conv = nn.Conv2d(8, 8, 5, groups=8)
    speed_up_gradients(conv)
    other = copy.deepcopy(conv)
    with torch.autocast("cpu", torch.bfloat16):
        other(torch.randn(1, 8, 16, 16)).float().square().sum().backward()
    assert conv.weight.grad is None
    assert other.weight.grad.abs().sum() > 0


class Slow(TorchDispatchMode):
    """Notes gradients that oneDNN computes slowly."""

    found = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            (weight, _, stride), (of_input, of_weight, _) = args[2:5], args[-1]
            large = of_weight and max(weight.shape[2:]) > 3
            self.found |= large or (of_input and max(stride) > 1)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{"kernel_size": 5}, {"kernel_size": 3, "stride": 2}])
def test_no_gradient_is_slow(options):
    x = torch.randn(1, 8, 16, 16, requires_grad=True)
    for ours in (False, True):
        conv = nn.Conv2d(8, 8, groups=8, **options)
        if ours:
            speed_up_gradients(conv)
        with torch.autocast("cpu", torch.bfloat16):
            output = conv(x)
        with Slow() as slow:
            output.float().sum().backward()
        assert slow.found is not ours


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "convnext_atto"])
def test_backbone_trains_as_before(name, monkeypatch):
    """Also with convolutions that pad their input, as timm's do."""
    pytest.importorskip("timm")
    torch.manual_seed(0)
    backbone = TimmBackbone(name, freeze_statistics=True)
    image = torch.randn(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    calls, of_weight = [], depthwise._of_weight
    monkeypatch.setattr(depthwise, "_of_weight", lambda *x: calls.append(x) or of_weight(*x))

    def gradients():
        backbone.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            maps = backbone(image).values()
        sum((x.float() * x.detach().float().sign()).mean() for x in maps).backward()
        return {k: x.grad.clone() for k, x in backbone.named_parameters()}

    ours, replaced = gradients(), [x for x in backbone.modules() if "forward" in vars(x)]
    assert len(calls) == len(replaced) > 10
    for conv in replaced:
        del conv.forward
    theirs = gradients()
    assert len(calls) == len(replaced)
    for key, x in theirs.items():
        torch.testing.assert_close(ours[key], x, rtol=0, atol=0.01 * float(x.abs().max()))
