"""The Llama network as it is trained: the parameters and arithmetic of transformers' LlamaForCausalLM, packed rows.

Rows hold several dialogues; a token attends to earlier tokens of its own dialogue only. Positions run through the row:
rotary attention depends on distances alone, so a dialogue at the row's end computes what it would at position 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def config_dict(
    vocab: int, hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, mlp: int
) -> dict[str, Any]:
    """The arguments of transformers' LlamaConfig."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": mlp,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


class Block(nn.Module):
    """One layer; submodules are named as in transformers, so that the state dict is the checkpoint."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = (
            c["num_attention_heads"],
            c["num_key_value_heads"],
            c["head_dim"],
        )
        hidden, mlp = c["hidden_size"], c["intermediate_size"]
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(hidden, self.heads * self.dim, bias=False),
                "k_proj": nn.Linear(hidden, self.kv_heads * self.dim, bias=False),
                "v_proj": nn.Linear(hidden, self.kv_heads * self.dim, bias=False),
                "o_proj": nn.Linear(self.heads * self.dim, hidden, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(hidden, mlp, bias=False),
                "up_proj": nn.Linear(hidden, mlp, bias=False),
                "down_proj": nn.Linear(mlp, hidden, bias=False),
            }
        )
        self.input_layernorm = nn.RMSNorm(hidden, eps=c["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=c["rms_norm_eps"])

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: BlockMask | torch.Tensor
    ) -> torch.Tensor:
        batch, length, _ = x.shape
        h = self.input_layernorm(x)
        q = self.self_attn["q_proj"](h).view(batch, length, self.heads, self.dim).transpose(1, 2)
        k = self.self_attn["k_proj"](h).view(batch, length, self.kv_heads, self.dim).transpose(1, 2)
        v = self.self_attn["v_proj"](h).view(batch, length, self.kv_heads, self.dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        if isinstance(mask, BlockMask):
            a = flex_attention(q, k, v, block_mask=mask)
        else:  # a CPU: spelt out this takes half as long as scaled_dot_product_attention (bf16, rows of 256 tokens)
            a = (q * self.dim**-0.5 @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v
        x = x + self.self_attn["o_proj"](a.transpose(1, 2).reshape(batch, length, -1))
        h = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](h)) * self.mlp["up_proj"](h))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding, halves as transformers orders them; x is [batch, heads, length, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-b, a), dim=-1) * sin.to(x.dtype)


class Network(nn.Module):
    """LlamaForCausalLM, and in training a head halfway up that reads which subject a value carries (`carry.py`)."""

    def __init__(self, c: dict[str, Any], carry: bool = False) -> None:
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Block(c) for _ in range(c["num_hidden_layers"]))
        self.norm = nn.RMSNorm(c["hidden_size"], eps=c["rms_norm_eps"])
        self.halfway = c["num_hidden_layers"] // 2
        self.carry = nn.Linear(c["hidden_size"], 2 * c["hidden_size"], bias=False) if carry else None
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 if "embed" in name else p.shape[1] ** -0.5)
                if name.endswith(("o_proj.weight", "down_proj.weight", "carry.weight")):
                    nn.init.zeros_(p)

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        mask: BlockMask | torch.Tensor,
        places: torch.Tensor,
        subjects: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean weighted cross entropy (nats); of every position, whether the likeliest token is the target; carry loss.

        The last is the mean cross entropy of `subjects` [n, 2] (0 where there is none), read halfway up at the flat
        `places` [n]; 0 without the head.

        A position without weight counts as not right on a CPU, where its logits are not worked out.
        """
        c = self.config
        position = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)
        frequency = 10000.0 ** (
            -torch.arange(0, c["head_dim"], 2, device=tokens.device, dtype=torch.float32) / c["head_dim"]
        )
        angle = torch.outer(position, frequency).repeat(1, 2)
        cos, sin = angle.cos(), angle.sin()
        x = self.embed_tokens(tokens)
        carry = torch.zeros((), device=tokens.device)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask)
            if self.carry is not None and i + 1 == self.halfway:
                read = self.carry(F.rms_norm(x.flatten(0, 1)[places], (c["hidden_size"],)))
                read = read.view(-1, c["hidden_size"])  # a row for each of the two tokens
                read = F.linear(read, self.embed_tokens.weight.detach()).float()
                total = F.cross_entropy(read, subjects.flatten(), ignore_index=0, reduction="sum")
                carry = total / (subjects > 0).sum().clamp(min=1)
        x, y, w = x.flatten(0, 1), targets.flatten(), weights.flatten()
        if not x.is_cuda:
            (kept,) = w.nonzero(as_tuple=True)
            x, y, w = x[kept], y[kept], w[kept]
        logits = F.linear(self.norm(x), self.embed_tokens.weight).float()
        losses = F.cross_entropy(logits, y, reduction="none")
        right = logits.argmax(-1) == y
        if not x.is_cuda:
            right = torch.zeros(targets.numel(), dtype=torch.bool).index_copy(0, kept, right)
        return (losses * w).sum() / w.sum(), right.view_as(targets), carry

    def checkpoint(self) -> dict[str, torch.Tensor]:
        """The weights under the names of LlamaForCausalLM, bf16; the output head is tied and neither it nor the carry
        head is stored."""
        kept = {k: v for k, v in self.state_dict().items() if not k.startswith("carry")}
        return {f"model.{k}": v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in kept.items()}


def dense_mask(segments: torch.Tensor) -> torch.Tensor:
    """bool [batch, 1, length, length]: causal, and within one dialogue."""
    length = segments.shape[1]
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same & torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()


def block_mask(segments: torch.Tensor) -> BlockMask:
    """The same for flex_attention, which skips blocks that hold nothing."""

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q >= k) & (segments[b, q] == segments[b, k])

    rows, length = segments.shape
    return create_block_mask(visible, rows, None, length, length, device=segments.device)
