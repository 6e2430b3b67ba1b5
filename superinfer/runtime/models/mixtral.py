"""Mixtral 8x7B and 8x22B (Jiang et al. 2024): Mistral with eight experts in every layer, two for each token."""

from __future__ import annotations

from superinfer.runtime.models.config import ModelConfig
from superinfer.runtime.models.decoder import CausalLM
from superinfer.runtime.models.moe import SparseMLP


class MixtralForCausalLM(CausalLM):
    checkpoint_names = {"mlp": "block_sparse_moe"}  # noqa: RUF012 - never changed

    @staticmethod
    def make_mlp(config: ModelConfig, layer: int) -> SparseMLP:
        return SparseMLP(config, names=("w1", "w3", "w2"))
