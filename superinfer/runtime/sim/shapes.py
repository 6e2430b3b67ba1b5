"""Model shapes: what a step reads and computes, from the figures of each model's published config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from superinfer.errors import InvalidRequestError


class ModelShape(NamedTuple):
    """The sizes of a decoder. experts, active_experts: feed-forward blocks in each layer, and used by one token.

    dtype_bytes: of weights and of the KV cache. tied: the embedding table is the output projection.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    experts: int = 1
    active_experts: int = 1
    dtype_bytes: int = 2
    tied: bool = False

    @property
    def attention_params(self) -> int:
        """Parameters of one layer's query, key, value and output projections."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def expert_params(self) -> int:
        """Parameters of one feed-forward block (gate, up, down)."""
        return 3 * self.hidden * self.intermediate

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        tables = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.dtype_bytes * (
            self.layers * (self.attention_params + self.experts * self.expert_params) + tables
        )  # fmt: skip

    @property
    def flops_per_token(self) -> int:
        """FLOP of the matmuls for one token, two for each weight it uses; without attention.

        The output projection is counted for every token, though a prefill needs it once: 7 % for Llama-3-8B.
        """
        active = self.attention_params + self.active_experts * self.expert_params
        return 2 * (self.layers * active + self.vocab * self.hidden)

    @property
    def flops_per_pair(self) -> int:
        """FLOP of attention between one position and one it attends to."""
        return 4 * self.layers * self.heads * self.head_dim

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one position, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype_bytes

    def read_bytes(self, tokens: float = 1.0) -> float:
        """Weight bytes that a step over `tokens` tokens reads; the embedding table is looked up, not read.

        Of a mixture, each expert is read if any token picks it: with uniform routing, 1 - (1 - active/experts)^tokens.
        """
        read = self.experts * (1.0 - (1.0 - self.active_experts / self.experts) ** tokens)
        params = self.layers * (self.attention_params + read * self.expert_params) + self.vocab * self.hidden
        return self.dtype_bytes * params


SHAPES = {
    shape.name: shape
    for shape in (
        # config.json of meta-llama/Meta-Llama-3-8B
        ModelShape("llama-3-8b", 32, 4096, 32, 8, 128, 14336, 128256),
        # config.json of Qwen/Qwen2.5-32B
        ModelShape("qwen2.5-32b", 64, 5120, 40, 8, 128, 27648, 152064),
        # config.json of mistralai/Mixtral-8x7B-v0.1
        ModelShape("mixtral-8x7b", 32, 4096, 32, 8, 128, 14336, 32000, experts=8, active_experts=2),
    )
}


def shape_of(model: str) -> ModelShape:
    """The shape of a name in SHAPES, of "embedded", or of a folder with a Hugging Face checkpoint.

    Raises InvalidRequestError when it is none of these, or its config lacks a size.
    """
    if model in SHAPES:
        return SHAPES[model]
    choose = f"give --model one of {', '.join(SHAPES)}, embedded, or the folder of a checkpoint"
    if not model:  # as a path it would be the working directory
        raise InvalidRequestError(f"model={model!r} names no model; {choose}")
    folder = _embedded_path() if model == "embedded" else Path(model)
    path = folder / "config.json"
    if not folder.is_dir():
        raise InvalidRequestError(f"model {model!r} has no shape here, and is no folder; {choose}")
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise InvalidRequestError(f"model {model!r}: {path} cannot be read ({error.strerror}); {choose}") from None
    except ValueError as error:
        raise InvalidRequestError(f"model {model!r}: {path} is no JSON ({error}); {choose}") from None
    if not isinstance(config, dict):
        raise InvalidRequestError(f"model {model!r}: {path} is no JSON object; {choose}")
    return _from_config(model, config)


def _embedded_path() -> Path:
    from superinfer.embedded import model_path

    return Path(model_path())


def _from_config(name: str, config: dict[str, Any]) -> ModelShape:
    """The shape in a config of transformers."""
    try:
        heads = config["num_attention_heads"]
        return ModelShape(
            name,
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads", heads),
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate=config.get("moe_intermediate_size") or config["intermediate_size"],
            vocab=config["vocab_size"],
            experts=config.get("num_local_experts") or config.get("num_experts") or 1,
            active_experts=config.get("num_experts_per_tok") or 1,
            dtype_bytes=4 if "float32" in (config.get("dtype"), config.get("torch_dtype")) else 2,
            tied=config.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise InvalidRequestError(f"the config of model {name!r} has no {error}; give another model") from None
