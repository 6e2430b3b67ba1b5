"""Qwen3-MoE (Yang et al. 2025): Qwen3 with experts in all layers but those that the config lists."""

from __future__ import annotations

from superinfer.runtime.models.config import ModelConfig
from superinfer.runtime.models.layers import MLP
from superinfer.runtime.models.moe import SparseMLP
from superinfer.runtime.models.qwen3 import Qwen3ForCausalLM


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
    @staticmethod
    def make_mlp(config: ModelConfig, layer: int) -> MLP | SparseMLP:
        sparse = config.moe is not None and layer in config.moe.layers
        return SparseMLP(config) if sparse else MLP(config)
