"""Qwen3, dense (Yang et al. 2025): Llama with RMSNorm on every query and key head."""

from __future__ import annotations

from superinfer.runtime.models.config import ModelConfig
from superinfer.runtime.models.decoder import CausalLM
from superinfer.runtime.models.layers import Attention


class Qwen3ForCausalLM(CausalLM):
    @staticmethod
    def make_attention(config: ModelConfig, layer: int) -> Attention:
        bias = config.attention_bias
        return Attention(config, layer, qkv_bias=bias, out_bias=bias, qk_norm=True)
