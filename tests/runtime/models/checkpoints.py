"""Small random checkpoints of every supported architecture, prompts for them, and transformers' answers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

BASE = dict(
    vocab_size=211,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    # Large enough that greedy margins are far above rounding, and answers differ from position to position.
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
MIXTRAL = dict(num_local_experts=5, num_experts_per_tok=2, sliding_window=None)
QWEN3_MOE = dict(head_dim=16, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=40)
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = dict(rope_type="yarn", factor=4.0)

# name -> (config class, what differs from BASE)
VARIANTS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama-tied": (LlamaConfig, dict(tie_word_embeddings=True)),
    "llama-biases": (LlamaConfig, dict(attention_bias=True, mlp_bias=True)),
    "llama-7-heads-per-kv-head": (LlamaConfig, dict(hidden_size=112, num_attention_heads=7, num_key_value_heads=1)),
    "llama-no-sharing": (LlamaConfig, dict(num_key_value_heads=4)),
    "llama-head-64": (LlamaConfig, dict(hidden_size=128, num_attention_heads=4, head_dim=64)),
    "llama-head-128": (LlamaConfig, dict(num_attention_heads=2, num_key_value_heads=1, head_dim=128)),
    "llama-rope-linear": (
        LlamaConfig,
        dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=10000.0)),
    ),
    "llama-rope-llama3": (
        LlamaConfig,
        dict(rope_parameters=dict(LLAMA3, original_max_position_embeddings=64, rope_theta=500000.0)),
    ),
    "llama-rope-yarn": (
        LlamaConfig,
        dict(rope_parameters=dict(YARN, original_max_position_embeddings=64, rope_theta=10000.0)),
    ),
    "mistral": (MistralConfig, dict(sliding_window=None)),
    # Windows shorter than most prompts of the tests, one of them shorter than a block.
    "mistral-window": (MistralConfig, dict(sliding_window=11)),
    "mistral-window-of-3": (MistralConfig, dict(sliding_window=3)),
    "mistral-window-7-heads": (
        MistralConfig,
        dict(sliding_window=8, hidden_size=112, num_attention_heads=7, num_key_value_heads=1),
    ),
    "qwen2": (Qwen2Config, {}),
    "qwen2-tied": (Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen2-upper-layers-windowed": (Qwen2Config, dict(use_sliding_window=True, sliding_window=9, max_window_layers=1)),
    "qwen2-yarn-beyond-max-position": (
        Qwen2Config,
        dict(
            max_position_embeddings=32, rope_parameters=dict(YARN, original_max_position_embeddings=32, rope_theta=1e6)
        ),
    ),
    "qwen3": (Qwen3Config, dict(head_dim=32)),
    "qwen3-biases": (Qwen3Config, dict(head_dim=16, attention_bias=True)),
    "qwen3-alternating-windows": (
        Qwen3Config,
        dict(
            head_dim=32,
            use_sliding_window=True,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "mixtral": (MixtralConfig, MIXTRAL),
    "mixtral-tied-window": (MixtralConfig, dict(MIXTRAL, tie_word_embeddings=True, sliding_window=10)),
    "mixtral-every-expert": (MixtralConfig, dict(MIXTRAL, num_experts_per_tok=5)),
    "qwen3-moe": (Qwen3MoeConfig, QWEN3_MOE),
    "qwen3-moe-normalized": (Qwen3MoeConfig, dict(QWEN3_MOE, norm_topk_prob=True, num_experts_per_tok=1)),
    "qwen3-moe-second-layers": (Qwen3MoeConfig, dict(QWEN3_MOE, norm_topk_prob=True, decoder_sparse_step=2)),
    "qwen3-moe-dense-first": (Qwen3MoeConfig, dict(QWEN3_MOE, mlp_only_layers=[0], attention_bias=True)),
    "qwen3-moe-window": (Qwen3MoeConfig, dict(QWEN3_MOE, use_sliding_window=True, sliding_window=10)),
}


def make_checkpoint(folder: Path, variant: str = "llama", **changes: Any) -> Any:
    """Save a random model of `variant` in `folder` and return transformers' own, in float32 and eval mode."""
    cls, differences = VARIANTS[variant]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(cls(**{**BASE, **differences, **changes}), dtype=torch.float32)
    with torch.no_grad():  # transformers makes biases zero and norms one, which would hide a swapped or missing one
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model.eval()


def prompts_of(lengths: list[int], seed: int = 3) -> list[list[int]]:
    """Random prompts of these lengths."""
    rng = random.Random(seed)
    return [_tokens(rng, length) for length in lengths]


def prompts_that_share(page: int, count: int) -> list[list[int]]:
    """Random prompts, each with none to all of the same five blocks before up to six of its own."""
    rng = random.Random(5)
    shared = _tokens(rng, 5 * page)
    return [shared[: page * rng.randrange(6)] + _tokens(rng, rng.randrange(1, 25 * page // 4)) for _ in range(count)]


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(BASE["vocab_size"]) for _ in range(count)]


def generate(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """transformers' greedy continuation of a prompt, alone."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens
        )
    return out[0, len(prompt) :].tolist()


def logprobs(model: Any, tokens: list[int]) -> torch.Tensor:
    """[len(tokens), vocab]: row i judges the token after tokens[i]."""
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].log_softmax(-1)
