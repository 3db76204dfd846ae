"""One operator for many tensors gives the gradients that one for each would give, bit for bit."""

import pytest
import torch
from dispatch import Operators
from torch import Tensor

from atss.modeling.foreach import RepeatAll, ScaleAll, cast_all


def tensors(n: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 1 + i, generator=generator).requires_grad_() for i in range(n)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_alias_gradients_are_added_in_autograd_order(dtype):
    """The sum of 1, 3, 1e8 and -1e8 depends on it."""
    own, plain = tensors(2), tensors(2)
    factors = [[torch.tensor(x) for x in (1.0, 3.0, 1e8, -1e8)] for _ in own]
    aliases = RepeatAll.apply(4, [dtype] * 2, *own)
    once = [x if dtype is None else x.to(dtype) for x in plain]
    ours = [aliases[2 * i + k] * factors[k][i] for i in range(4) for k in range(2)]
    theirs = [once[k] * factors[k][i] for i in range(4) for k in range(2)]
    with Operators() as operators:
        sum(x.sum() for x in ours).backward()
    sum(x.sum() for x in theirs).backward()
    for a, b, x, y in zip(own, plain, ours, theirs, strict=False):
        assert torch.equal(x, y)
        assert torch.equal(a.grad, b.grad)
        assert a.grad.dtype == torch.float32
        assert a.grad.eq(4).all()
    assert operators.count["_foreach_add"] + operators.count["_foreach_add_"] == 3


def test_unused_aliases_get_no_gradient():
    a, b, c = tensors(3)
    aliases = RepeatAll.apply(3, [None] * 3, a, b, c)
    (aliases[0].sum() + 2 * aliases[6].sum() + aliases[4].sum()).backward()
    assert a.grad.eq(3).all()
    assert b.grad.eq(1).all()
    assert c.grad is None
    frozen = torch.ones(2)
    constants = [torch.tensor(x) for x in (2.0, 3.0, 4.0)]
    products = ScaleAll.apply(constants, a, c, frozen)
    assert [x.requires_grad for x in products] == [True, True, False]
    assert products[2].eq(4).all()
    products[0].sum().backward()
    assert a.grad.eq(3 + 2).all()
    assert c.grad is None


def test_incoming_gradients_are_not_changed():
    """They may be another tensor's, too: an addition hands the same one to both."""
    (x,), gradient = tensors(1), torch.ones(3, 1)
    aliases = RepeatAll.apply(3, [None], x)
    torch.autograd.backward(aliases, [gradient] * 3)
    assert x.grad.eq(3).all()
    assert gradient.eq(1).all()


def test_second_order_gradients():
    a, b = tensors(2)
    repeated = RepeatAll.apply(3, [None] * 2, *ScaleAll.apply([torch.tensor(2.0)] * 2, a, b))
    loss = sum(x.pow(3).sum() for x in repeated)
    (first,) = torch.autograd.grad(loss, a, create_graph=True)
    torch.testing.assert_close(first, 3 * 3 * 2**3 * a**2)
    (second,) = torch.autograd.grad(first.sum(), a)
    torch.testing.assert_close(second, 2 * 3 * 3 * 2**3 * a)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_products_have_the_dtype_of_autocast(precision):
    (x,), (y,), constant = tensors(1), tensors(1), torch.full((1, 1), 0.3)
    with torch.autocast("cpu", dtype=precision):
        (product,) = ScaleAll.apply([constant], x)
        (double,) = ScaleAll.apply([constant], x.double())
    product.sum().backward()
    expected = (y * constant).to(precision)
    expected.sum().backward()
    assert torch.equal(product, expected)
    assert torch.equal(x.grad, y.grad)
    assert double.dtype == torch.float64  # autocast leaves these


def test_casts_keep_the_memory_format():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    (cast,) = cast_all([x], torch.bfloat16)
    assert torch.equal(cast, x.to(torch.bfloat16))
    assert cast.stride() == x.stride()
