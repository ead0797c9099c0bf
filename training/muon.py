"""Muon (Jordan 2024): weight matrices move along the orthogonalised momentum, everything else as under Adam.

On two CPU cores a step costs a tenth more than Adam's and does the work of several, which is what lets the embedded
model train without a GPU. Convolutions count as matrices of (out, everything else). It knows nothing of what it trains.
"""

from __future__ import annotations

from typing import Any

import torch


def orthogonalise(matrix: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """About U V^T of the singular value decomposition U S V^T, by the quintic Newton-Schulz iteration; of one matrix or
    of each in a stack."""
    is_wide = matrix.shape[-2] <= matrix.shape[-1]
    wide = matrix if is_wide else matrix.mT
    wide = wide / (torch.linalg.matrix_norm(wide, keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide if is_wide else wide.mT


def orthogonalise_each(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """On an accelerator those of one shape at once and in bfloat16: one by one they are thousands of products, each
    over before the next is asked for."""
    if matrices[0].device.type == "cpu":
        return [orthogonalise(matrix) for matrix in matrices]
    places: dict[torch.Size, list[int]] = {}
    for place, matrix in enumerate(matrices):
        places.setdefault(matrix.shape, []).append(place)
    updates: dict[int, torch.Tensor] = {}
    for alike in places.values():
        together = orthogonalise(torch.stack([matrices[place] for place in alike]).bfloat16()).float()
        updates.update(zip(alike, together.unbind(), strict=True))
    return [updates[place] for place in range(len(matrices))]


def is_matrix(parameter: torch.Tensor) -> bool:
    return parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) >= 16


def split(module: torch.nn.Module) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """The module's trained parameters: its weight matrices, and the rest. Tables of embeddings are no matrices."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trained if is_matrix(p) and id(p) not in tables]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in trained if id(p) not in chosen]


class Muon(torch.optim.Optimizer):
    """Groups of parameters: with `matrix`, weights that move along orthogonalised momentum, and without, the rest.

    `split` says which of a module's belong where; a step of Adam's is right for any."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]):
        super().__init__(groups, {"lr": lr, "betas": betas, "matrix": False})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            slow, fast = group["betas"]
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients, states = [p.grad for p in parameters], [self.state[p] for p in parameters]
            for parameter, state in zip(parameters, states, strict=True):
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                    if not group["matrix"]:
                        state["square"], state["step"] = torch.zeros_like(parameter), torch.zeros(())
            momenta = [state["momentum"] for state in states]
            if group["matrix"]:
                torch._foreach_lerp_(momenta, gradients, 0.05)
                ahead = torch._foreach_lerp(gradients, momenta, 0.95)
                updates = orthogonalise_each([matrix.flatten(1) for matrix in ahead])
                # A step as large as Adam's: entries of root mean square 0.2 (Liu et al. 2025, 2502.16982).
                sizes = [-0.2 * group["lr"] * max(p.shape[0], p[0].numel()) ** 0.5 for p in parameters]
                torch._foreach_mul_(updates, sizes)
                torch._foreach_add_(parameters, [u.reshape(p.shape) for u, p in zip(updates, parameters, strict=True)])
                continue
            squares = [state["square"] for state in states]
            torch._foreach_add_([state["step"] for state in states], 1)
            counts = [float(state["step"]) for state in states]
            torch._foreach_lerp_(momenta, gradients, 1 - slow)
            torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 1 - fast)
            scales = torch._foreach_div(squares, [1 - fast**count for count in counts])
            torch._foreach_sqrt_(scales)
            torch._foreach_add_(scales, 1e-8)
            torch._foreach_addcdiv_(parameters, momenta, scales, [-group["lr"] / (1 - slow**count) for count in counts])
