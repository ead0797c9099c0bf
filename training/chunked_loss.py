"""Cross-entropy over a large vocabulary without its logits: umT5's 256,384 words times 256 positions in float32 are
260 MB a caption, and as much again for their gradient.

Exact, value and gradients: the positions are cut into chunks, and each chunk's logits live only while it is computed,
once in the forward pass and once in the backward. It knows nothing of where the hidden states come from.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    chunk: int = 64,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean of cross_entropy(hidden @ weight.T + bias, targets).

    Args:
        hidden: (…, D) states. weight: (V, D), and bias: (V,), of the head. targets: (…) ids.
        chunk: positions whose logits exist at a time.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be 1 position or more, not {chunk}.")
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    total = hidden.new_zeros((), dtype=torch.float32)
    for states, ids in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        total = total + checkpoint(_summed, states, weight, ids, bias, use_reentrant=False)
    return total / len(targets)


def _summed(states: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.cross_entropy(F.linear(states, weight, bias).float(), ids, reduction="sum")
