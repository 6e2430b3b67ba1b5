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
    """Attention and a feed-forward block, each behind a norm that adds to the residual stream, [tokens, hidden]."""

    def __init__(self, config: ModelConfig, attention: Attention, mlp: MLP | SparseMLP) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = mlp

    def forward(self, x: torch.Tensor, residual: torch.Tensor, step: StepContext) -> tuple[torch.Tensor, torch.Tensor]:
        return self.feed(*self.attend(x, residual, step))

    def attend(self, x: torch.Tensor, residual: torch.Tensor, step: StepContext) -> tuple[torch.Tensor, torch.Tensor]:
        """The first half: (attended, residual). Whatever of a token others read of this layer is in the cache then."""
        x, residual = self.input_layernorm.add(x, residual)
        return self.self_attn(x, step), residual

    def feed(self, attended: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The second half, of any rows of the first."""
        x, residual = self.post_attention_layernorm.add(self.self_attn.o_proj.in_parts(attended), residual)
        return self.mlp(x), residual


class Embedding(nn.Module):
    """ids [tokens] -> their rows of the table, [tokens, size]."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight)


class Decoder(nn.Module):
    """Token ids to final hidden states, cut in two behind the last layer's attention; see CausalLM."""

    def __init__(self, config: ModelConfig, layers: list[DecoderLayer]) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.rope)

    @property
    def last(self) -> DecoderLayer:
        """The last layer."""
        layer = self.layers[-1]
        assert isinstance(layer, DecoderLayer)
        return layer

    def begin(
        self, ids: torch.Tensor, positions: torch.Tensor, attention: AttentionBackend
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All up to and with the last layer's attention: (attended, residual)."""
        x = self.embed_tokens(ids)
        cos, sin = self.rotary_emb(positions, x.dtype)
        step = StepContext(attention, cos, sin)
        residual = torch.zeros_like(x)
        for layer in self.layers[:-1]:
            x, residual = layer(x, residual, step)
        return self.last.attend(x, residual, step)

    def finish(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The rest, of any rows of `begin`; `residual` is overwritten."""
        return self.norm.add(*self.last.feed(attended, residual))[0]


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
        """Of the layer with that number, from 0."""
        return Attention(config, layer)

    @staticmethod
    def make_mlp(config: ModelConfig, layer: int) -> MLP | SparseMLP:
        """The same, of its feed-forward block."""
        return MLP(config)

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionBackend,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """ids, positions: [tokens] int64. wanted: rows of them whose hidden states are asked for, int64; None: all.

        Returns the final hidden states, [wanted, hidden], in the model's dtype. Of a prompt only the last token's are
        needed, so that the others are done with the last layer once its keys and values are in the cache: for a model
        of 32 layers that is 3 % of the work.
        """
        return self.finish(*self.begin(ids, positions, attention), wanted)

    def begin(
        self, ids: torch.Tensor, positions: torch.Tensor, attention: AttentionBackend
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward` up to and with the last layer's attention: what it answers, [tokens, heads · head_dim], and the
        residual stream, [tokens, hidden]."""
        return self.model.begin(ids, positions, attention)

    def finish(
        self, attended: torch.Tensor, residual: torch.Tensor, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The rest of `forward`. Without `wanted` the residual stream is overwritten."""
        if wanted is not None:
            if not len(wanted):
                return residual[:0]
            attended, residual = attended.index_select(0, wanted), residual.index_select(0, wanted)
        return self.model.finish(attended, residual)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [rows, hidden], the rows whose next token is wanted. Returns [rows, vocab] float32."""
        logits: torch.Tensor = self.lm_head(hidden)
        return logits.float()
