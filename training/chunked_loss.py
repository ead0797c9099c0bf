"""A mean over positions with the intermediates of a few positions at a time: umT5's 256,384 words times 256 positions
in float32 are 260 MB a caption, and as much again for their gradient.

Exact, value and gradients: the positions are cut into chunks, and what a chunk needs lives only while it is computed,
once in the forward pass and once in the backward. It knows nothing of what is computed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint


def mean_in_chunks(loss: Callable[..., torch.Tensor], chunk: int, *tensors: torch.Tensor) -> torch.Tensor:
    """`loss(*tensors)`, which has to be a mean over their first dimension, `chunk` positions at a time."""
    if chunk < 1:
        raise ValueError(f"chunk must be 1 position or more, not {chunk}.")
    positions = len(tensors[0])
    if positions <= chunk:
        return loss(*tensors)
    total = 0.0
    for parts in zip(*(tensor.split(chunk) for tensor in tensors), strict=True):
        mean = checkpoint(loss, *parts, use_reentrant=False, preserve_rng_state=False)
        total = total + len(parts[0]) / positions * mean
    return total
