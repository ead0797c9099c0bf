"""Products by oneDNN are the products by MKL, attention with its gradients included, compiled or not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from training.onednn import attention, plain_attention, products_by_onednn


def attended(function, mask):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 3, length, 8, generator=generator).requires_grad_() for length in (5, 7, 7)]
    out = function(*parts, attn_mask=mask)
    out.square().sum().backward()
    return [out.detach(), *(part.grad for part in parts)]


def masks() -> list[torch.Tensor | None]:
    seen = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    seen[1, :, :, 4:] = False
    return [None, seen, torch.zeros(2, 1, 5, 7).masked_fill(~seen, -10.0)]


@pytest.mark.parametrize("mask", masks(), ids=["none", "bool", "added"])
def test_attention_and_its_gradients_are_those_of_torch(mask):
    before = torch.get_float32_matmul_precision()
    for ours, theirs in zip(attended(attention, mask), attended(plain_attention, mask), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.get_float32_matmul_precision() == before  # called by itself it leaves the process as it was


def test_what_is_not_float32_on_a_cpu_goes_to_torch():
    parts = [torch.randn(1, 2, 4, 8, dtype=torch.float64) for _ in range(3)]
    assert torch.equal(attention(*parts), plain_attention(*parts))
    whole = [torch.randn(1, 2, 4, 8) for _ in range(3)]
    assert torch.equal(attention(*whole, is_causal=True), plain_attention(*whole, is_causal=True))


def test_it_lasts_as_long_as_it_is_asked_for():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError), products_by_onednn():
        assert F.scaled_dot_product_attention is attention
        assert torch.get_float32_matmul_precision() == "medium"
        parts = [torch.randn(1, 2, 4, 8) for _ in range(3)]
        F.scaled_dot_product_attention(*parts)
        assert torch.get_float32_matmul_precision() == "medium"
        raise RuntimeError
    assert F.scaled_dot_product_attention is plain_attention
    assert torch.get_float32_matmul_precision() == before
