"""Random mixtures of experts, and the answer to them without any routing of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def case(tokens: int, experts: int, hidden: int, size: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x, router logits, gate_up, down; results are of the order of 1."""
    torch.manual_seed(seed)
    x, logits = torch.randn(tokens, hidden), 2 * torch.randn(tokens, experts)
    gate_up = torch.randn(experts, 2 * size, hidden) / hidden**0.5
    return x, logits, gate_up, torch.randn(experts, hidden, size) / size**0.5


def dense_answer(x, logits, gate_up, down, top_k: int, normalize: bool) -> torch.Tensor:
    """Every expert on every token, then the chosen ones' weighted sum; [tokens, hidden] float64."""
    x, gate_up, down = x.double(), gate_up.double(), down.double()
    probabilities = logits.double().softmax(-1)
    kept = probabilities >= probabilities.sort(-1, descending=True).values[:, top_k - 1 : top_k]
    weights = probabilities * kept
    if normalize:
        weights /= weights.sum(-1, keepdim=True)
    gate, up = torch.einsum("th,enh->etn", x, gate_up).chunk(2, -1)
    return torch.einsum("etn,ehn,te->th", F.silu(gate) * up, down, weights)
