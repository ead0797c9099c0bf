"""Matrix products on a CPU by oneDNN instead of MKL, which on AMD's processors makes no use of AVX-512.

On two cores of a Zen 5 a training step of the toy box takes 1.08 s instead of 1.82. Attention stays with MKL: through
oneDNN its many small products take three times as long. It knows nothing of what is trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F

BY_MKL, BY_ONEDNN = "highest", "medium"  # where a processor has units for bfloat16, the latter may round to it

Tensor = torch.Tensor
aten = torch.ops.aten
plain_attention = F.scaled_dot_product_attention


@contextlib.contextmanager
def products(by: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(by)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def products_by_onednn() -> Iterator[None]:
    """While it lasts, for the whole process."""
    with products(BY_ONEDNN):
        F.scaled_dot_product_attention = attention
        try:
            yield
        finally:
            F.scaled_dot_product_attention = plain_attention


# Operators of their own, so that a compiled block calls them instead of looking inside.


@torch.library.custom_op("univigu::attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    with products(BY_MKL):
        return _shape(query, key, value, mask, scale)


@_attention.register_fake
def _shape(query, key, value, mask, scale):
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, False, attn_mask=mask, scale=scale)


@torch.library.custom_op("univigu::attention_backward", mutates_args=())
def _attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attended: Tensor,
    logsumexp: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    with products(BY_MKL):
        return _backward_shape(gradient, query, key, value, attended, logsumexp, mask, scale)


@_attention_backward.register_fake
def _backward_shape(gradient, query, key, value, attended, logsumexp, mask, scale):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, query, key, value, attended, logsumexp, 0.0, False, attn_mask=mask, scale=scale
    )


def _keep(ctx, inputs, output) -> None:
    query, key, value, mask, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, mask)


def _back(ctx, gradient, _):
    *saved, mask = ctx.saved_tensors
    return (*_attention_backward(gradient, *saved, mask, ctx.scale), None, None)


_attention.register_autograd(_back, setup_context=_keep)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """`scaled_dot_product_attention`, of float32 on a CPU by MKL."""
    ours = query.device.type == "cpu" and query.dtype == torch.float32 and query.ndim == 4
    if not ours or dropout_p or is_causal or enable_gqa or (attn_mask is not None and attn_mask.requires_grad):
        return plain_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros(attn_mask.shape, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    return _attention(query, key, value, attn_mask, scale or query.shape[-1] ** -0.5)[0]
