"""Checkpoints without weights: a config of a published model's sizes, for engines that make random ones."""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from superinfer.embedded import model_path
from superinfer.errors import InvalidRequestError
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.sim.shapes import ModelShape, shape_of

_COMMON = {
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Sizes and constants of each model's published config.json.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    },
    "qwen2.5-32b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 5120,
        "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40, "num_key_value_heads": 8,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    },
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}  # fmt: skip


def write_shape(name: str, folder: Path, layers: int | None = None, *, tokenizer: bool = False) -> Path:
    """A folder with the config of CONFIGS[name], of `layers` layers where given; with `tokenizer`, one of its size too,
    for servers and programs that speak text."""
    config = _COMMON | CONFIGS[name]
    if layers is not None:
        config["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:
        write_tokenizer(folder, CONFIGS[name]["vocab_size"])
    return folder


def write_tokenizer(folder: Path, vocab_size: int) -> Path:
    """Write tokenizer.json and tokenizer_config.json of exactly `vocab_size` tokens, with a chat template, to `folder`.

    The embedded model's byte-level BPE, which knows English and JSON, and after it made-up words (`filler_words`), each
    one token with its space in front. So every id has a text, and what random weights write has, read again as part of
    a prompt, as many tokens as it was written with, but for the few ids of the embedded model. Ids 0, 1 and 2 are the
    padding, the beginning and the end (eos) of a message, as `write_shape` says. transformers 4 and 5 load it.

    Raises InvalidRequestError for a vocabulary smaller than the embedded model's.
    """
    known = json.loads((model_path() / "tokenizer.json").read_text())
    vocab: dict[str, int] = known["model"]["vocab"]
    taken = max(vocab.values()) + 1
    known["added_tokens"] = [token for token in known["added_tokens"] if token["id"] < taken]
    if vocab_size < taken:
        raise InvalidRequestError(f"vocab_size={vocab_size} must be at least {taken}")
    words = itertools.islice((word for word in filler_words() if word not in vocab), vocab_size - taken)
    vocab.update({word: taken + at for at, word in enumerate(words)})
    known["model"]["ignore_merges"] = True  # a whole word that the vocabulary has is that token, without merges
    (folder / "tokenizer.json").write_text(json.dumps(known))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": (model_path() / "chat_template.jinja").read_text(),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def filler_words() -> Iterator[str]:
    """Words of five letters behind their space, as a byte-level vocabulary spells it: 200,000 different ones."""
    vowels, others = "aeiou", "bcdfghjklmnpqrstvwxz"
    for letters in itertools.product(others, vowels, others, vowels, others):
        yield "Ġ" + "".join(letters)


@contextlib.contextmanager
def engine_of_shape(
    config: EngineConfig, layers: int | None, *, tokenizer: bool = False
) -> Iterator[tuple[EngineConfig, ModelShape]]:
    """Settings of the engine to measure, and its model's shape. A model named in CONFIGS gets random weights.

    layers: of such a model, fewer than it has, where memory asks for it. tokenizer: give it one, for text and grammars.
    Raises InvalidRequestError.
    """
    if layers is not None and config.model not in CONFIGS:
        raise InvalidRequestError(f"--layers is for {', '.join(CONFIGS)}, not for model {config.model!r}")
    if layers is not None and layers < 1:
        raise InvalidRequestError(f"layers={layers} must be at least 1")
    if config.model not in CONFIGS:
        yield config, shape_of(config.model)
        return
    with tempfile.TemporaryDirectory(prefix="superinfer-shape-") as folder:
        path = write_shape(config.model, Path(folder), layers, tokenizer=tokenizer)
        shape = shape_of(config.model)
        shape = shape._replace(layers=layers if layers is not None else shape.layers)
        yield msgspec.structs.replace(config, model=str(path), load_format="dummy"), shape
