"""Published configs give models of the published sizes, with a place for every tensor of the published checkpoints.

Figures: config.json and the totals of model.safetensors.index.json in the repositories named.
"""

from __future__ import annotations

import json

import pytest
import torch

from superinfer.runtime.models.config import load_config
from superinfer.runtime.models.loader import checkpoint_targets
from superinfer.runtime.models.registry import model_class

COMMON = dict(hidden_act="silu", rms_norm_eps=1e-5, tie_word_embeddings=False, torch_dtype="bfloat16")
MISTRAL = dict(
    COMMON,
    architectures=["MistralForCausalLM"],
    model_type="mistral",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=32000,
    max_position_embeddings=32768,
    rope_theta=10000.0,
    sliding_window=4096,
)
PUBLISHED = {
    # mistralai/Mistral-7B-v0.1: parameters, tensors, window
    "mistral-7b": (MISTRAL, 7_241_732_096, 291, 4096),
    # mistralai/Mixtral-8x7B-v0.1
    "mixtral-8x7b": (
        dict(
            MISTRAL,
            architectures=["MixtralForCausalLM"],
            model_type="mixtral",
            num_local_experts=8,
            num_experts_per_tok=2,
            rope_theta=1e6,
            sliding_window=None,
        ),
        46_702_792_704,
        995,
        None,
    ),
    # Qwen/Qwen3-30B-A3B
    "qwen3-30b-a3b": (
        dict(
            COMMON,
            architectures=["Qwen3MoeForCausalLM"],
            model_type="qwen3_moe",
            hidden_size=2048,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            vocab_size=151936,
            max_position_embeddings=40960,
            max_window_layers=48,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            rope_theta=1e6,
            sliding_window=None,
            use_sliding_window=False,
        ),
        30_532_122_624,
        18_867,
        None,
    ),
    # Qwen/Qwen2.5-7B
    "qwen2.5-7b": (
        dict(
            COMMON,
            architectures=["Qwen2ForCausalLM"],
            model_type="qwen2",
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
            max_position_embeddings=131072,
            max_window_layers=28,
            rope_theta=1e6,
            sliding_window=131072,
            use_sliding_window=False,
        ),
        7_615_616_512,
        339,
        None,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_the_published_model(tmp_path, name):
    values, parameters, tensors, window = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = load_config(tmp_path)
    with torch.device("meta"):
        model = model_class(config.architecture)(config)
    assert config.dtype == torch.bfloat16 and set(config.windows) == {window}
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len({name for target in checkpoint_targets(model).values() for name in target.fills}) == tensors
