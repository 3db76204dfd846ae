"""The dynamic head's blocks against their formulas in float64, and as a tower of ours."""

import math

import pytest
import torch
from conftest import make_cfg, make_input
from detectron2.modeling import build_model
from torch import nn
from torchvision.ops import deform_conv2d

from atss.modeling import DynamicTower
from atss.modeling.dyhead import DynamicBlock, TaskAttention, resized

C = 32


def randomised(module: nn.Module, scale: float = 0.3, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator))
    return module.double()


def levels(*sizes, n=2, channels=C, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, channels, *hw, generator=generator, dtype=torch.float64) for hw in sizes]


def hard_sigmoid(x):
    return ((x + 3) / 6).clip(0, 1)


def bilinear(x, row, column):
    """(C,) of a (C, H, W) map at a place, 0 outside."""
    total = 0
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < x.shape[1] and 0 <= j < x.shape[2]:
                total = total + (1 - abs(row - i)) * (1 - abs(column - j)) * x[:, i, j]
    return total


def at_corners(x, size):
    """(C, H, W) in another size, first on first and last on last, spelled out."""
    out = x.new_zeros(len(x), *size)
    steps = [(a - 1) / (b - 1) if b > 1 else 0.0 for a, b in zip(x.shape[1:], size, strict=True)]
    for i in range(size[0]):
        for j in range(size[1]):
            out[:, i, j] = bilinear(x, i * steps[0], j * steps[1])
    return out


def convolved(conv, x, offset, mask, stride):
    """A modulated deformable convolution of a (C, H, W) map, tap by tap, and its norm."""
    _, height, width = offset.shape
    out = x.new_zeros(len(conv.weight), height, width)
    for i in range(height):
        for j in range(width):
            for tap in range(9):
                row = i * stride - 1 + tap // 3 + offset[2 * tap, i, j].item()
                column = j * stride - 1 + tap % 3 + offset[2 * tap + 1, i, j].item()
                value = bilinear(x, row, column)
                if isinstance(value, torch.Tensor):
                    weight = conv.weight[:, :, tap // 3, tap % 3]
                    out[:, i, j] += mask[tap, i, j] * (weight @ value)
    groups = out.view(16, -1)
    spread = groups.var(dim=1, correction=0, keepdim=True) + conv.norm.eps
    normal = ((groups - groups.mean(dim=1, keepdim=True)) / spread.sqrt()).view_as(out)
    return normal * conv.norm.weight[:, None, None] + conv.norm.bias[:, None, None]


def lines(attention, x):
    """Apply the task-aware attention to a (C, H, W) map."""
    hidden = (attention.hidden.weight @ x.mean(dim=(1, 2)) + attention.hidden.bias).clip(0)
    lines = hard_sigmoid(attention.lines.weight @ hidden + attention.lines.bias)
    a1, b1, a2, b2 = lines.view(4, -1)
    a1, a2 = 2 * (a1 - 0.5) + 1, 2 * (a2 - 0.5)
    first, second = (
        a[:, None, None] * x + (b - 0.5)[:, None, None] for a, b in ((a1, b1), (a2, b2))
    )
    return torch.maximum(first, second)


def spelled_out(block, features):
    """Return a block's output for (C, H, W) maps, by the paper's formulas."""
    found = []
    for level, x in enumerate(features):
        moved = block.offset(x[None])[0]
        offset, mask = moved[:18], moved[18:].sigmoid()
        maps = [convolved(block.same, x, offset, mask, 1)]
        if level > 0:
            maps.append(convolved(block.finer, features[level - 1], offset, mask, 2))
        if level + 1 < len(features):
            coarser = features[level + 1]
            size = coarser.shape[1:]
            on_its_grid = at_corners(offset, size), at_corners(mask, size)
            maps.append(at_corners(convolved(block.coarser, coarser, *on_its_grid, 1), x.shape[1:]))
        gate = block.scale_attention
        gated = []
        for y in maps:
            logit = (gate.weight.view(-1) @ y.mean(dim=(1, 2)) + gate.bias).clip(0)
            gated.append(y * hard_sigmoid(logit))
        found.append(lines(block.task_attention, sum(gated) / len(gated)))
    return found


@pytest.mark.parametrize(
    "sizes",
    [
        [(6, 8), (3, 4)],
        [(5, 7), (3, 4), (2, 2), (1, 1)],  # odd ones, and one that has a single place
        [(4, 5)],  # alone
    ],
)
def test_block_equals_its_formulas(sizes):
    block = randomised(DynamicBlock(C, len(sizes)))
    features = levels(*sizes)
    with torch.no_grad():
        found = block(features)
        for image in range(2):
            expected = spelled_out(block, [x[image] for x in features])
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours[image], theirs, rtol=1e-9, atol=1e-9)


def test_levels_use_the_input_of_their_neighbours():
    """And none farther away, until the next block."""
    block = randomised(DynamicBlock(C, 3))
    features = levels((8, 8), (4, 4), (2, 2))
    with torch.no_grad():
        before = block(features)
        features[0] = features[0] + 1
        after = block(features)
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [True, True, False]


