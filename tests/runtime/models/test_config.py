"""config.json is read as transformers reads it, and without it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from checkpoints import BASE, VARIANTS
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from superinfer.errors import ModelLoadError, UnsupportedError
from superinfer.runtime.models.config import FIELDS, load_config
from superinfer.runtime.models.registry import MODELS

SIZES = dict(vocab_size=211, hidden_size=256, intermediate_size=96, num_hidden_layers=3, num_attention_heads=32)
MODEL_TYPES = {
    "LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3_moe",
}  # fmt: skip


def write(folder, architecture="LlamaForCausalLM", **values):
    stated = SIZES | {"architectures": [architecture], "model_type": MODEL_TYPES.get(architecture)} | values
    (folder / "config.json").write_text(json.dumps(stated))
    return folder


def hf_frequencies(hf, head_dim: int) -> tuple[list[float], float]:
    if hf.rope_parameters["rope_type"] == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return (1.0 / hf.rope_parameters["rope_theta"] ** exponents).tolist(), 1.0
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[hf.rope_parameters["rope_type"]](hf, torch.device("cpu"))
    return inv_freq.tolist(), scaling


def assert_read_as_by_transformers(folder) -> None:
    """Every value that a model's code uses, to the bit."""
    ours, hf = load_config(folder), AutoConfig.from_pretrained(folder)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "rms_norm_eps", "initializer_range",
                 "tie_word_embeddings"):  # fmt: skip
        assert getattr(ours, name) == getattr(hf, name), name
    assert (ours.num_layers, ours.num_heads) == (hf.num_hidden_layers, hf.num_attention_heads)
    assert ours.num_kv_heads == (hf.num_key_value_heads or hf.num_attention_heads)
    assert ours.head_dim == (getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads)
    assert ours.attention_bias == getattr(hf, "attention_bias", False)
    assert ours.mlp_bias == getattr(hf, "mlp_bias", False)
    assert ours.dtype == (hf.dtype or torch.float32)
    eos = hf.eos_token_id
    assert ours.eos_token_ids == (() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))
    assert (list(ours.rope.inv_freq), ours.rope.scaling) == hf_frequencies(hf, ours.head_dim)
    window = None if ours.architecture == "LlamaForCausalLM" else hf.sliding_window
    if window is not None and window >= ours.max_length:
        window = None
    kinds = getattr(hf, "layer_types", None) or ["sliding_attention"] * hf.num_hidden_layers
    assert ours.windows == tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if (mixture := ours.moe) is not None:
        assert (mixture.num_experts, mixture.experts_per_token) == (hf.num_experts, hf.num_experts_per_tok)
        assert mixture.intermediate_size == getattr(hf, "moe_intermediate_size", hf.intermediate_size)
        assert mixture.normalize == getattr(hf, "norm_topk_prob", True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_that_transformers_wrote_is_read_as_transformers_reads_it(tmp_path, variant):
    cls, differences = VARIANTS[variant]
    config = cls(**{**BASE, **differences})
    config.architectures = [next(name for name, kind in MODEL_TYPES.items() if kind == config.model_type)]
    config.save_pretrained(tmp_path)
    assert_read_as_by_transformers(tmp_path)


@pytest.mark.parametrize("architecture", FIELDS)
def test_what_a_config_leaves_out_is_what_transformers_takes_for_it(tmp_path, architecture):
    assert_read_as_by_transformers(write(tmp_path, architecture))
    assert_read_as_by_transformers(write(tmp_path, architecture, use_sliding_window=True, sliding_window=7))


@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    "parameters",
    [
        dict(rope_type="linear", factor=3.0),
        dict(type="linear", factor=2),  # as transformers before 4.43 wrote it
        dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
             original_max_position_embeddings=8192),
        dict(rope_type="llama3", factor=32.0, low_freq_factor=1.5, high_freq_factor=6.0),
        dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768),
        dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=4096, truncate=False, beta_fast=24.0),
        dict(rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=0.8),
        dict(rope_type="yarn", factor=2.5, original_max_position_embeddings=4096, attention_factor=1.25, beta_slow=2.0),
        dict(rope_type="yarn", factor=1.0, original_max_position_embeddings=131072),
    ],
)  # fmt: skip
def test_frequencies_are_those_of_transformers_to_the_bit(tmp_path, parameters, form):
    for theta, head_dim in ((10000.0, 16), (500000.0, 128), (1000000, 96)):
        values = dict(head_dim=head_dim, rope_theta=theta, max_position_embeddings=131072)
        assert_read_as_by_transformers(write(tmp_path, **values, **{form: parameters}))


