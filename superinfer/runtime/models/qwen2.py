"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with biases on the query, key and value projections."""

from __future__ import annotations

from superinfer.runtime.models.config import ModelConfig
from superinfer.runtime.models.decoder import CausalLM
from superinfer.runtime.models.layers import Attention


class Qwen2ForCausalLM(CausalLM):
    @staticmethod
    def make_attention(config: ModelConfig, layer: int) -> Attention:
        return Attention(config, layer, qkv_bias=True)
