"""What a model's code needs of its checkpoint's config.json, whichever generation of transformers wrote it.

Read without transformers, whose config classes take three seconds to import: every engine starts by reading one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import torch

from superinfer.errors import CheckpointNotFoundError, ModelLoadError, UnsupportedError
from superinfer.runtime.models.rope import RopeConfig, read_rope

F = TypeVar("F")
Count = Annotated[int, msgspec.Meta(ge=1)]


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

    max_length: the longest sequence that its positions are made for, in tokens.
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
    max_length: int
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


class LlamaFields(msgspec.Struct, kw_only=True, tag_field="model_type", tag="llama"):
    """config.json of a Llama, and what the other architectures' have in common with it.

    Names and defaults are those of transformers' config classes; the sizes, which every checkpoint states, have none.
    """

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None  # None: as many as attention heads
    head_dim: Count | None = None  # None: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: Count = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    eos_token_id: int | list[int] | None = 2
    dtype: str | None = None
    torch_dtype: str | None = None  # transformers 4
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None  # transformers 4, with rope_theta beside it
    rope_theta: float = 10000.0
    partial_rotary_factor: float | None = None
    original_max_position_embeddings: Count | None = None
    use_sliding_window: bool = True
    sliding_window: int | None = None
    max_window_layers: int = 28
    layer_types: list[str] | None = None


class MistralFields(LlamaFields, kw_only=True, tag="mistral"):
    num_key_value_heads: Count | None = 8
    max_position_embeddings: Count = 131072
    sliding_window: int | None = 4096


class MixtralFields(LlamaFields, kw_only=True, tag="mixtral"):
    num_local_experts: Count | None = None  # checkpoints have either name
    num_experts: Count | None = None
    num_key_value_heads: Count | None = 8
    max_position_embeddings: Count = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1000000.0
    num_experts_per_tok: int = 2


class Qwen2Fields(LlamaFields, kw_only=True, tag="qwen2"):
    num_key_value_heads: Count | None = 32
    max_position_embeddings: Count = 32768
    eos_token_id: int | list[int] | None = None
    use_sliding_window: bool = False
    sliding_window: int | None = 4096


class Qwen3Fields(Qwen2Fields, kw_only=True, tag="qwen3"):
    head_dim: Count | None = 128


class Qwen3MoeFields(Qwen2Fields, kw_only=True, tag="qwen3_moe"):
    num_key_value_heads: Count | None = 4
    num_experts: int | None = None  # checkpoints have either name
    num_local_experts: int | None = None
    num_experts_per_tok: int = 8
    moe_intermediate_size: Count = 768
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None


FIELDS: dict[str, type[LlamaFields]] = {
    "LlamaForCausalLM": LlamaFields,
    "MistralForCausalLM": MistralFields,
    "MixtralForCausalLM": MixtralFields,
    "Qwen2ForCausalLM": Qwen2Fields,
    "Qwen3ForCausalLM": Qwen3Fields,
    "Qwen3MoeForCausalLM": Qwen3MoeFields,
}


class GenerationFields(msgspec.Struct):
    """generation_config.json, which knows of end-of-turn ids that config.json does not."""

    eos_token_id: int | list[int] | msgspec.UnsetType | None = msgspec.UNSET


class AddedToken(msgspec.Struct):
    """A token that the tokenizer does not split. id: there in tokenizer.json alone."""

    content: str
    id: int = -1


class TokenizerConfigFields(msgspec.Struct):
    """tokenizer_config.json."""

    eos_token: str | AddedToken | None = None


class TokenizerFields(msgspec.Struct):
    """tokenizer.json; a vocabulary of 150,000 is passed over in 15 ms."""

    added_tokens: list[AddedToken] = []


# Where tools that quantize say so: transformers, compressed-tensors once, MLX; AutoGPTQ, AutoAWQ, ModelOpt.
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


def load_config(path: Path) -> ModelConfig:
    """Read `path`/config.json (and generation_config.json and the tokenizer's files for the eos ids).

    Raises CheckpointNotFoundError (the folder has none), ModelLoadError (malformed or inconsistent) or UnsupportedError
    (a feature not implemented).
    """
    file = path / "config.json"
    values = _read_json(file)
    names = values.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(architecture := names[0], str):
        raise ModelLoadError(f'{file} names no "architectures"; is this a causal language model?')
    if architecture not in FIELDS:  # before anything else in the file is believed
        raise ModelLoadError(f"architecture {architecture!r} is not supported; supported: {', '.join(sorted(FIELDS))}")
    _check_unquantized(path, values)
    try:
        config = msgspec.convert(values, FIELDS[architecture])
        return _model_config(architecture, config, _eos_token_ids(path, config))
    except msgspec.ValidationError as error:
        raise ModelLoadError(f"{file} is not a valid {architecture} config: {error}") from error


def _check_unquantized(path: Path, values: dict[str, Any]) -> None:
    """Raises UnsupportedError naming the method, or what tells of one."""
    key = next((key for key in QUANTIZATION_KEYS if values.get(key)), None)
    file = next((name for name in QUANTIZATION_FILES if (path / name).is_file()), None)
    if key is None and file is None:
        return
    stated = values[key] if key is not None else None
    method = stated.get("quant_method") if isinstance(stated, dict) else stated
    raise UnsupportedError(
        f"weights quantized by {method or 'a method of its own'} are not supported ({path / (file or 'config.json')}"
        f"{f' has {key!r}' if key is not None else ' says so'}); take the model's unquantized weights, "
        f"or remove {'that' if key is not None else 'the file'} where these are not quantized"
    )


def _model_config(architecture: str, fields: LlamaFields, eos_token_ids: tuple[int, ...]) -> ModelConfig:
    if fields.hidden_act != "silu":
        raise UnsupportedError(f"hidden_act={fields.hidden_act!r} is not supported; only 'silu' is")
    heads, kv_heads = fields.num_attention_heads, fields.num_key_value_heads or fields.num_attention_heads
    if heads % kv_heads:
        raise ModelLoadError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
    if fields.head_dim is None and fields.hidden_size % heads:
        raise ModelLoadError(f"hidden_size={fields.hidden_size} is not a multiple of num_attention_heads={heads}")
    head_dim = fields.head_dim or fields.hidden_size // heads
    rope = _rope(fields, head_dim)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.vocab_size,
        hidden_size=fields.hidden_size,
        intermediate_size=fields.intermediate_size,
        num_layers=fields.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_length=rope.positions,
        rms_norm_eps=fields.rms_norm_eps,
        rope=rope,
        tie_word_embeddings=fields.tie_word_embeddings,
        attention_bias=fields.attention_bias,
        mlp_bias=fields.mlp_bias,
        windows=_windows(architecture, fields, rope.positions),
        moe=_moe(fields),
        initializer_range=fields.initializer_range,
        eos_token_ids=eos_token_ids,
        dtype=_dtype(fields.dtype or fields.torch_dtype or "float32"),
    )


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ModelLoadError(f"dtype={name!r} is no type of weights; float32, bfloat16 and float16 are")
    return dtype


def _rope(fields: LlamaFields, head_dim: int) -> RopeConfig:
    """The old form, in which `rope_theta` and others stand beside `rope_scaling`, is read as the new one."""
    parameters = dict(fields.rope_scaling or fields.rope_parameters or {})
    if fields.partial_rotary_factor is not None:
        parameters.setdefault("partial_rotary_factor", fields.partial_rotary_factor)
    if fields.original_max_position_embeddings is not None:
        parameters["original_max_position_embeddings"] = fields.original_max_position_embeddings
    return read_rope(parameters, head_dim, fields.rope_theta, fields.max_position_embeddings)


def _windows(architecture: str, fields: LlamaFields, max_length: int) -> tuple[int | None, ...]:
    """Which layers look back how far: those that layer_types names. Where there is none, Mistral, Mixtral and Qwen3-MoE
    limit every layer once sliding_window is set; Qwen2 and Qwen3 count the unlimited ones in max_window_layers."""
    layers = fields.num_hidden_layers
    unlimited = (None,) * layers
    window = fields.sliding_window if fields.use_sliding_window else None
    if window is None or architecture == "LlamaForCausalLM":  # Llama has none, whatever its config says
        return unlimited
    if window < 1:
        raise ModelLoadError(f"sliding_window={window} must be at least 1, or null for none")
    if window >= max_length:  # reaches back to the first token from everywhere
        return unlimited
    if fields.layer_types is None:
        first = fields.max_window_layers if architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM") else 0
        return tuple(window if layer >= first else None for layer in range(layers))
    kinds = {"sliding_attention": window, "full_attention": None}
    if unknown := set(fields.layer_types) - set(kinds):
        raise UnsupportedError(f"layer_types has {sorted(unknown)}; only {', '.join(kinds)} are supported")
    if len(fields.layer_types) != layers:
        raise ModelLoadError(f"layer_types names {len(fields.layer_types)} layers, and num_hidden_layers={layers}")
    return tuple(kinds[kind] for kind in fields.layer_types)


def _moe(fields: LlamaFields) -> MoEConfig | None:
    """The mixture of a Mixtral or Qwen3-MoE config; None for all other models."""
    layers = range(fields.num_hidden_layers)
    if isinstance(fields, MixtralFields):
        experts, intermediate, normalize = _experts(fields, 8), fields.intermediate_size, True
        sparse = frozenset(layers)
    elif isinstance(fields, Qwen3MoeFields):
        experts, intermediate, normalize = _experts(fields, 128), fields.moe_intermediate_size, fields.norm_topk_prob
        if (step := fields.decoder_sparse_step) < 1:
            raise ModelLoadError(f"decoder_sparse_step={step} must be at least 1")
        dense = set(fields.mlp_only_layers or ())
        sparse = frozenset(i for i in layers if i not in dense and experts and (i + 1) % step == 0)
    else:
        return None
    if sparse and not 1 <= fields.num_experts_per_tok <= experts:
        raise ModelLoadError(f"num_experts_per_tok={fields.num_experts_per_tok} is not within 1..{experts} experts")
    return MoEConfig(experts, fields.num_experts_per_tok, intermediate, normalize, sparse)


def _experts(fields: MixtralFields | Qwen3MoeFields, default: int) -> int:
    stated = (fields.num_experts, fields.num_local_experts)
    return next((number for number in stated if number is not None), default)


def _eos_token_ids(path: Path, fields: LlamaFields) -> tuple[int, ...]:
    """Those of generation_config.json, or else config.json, and the tokenizer's, often all that a fine-tune for
    chats has changed. Ids beyond the vocabulary, which never come, are left out."""
    eos = fields.eos_token_id
    generation = path / "generation_config.json"
    if generation.is_file():
        stated = _read_fields(generation, GenerationFields).eos_token_id
        eos = eos if isinstance(stated, msgspec.UnsetType) else stated
    ids = [] if eos is None else [eos] if isinstance(eos, int) else eos
    found = dict.fromkeys([*ids, *_tokenizer_eos(path)])
    return tuple(token_id for token_id in found if 0 <= token_id < fields.vocab_size)


def _tokenizer_eos(path: Path) -> list[int]:
    """The id of the tokenizer's end-of-text token, where it has one."""
    config, tokenizer = path / "tokenizer_config.json", path / "tokenizer.json"
    if not config.is_file() or not tokenizer.is_file():
        return []
    eos = _read_fields(config, TokenizerConfigFields).eos_token
    added = _read_fields(tokenizer, TokenizerFields).added_tokens
    return [token.id for token in added if token.content == (eos.content if isinstance(eos, AddedToken) else eos)]


def _read_fields(path: Path, fields: type[F]) -> F:
    """Raises ModelLoadError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=fields)
    except (OSError, msgspec.DecodeError) as error:
        raise ModelLoadError(f"{path} is not valid: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"{path} does not exist; {_kind_of_folder(path.parent)}") from error
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value


def _kind_of_folder(path: Path) -> str:
    """What a folder without config.json is, and what to take instead."""
    if (path / "adapter_config.json").is_file():
        return (
            "the folder holds a LoRA adapter, and adapters are not served: merge it into its base model "
            "(PEFT's merge_and_unload, then save_pretrained) and give that folder"
        )
    if next(path.glob("*.gguf"), None) is not None:
        return "GGUF files are not read; take the checkpoint in safetensors that they were made from"
    if (path / "params.json").is_file():
        return "the folder is in its maker's own format; take the checkpoint in Hugging Face's"
    return "the folder is not a Hugging Face checkpoint"