@pytest.mark.parametrize(
    "scaling,length",
    [
        (None, 4096),
        (dict(type="linear", factor=4.0), 16384),  # lmsys/vicuna-7b-v1.5-16k
        (dict(type="yarn", factor=4.0, original_max_position_embeddings=2048), 8192),
        (dict(type="yarn", factor=4.0), 16384),  # as Qwen2.5's cards say to add it
        (dict(type="yarn", factor=2.0, original_max_position_embeddings=2048), 4096),  # already counted in
        (dict(rope_type="yarn", original_max_position_embeddings=1024), 4096),
        (dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=512), 4096),
    ],
)  # fmt: skip
def test_stretched_positions_reach_further_than_those_the_model_was_trained_for(tmp_path, scaling, length):
    config = load_config(write(tmp_path, "MistralForCausalLM", max_position_embeddings=4096, rope_scaling=scaling))
    assert config.max_length == length
    assert set(config.windows) == {4096 if length > 4096 else None}  # of Mistral by default: no limit, or now one


def test_a_mixture_may_name_its_experts_either_way(tmp_path):
    for architecture in ("MixtralForCausalLM", "Qwen3MoeForCausalLM"):
        for name in ("num_experts", "num_local_experts"):
            folder = write(tmp_path, architecture, num_experts_per_tok=2, **{name: 12})
            assert load_config(folder).moe.num_experts == 12
            assert_read_as_by_transformers(folder)


@pytest.mark.parametrize(
    "dtype,expected",
    [
        (dict(dtype="bfloat16"), torch.bfloat16),
        (dict(torch_dtype="float16"), torch.float16),
        (dict(dtype="float32", torch_dtype="float16"), torch.float32),
        ({}, torch.float32),
    ],
)
def test_the_type_of_weights_has_an_old_and_a_new_name(tmp_path, dtype, expected):
    assert load_config(write(tmp_path, **dtype)).dtype == expected


@pytest.mark.parametrize(
    "values,match",
    [
        (dict(hidden_size="wide"), r"not a valid LlamaForCausalLM config: Expected `int`, got `str`.*hidden_size"),
        (dict(hidden_size=None), "hidden_size"),
        (dict(num_attention_heads=0), "Expected `int` >= 1.*num_attention_heads"),
        (dict(num_attention_heads=5), "hidden_size=256 is not a multiple of num_attention_heads=5"),
        (dict(head_dim=7), "head_dim=7 must be even"),
        (dict(model_type="mistral"), "Invalid value 'mistral'.*model_type"),
        (dict(dtype="int8"), "dtype='int8' is no type of weights"),
        (dict(dtype="nonsense"), "dtype='nonsense' is no type of weights"),
        (dict(dtype="float8_e4m3fn"), "dtype='float8_e4m3fn' is no type of weights"),
        (dict(rope_theta=0), "rope_theta=0 must be above 1"),
        (dict(rope_scaling=dict(rope_type="linear")), "rope_type='linear' needs 'factor'"),
        (dict(rope_scaling=dict(rope_type="linear", factor=0)), "rope_type='linear' needs a 'factor' above 0, not 0"),
        (dict(rope_scaling=dict(rope_type="yarn", factor="4")), "Expected `float"),
        (
            dict(rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=4.0, high_freq_factor=1.0)),
            "high_freq_factor=1 above low_freq_factor=4",
        ),
    ],
)
def test_what_cannot_be_is_named(tmp_path, values, match):
    with pytest.raises(ModelLoadError, match=match):
        load_config(write(tmp_path, **values))


