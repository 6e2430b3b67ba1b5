"""Muon (Jordan et al., 2024) for the weight matrices: momentum, then the nearest orthogonal matrix as the step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch


def orthogonal(g: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps in bf16 on a stack of matrices [n, rows, columns], rows <= columns."""
    x = g.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Matrices of one shape are stepped as one batch. Nesterov momentum; decoupled weight decay."""

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[torch.Tensor]] = defaultdict(list)
            for p in group["params"]:
                shapes[tuple(p.shape)].append(p)
            for (rows, columns), params in shapes.items():
                grads: list[torch.Tensor] = []
                for p in params:
                    assert p.grad is not None
                    grads.append(p.grad)
                buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                g = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))
                update = orthogonal(g) if rows <= columns else orthogonal(g.mT).mT
                scale = max(1.0, rows / columns) ** 0.5 * group["lr"]
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(update.to(params[0].dtype).unbind()), alpha=-scale)