def test_task_attention_starts_nearly_as_a_relu():
    tower = build_model(make_cfg(*TOWER)).head.tower
    attention, x = tower.blocks[0].task_attention, torch.randn(2, 64, 4, 4)
    with torch.no_grad():
        assert (attention(x) - x.relu()).abs().max() < 0.1


@pytest.mark.parametrize("which", ["block", "task"])
def test_gradients(which):
    """Of the input and of the biases."""
    module = randomised(DynamicBlock(16, 2) if which == "block" else TaskAttention(16), 0.2)
    features = levels((2, 3), (1, 2), n=1, channels=16)
    given = [x.requires_grad_() for x in features]
    given += [
        p for n, p in module.named_parameters() if n.endswith(("offset.bias", "attention.bias"))
    ]

    def of_maps(first, second, *_):
        maps = [first, second]
        return tuple(module(maps)) if which == "block" else tuple(map(module, maps))

    assert torch.autograd.gradcheck(of_maps, tuple(given), atol=1e-6, rtol=1e-4)


def test_the_operator_refuses_offsets_of_another_size():
    """Which is why those of a level are resized for the coarser one."""
    x, offset = torch.zeros(1, 4, 3, 3), torch.zeros(1, 18, 6, 6)
    with pytest.raises(RuntimeError, match="offset output dims"):
        deform_conv2d(x, offset, torch.zeros(4, 4, 3, 3), padding=1)


def test_resizing_aligns_corners():
    x = torch.randn(1, 2, 3, 5)
    for size in ((6, 10), (2, 2), (3, 5)):
        found = resized(x, size)
        assert found.shape[2:] == size
        torch.testing.assert_close(
            found[..., [0, -1]][:, :, [0, -1]], x[..., [0, -1]][:, :, [0, -1]]
        )
    assert resized(x, (3, 5)) is x


TOWER = (
    *("MODEL.FPN.OUT_CHANNELS", 64),
    *("MODEL.ATSS.HEADS.ATSSHead.TOWER", "dynamic"),
    *("MODEL.ATSS.TOWERS.dynamic.NUM_BLOCKS", 2),
)


def test_both_tasks_train_the_shared_tower():
    torch.manual_seed(0)
    model = build_model(make_cfg(*TOWER)).train()
    losses = model([make_input([[20, 20, 90, 80]], [0])])
    sum(losses.values()).backward()
    tower = model.head.tower
    missed = [n for n, p in tower.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missed
    coarser = [torch.randn(1, 64, s, s) for s in (4, 2, 1, 1)]
    cls, box = next(model.head.towers([torch.randn(1, 64, 8, 8), *coarser]))
    assert cls is box


def test_a_single_level_has_no_neighbours():
    """Nor weights for them, which nothing would teach."""
    tower = DynamicTower(16, 1, 2)
    sum(x.square().sum() for x in tower([torch.randn(1, 16, 3, 4)])).backward()
    assert all(p.grad is not None for p in tower.parameters())


def test_bf16_is_close_to_fp32():
    """Under autocast, as the recipe has it on processors that are fast at it."""
    torch.manual_seed(0)
    tower = DynamicTower(16, 2, 2).eval()
    with torch.no_grad():
        for p in tower.parameters():
            p.copy_(0.2 * torch.randn_like(p))
        maps = [torch.randn(2, 16, *hw) for hw in ((6, 8), (3, 4))]
        plain = tower(maps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = tower(maps)
    for a, b in zip(plain, mixed, strict=True):
        assert (a - b.float()).abs().max() < 0.05 * a.abs().max()


def test_initial_offsets_and_weights():
    tower = build_model(make_cfg(*TOWER)).head.tower
    assert len(tower.blocks) == 2
    for block in tower.blocks:
        assert not block.offset.weight.any()
        assert not block.offset.bias.any()
        for conv in (block.finer, block.same, block.coarser):
            assert conv.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_parameter_count_equals_the_paper():
    """1.917 million at 256 channels."""
    assert sum(p.numel() for p in DynamicBlock(256, 5).parameters()) == 1_916_508


def test_invalid_towers_are_refused():
    with pytest.raises(
        ValueError, match=r"MODEL.FPN.OUT_CHANNELS must be a multiple of 16, got 40"
    ):
        build_model(make_cfg(*TOWER, "MODEL.FPN.OUT_CHANNELS", 40, "MODEL.ATSS.NORM", ""))
    with pytest.raises(ValueError, match="needs a tower of at least one convolution"):
        build_model(make_cfg(*TOWER, "MODEL.ATSS.DEFORM_TOWER", "v2"))
    with pytest.raises(ValueError, match=r"TOWERS.dynamic.NUM_BLOCKS must be >= 1, got 0"):
        build_model(make_cfg(*TOWER[:-1], 0))
    with pytest.raises(
        ValueError, match=r"unknown MODEL.ATSS.HEADS.ATSSHead.TOWER 'static': choose from"
    ):
        build_model(make_cfg("MODEL.ATSS.HEADS.ATSSHead.TOWER", "static"))
