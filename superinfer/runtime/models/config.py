"""What a model's code needs of its checkpoint's config.json, whichever generation of transformers wrote it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from superinfer.errors import ModelLoadError, UnsupportedError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """inv_freq: head_dim / 2 inverse frequencies in radians per position; scaling: factor on cos and sin (YaRN)."""

    inv_freq: tuple[float, ...]
    scaling: float


@dataclass(frozen=True)
class MoEConfig:
    """The experts of a mixture. intermediate_size: of one expert. normalize: a token's weights are scaled to sum to 1.
    layers: those that have experts; the others have a plain feed-forward layer."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    normalize: bool
    layers: frozenset[int]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a Llama-like decoder.

    windows: by layer, how many tokens a position attends to, itself included; None: all before it.
    dtype: the checkpoint's own.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    windows: tuple[int | None, ...]
    moe: MoEConfig | None
    initializer_range: float
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype

    @property
    def kv_row(self) -> int:
        """Numbers in one token's key (or value) of one layer."""
        return self.num_kv_heads * self.head_dim

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes one token's keys and values take over all layers."""
        return self.num_layers * 2 * self.kv_row * dtype.itemsize


def read_architecture(path: Path) -> str:
    """The architecture a checkpoint folder names, before anything else of it is believed. Raises ModelLoadError."""
    config = _read_json(path / "config.json")
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ModelLoadError(f'{path / "config.json"} names no "architectures"; is this a causal language model?')
    return names[0]


def load_config(path: Path) -> ModelConfig:
    """Read `path`/config.json (and generation_config.json for the eos ids).

    Raises ModelLoadError (missing, malformed or inconsistent) or UnsupportedError (a feature not implemented).
    """
    from transformers import AutoConfig  # slow to import: only where a checkpoint is read

    architecture = read_architecture(path)
    try:
        hf = AutoConfig.from_pretrained(path, local_files_only=True)
        return _from_transformers(architecture, hf, _eos_token_ids(path, hf))
    except (ModelLoadError, UnsupportedError):
        raise
    except Exception as error:  # transformers validates with many exception types
        raise ModelLoadError(f"{path / 'config.json'} is not a valid {architecture} config: {error}") from error


def _from_transformers(architecture: str, hf: Any, eos_token_ids: tuple[int, ...]) -> ModelConfig:
    if quantization := getattr(hf, "quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedError(f"weights quantized by {method} are not supported; take the model's unquantized weights")
    if hf.hidden_act != "silu":
        raise UnsupportedError(f"hidden_act={hf.hidden_act!r} is not supported; only 'silu' is")
    heads, kv_heads = hf.num_attention_heads, hf.num_key_value_heads or hf.num_attention_heads
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // heads
    if heads % kv_heads:
        raise ModelLoadError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
    return ModelConfig(
        architecture=architecture,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=hf.max_position_embeddings,
        rms_norm_eps=hf.rms_norm_eps,
        rope=_rope(hf, head_dim),
        tie_word_embeddings=bool(hf.tie_word_embeddings),
        attention_bias=bool(getattr(hf, "attention_bias", False)),
        mlp_bias=bool(getattr(hf, "mlp_bias", False)),
        windows=_windows(architecture, hf),
        moe=_moe(architecture, hf),
        initializer_range=hf.initializer_range,
        eos_token_ids=eos_token_ids,
        dtype=hf.dtype if isinstance(hf.dtype, torch.dtype) else torch.float32,
    )


def _rope(hf: Any, head_dim: int) -> RopeConfig:
    """Inverse frequencies by transformers' own functions: AutoConfig has turned the old form into the new one."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = hf.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise UnsupportedError(f"rope_type={kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError(
            f"partial_rotary_factor={parameters['partial_rotary_factor']} is not supported; only 1 is"
        )
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return RopeConfig(tuple((1.0 / parameters["rope_theta"] ** exponents).tolist()), 1.0)
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](hf, torch.device("cpu"))
    return RopeConfig(tuple(inv_freq.tolist()), float(scaling))


def _windows(architecture: str, hf: Any) -> tuple[int | None, ...]:
    """Which layers look back how far. Mistral, Mixtral and Qwen3-MoE limit every layer once sliding_window is set;
    Qwen2 and Qwen3 name the limited ones in layer_types, which transformers makes of max_window_layers where absent."""
    unlimited = (None,) * hf.num_hidden_layers
    window = getattr(hf, "sliding_window", None) if getattr(hf, "use_sliding_window", True) else None
    if window is None or architecture == "LlamaForCausalLM":  # Llama has none, whatever its config says
        return unlimited
    if window < 1:
        raise ModelLoadError(f"sliding_window={window} must be at least 1, or null for none")
    if window >= hf.max_position_embeddings:  # reaches back to the first token from everywhere
        return unlimited
    if architecture not in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        return (window,) * hf.num_hidden_layers
    kinds = {"sliding_attention": window, "full_attention": None}
    if unknown := set(hf.layer_types) - set(kinds):
        raise UnsupportedError(f"layer_types has {sorted(unknown)}; only {', '.join(kinds)} are supported")
    return tuple(kinds[kind] for kind in hf.layer_types)


def _moe(architecture: str, hf: Any) -> MoEConfig | None:
    """The mixture of a Mixtral or Qwen3-MoE config; None for all other models."""
    layers = range(hf.num_hidden_layers)
    if architecture == "MixtralForCausalLM":
        experts, intermediate, normalize = hf.num_local_experts, hf.intermediate_size, True
        sparse = frozenset(layers)
    elif architecture == "Qwen3MoeForCausalLM":
        experts, intermediate, normalize = hf.num_experts, hf.moe_intermediate_size, bool(hf.norm_topk_prob)
        if hf.decoder_sparse_step < 1:
            raise ModelLoadError(f"decoder_sparse_step={hf.decoder_sparse_step} must be at least 1")
        dense = set(hf.mlp_only_layers or ())
        sparse = frozenset(i for i in layers if i not in dense and experts and (i + 1) % hf.decoder_sparse_step == 0)
    else:
        return None
    if sparse and not 1 <= hf.num_experts_per_tok <= experts:
        raise ModelLoadError(f"num_experts_per_tok={hf.num_experts_per_tok} is not within 1..{experts} experts")
    return MoEConfig(experts, hf.num_experts_per_tok, intermediate, normalize, sparse)


def _eos_token_ids(path: Path, hf: Any) -> tuple[int, ...]:
    """generation_config.json, where present, knows of end-of-turn ids that config.json does not."""
    eos = hf.eos_token_id
    generation = path / "generation_config.json"
    if generation.is_file():
        eos = _read_json(generation).get("eos_token_id", eos)
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelLoadError(f"{path} does not exist; the folder is not a Hugging Face checkpoint") from error
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value
