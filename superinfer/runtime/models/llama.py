"""Llama 2 and 3 (Touvron et al. 2023, Dubey et al. 2024), and Mistral 7B (Jiang et al. 2023), whose
sliding window is a matter of attention: `ModelConfig.windows`."""

from __future__ import annotations

from superinfer.runtime.models.config import ModelConfig
from superinfer.runtime.models.decoder import CausalLM
from superinfer.runtime.models.layers import MLP, Attention


class LlamaForCausalLM(CausalLM):
    @staticmethod
    def make_attention(config: ModelConfig, layer: int) -> Attention:
        return Attention(config, layer, qkv_bias=config.attention_bias, out_bias=config.attention_bias)

    @staticmethod
    def make_mlp(config: ModelConfig, layer: int) -> MLP:
        return MLP(config, bias=config.mlp_bias)