def test_a_size_that_is_missing_is_named(tmp_path):
    folder = write(tmp_path)
    values = json.loads((folder / "config.json").read_text())
    del values["vocab_size"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelLoadError, match="missing required field `vocab_size`"):
        load_config(folder)


@pytest.mark.parametrize("architecture", [name for name in FIELDS if name != "LlamaForCausalLM"])
def test_layers_that_layer_types_names_are_limited_and_no_others(tmp_path, architecture):
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    values = dict(use_sliding_window=True, sliding_window=7, layer_types=kinds, num_experts=4, num_experts_per_tok=2)
    assert load_config(write(tmp_path, architecture, **values)).windows == (None, 7, None)


def test_layer_types_must_name_every_layer(tmp_path):
    values = dict(use_sliding_window=True, sliding_window=7, layer_types=["sliding_attention"] * 2)
    with pytest.raises(ModelLoadError, match="layer_types names 2 layers, and num_hidden_layers=3"):
        load_config(write(tmp_path, "Qwen3ForCausalLM", **values))


def test_frequencies_by_kind_of_layer_are_refused_by_name(tmp_path):
    nested = {"full_attention": dict(rope_type="default", rope_theta=1e6)}
    with pytest.raises(UnsupportedError, match=r"by kind of layer \(full_attention\)"):
        load_config(write(tmp_path, rope_parameters=nested))


@pytest.mark.parametrize(
    "values,files,match",
    [
        (
            dict(quantization_config=dict(quant_method="gptq", bits=4)),
            [],
            "quantized by gptq.*has 'quantization_config'",
        ),
        (
            dict(compression_config=dict(quant_method="compressed-tensors")),
            [],
            "by compressed-tensors are not supported",
        ),
        (dict(quantization=dict(group_size=64, bits=4)), [], "by a method of its own.*has 'quantization'"),
        ({}, ["quantize_config.json"], r"quantize_config\.json says so.*or remove the file"),
        ({}, ["hf_quant_config.json"], r"take the model's unquantized weights"),
    ],
)
def test_quantized_checkpoints_are_refused_by_what_says_so(tmp_path, values, files, match):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UnsupportedError, match=match):
        load_config(write(tmp_path, **values))


@pytest.mark.parametrize(
    "file,match",
    [
        ("adapter_config.json", "holds a LoRA adapter.*merge_and_unload"),
        ("model-q4_k_m.gguf", "GGUF files are not read; take the checkpoint in safetensors"),
        ("params.json", "its maker's own format; take the checkpoint in Hugging Face's"),
        ("README.md", "is not a Hugging Face checkpoint"),
    ],
)
def test_a_folder_of_another_kind_is_told_what_it_is(tmp_path, file, match):
    (tmp_path / file).write_text("{}")
    with pytest.raises(ModelLoadError, match=rf"config\.json does not exist; .*{match}"):
        load_config(tmp_path)


def test_a_damaged_generation_config_is_named(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(ModelLoadError, match=r"generation_config\.json is not valid.*eos_token_id"):
        load_config(write(tmp_path))


def test_every_architecture_that_is_read_has_its_model():
    assert set(FIELDS) == set(MODELS)


def test_a_model_is_loaded_without_transformers():
    """Its config classes would take as long to import as all the rest of an engine's start."""
    code = """
import sys
from superinfer.runtime.config import EngineConfig
import superinfer.runtime.engine.__main__
from superinfer.runtime.engine.model_executor import build_executor
build_executor(EngineConfig(device="cpu", threads=1), lambda label, fraction: None)
print(*sorted({"transformers", "xgrammar", "fastapi", "openai", "aiohttp", "sympy"} & sys.modules.keys()))
"""
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert loaded.stdout.split() == []
