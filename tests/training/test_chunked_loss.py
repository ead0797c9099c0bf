"""The mean in chunks is the plain mean, and no tensor of the whole size ever exists."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.chunked_loss import mean_in_chunks


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def inputs(words: int = 50):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(21, 8, generator=generator).requires_grad_()
    weight = torch.randn(words, 8, generator=generator).requires_grad_()
    bias = torch.randn(words, generator=generator).requires_grad_()
    ids = torch.randint(words, (21,), generator=generator)
    return hidden, weight, bias, ids, lambda hidden, ids: F.cross_entropy(F.linear(hidden, weight, bias), ids)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_value_and_gradients_are_those_of_the_plain_loss(chunk):
    hidden, weight, bias, ids, loss = inputs()
    plain = loss(hidden, ids)
    expected = torch.autograd.grad(2 * plain, (hidden, weight, bias))
    chunked = mean_in_chunks(loss, chunk, hidden, ids)
    torch.testing.assert_close(chunked, plain)
    for ours, theirs in zip(torch.autograd.grad(2 * chunked, (hidden, weight, bias)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_logits_of_all_positions_never_exist_at_once():
    hidden, weight, _, ids, loss = inputs(words=500)
    with LargestTensor() as largest:
        mean_in_chunks(loss, 4, hidden, ids).backward()
    assert largest.elements == weight.numel() < 21 * 500  # the weight's own gradient is the largest thing there is
    assert weight.grad.abs().sum() > 0


def test_a_chunk_of_nothing_is_refused():
    hidden, _, _, ids, loss = inputs()
    with pytest.raises(ValueError, match="chunk must be 1 position or more, not 0"):
        mean_in_chunks(loss, 0, hidden, ids)
