"""The references' gradients against those of a dense product in float64, entry by entry."""

from dataclasses import replace

import pytest
import torch

from gossamer.core.errors import GossamerError
from tests.kernels.products import DTYPE_IDS, FORMATS, MIDDLING, cases, check, inputs, matrix, packed


@pytest.mark.parametrize(**DTYPE_IDS)
@pytest.mark.parametrize("op", FORMATS)
def test_gradients_are_those_of_the_dense_product(op: str, dtype: torch.dtype) -> None:
    for case in cases(op):
        dense, mask, pattern = matrix(case, dtype)
        packed = FORMATS[op].pack(dense, mask, pattern)
        values = packed.values.clone().requires_grad_()
        x = inputs(3, case.columns, dtype).requires_grad_()
        above = inputs(3, case.rows, dtype, seed=2)  # the gradient of the loss by y
        y = replace(packed, values=values).linear(x)  # type: ignore[type-var]
        by_x, by_values = torch.autograd.grad(y, (x, values), above)
        check(by_x, above, dense.T)
        # by W it is aboveᵀ x, of which only the kept entries are there.
        exact = (above.double().T @ x.detach().double()).to(dtype)
        found = replace(packed, values=by_values).dense()  # type: ignore[type-var]
        check(torch.where(mask, found, exact), above.T, x.detach().T)


@pytest.mark.parametrize("op", FORMATS)
def test_finite_differences_agree(op: str) -> None:
    weight = packed(op, MIDDLING[op], torch.float32)
    x, step = inputs(2, weight.shape[1], torch.float32), inputs(2, weight.shape[1], torch.float32, seed=3)
    loss = weight.linear(x.requires_grad_()).square().sum()
    (gradient,) = torch.autograd.grad(loss, x)
    ahead, behind = (weight.linear(x.detach() + h * step).double().square().sum() for h in (1e-2, -1e-2))
    slope = float((ahead - behind) / 2e-2)
    assert slope == pytest.approx(float((gradient.double() * step).sum()), rel=1e-3)


@pytest.mark.parametrize("op", FORMATS)
def test_only_a_gradient_that_is_wanted_is_paid_for(op: str) -> None:
    weight = packed(op, MIDDLING[op], torch.float32)
    x = inputs(2, weight.shape[1], torch.float32).requires_grad_()
    assert weight.linear(x).requires_grad
    with torch.no_grad():
        assert not weight.linear(x).requires_grad
        with pytest.raises(GossamerError, match="unknown kernel"):  # so it was asked which runs
            weight.linear(x, "nonsense")
    assert not weight.linear(x.detach()).requires_grad
    with pytest.raises(GossamerError, match="takes inputs"):
        weight.linear(x[:, 1:])
