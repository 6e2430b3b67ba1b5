"""The decoder that Llama-like architectures share; each says only how its layers differ."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from superinfer.runtime.models.config import ModelConfig
from superinfer.runtime.models.layers import (
    MLP,
    Attention,
    AttentionBackend,
    Linear,
    RMSNorm,
    RotaryEmbedding,
    StepContext,
)
from superinfer.runtime.models.moe import SparseMLP


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, attention: Attention, mlp: MLP | SparseMLP) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = mlp

    def forward(self, x: torch.Tensor, residual: torch.Tensor, step: StepContext) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = self.input_layernorm.add(x, residual)
        x, residual = self.post_attention_layernorm.add(self.self_attn(x, step), residual)
        return self.mlp(x), residual


class Embedding(nn.Module):
    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight)


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, layers: list[DecoderLayer]) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.rope)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, attention: AttentionBackend) -> torch.Tensor:
        x = self.embed_tokens(ids)
        cos, sin = self.rotary_emb(positions, x.dtype)
        step = StepContext(attention, cos, sin)
        residual = torch.zeros_like(x)
        for layer in self.layers:
            x, residual = layer(x, residual, step)
        return self.norm.add(x, residual)[0]


class CausalLM(nn.Module):
    """A decoder with a language-model head. Subclasses override the two `make_` methods where they differ.

    checkpoint_names: module name here -> in the checkpoint, where that differs.
    """

    checkpoint_names: ClassVar[dict[str, str]] = {}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        layers = [
            DecoderLayer(config, self.make_attention(config, i), self.make_mlp(config, i))
            for i in range(config.num_layers)
        ]
        self.model = Decoder(config, layers)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @staticmethod
    def make_attention(config: ModelConfig, layer: int) -> Attention:
        return Attention(config, layer)

    @staticmethod
    def make_mlp(config: ModelConfig, layer: int) -> MLP | SparseMLP:
        return MLP(config)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, attention: AttentionBackend) -> torch.Tensor:
        """ids, positions: [tokens] int64. Returns the final hidden states, [tokens, hidden], in the model's dtype."""
        return self.model(ids, positions, attention)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [rows, hidden], the rows whose next token is wanted. Returns [rows, vocab] float32."""
        logits: torch.Tensor = self.lm_head(hidden)
        return logits.float()
