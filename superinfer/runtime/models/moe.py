"""The sparse feed-forward layer of mixture-of-experts models."""

from __future__ import annotations

import torch
from torch import nn

from superinfer.kernels.moe import moe_parts
from superinfer.runtime.models.config import ModelConfig
from superinfer.runtime.models.layers import Linear


class Experts(nn.Module):
    """The experts of one layer as two stacked matrices: gate_up_proj [experts, 2 n, hidden], gate rows before up rows,
    and down_proj [experts, hidden, n]."""

    def __init__(self, experts: int, hidden: int, intermediate: int, names: tuple[str, str, str]) -> None:
        """names: what the checkpoint calls an expert's gate, up and down projections."""
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, intermediate))
        self._names = names

    def checkpoint_parts(self, kind: str) -> dict[str, torch.Tensor]:
        """Checkpoint tensors, named from this module on, -> their slice of the parameter `kind`."""
        gate, up, down = self._names
        if kind == "down_proj":
            return {f"{i}.{down}.weight": expert for i, expert in enumerate(self.down_proj)}
        parts = {}
        for i, expert in enumerate(self.gate_up_proj):
            parts[f"{i}.{gate}.weight"], parts[f"{i}.{up}.weight"] = expert.chunk(2)
        return parts


class SparseMLP(nn.Module):
    """A router and its experts. Only for models whose config has `moe`."""

    def __init__(
        self, config: ModelConfig, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    ) -> None:
        super().__init__()
        moe = config.moe
        assert moe is not None, f"{config.architecture} has no experts"
        self.gate = Linear(config.hidden_size, moe.num_experts)
        self.experts = Experts(moe.num_experts, config.hidden_size, moe.intermediate_size, names)
        self.top_k, self.normalize = moe.experts_per_token, moe.normalize

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden], or as `Linear.in_parts`."""
        experts = self.experts
        return moe_parts(x, self.gate(x), experts.gate_up_proj, experts.down_proj, self.top_k, self.normalize)
