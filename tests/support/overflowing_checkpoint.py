"""A chat checkpoint of finite weights that compute NaN behind one token, and only there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from chat_checkpoint import write_checkpoint

SPOILS = "~"  # the character whose token it is


def write_overflowing_checkpoint(folder: Path, **changes: Any) -> Path:
    """A small Llama whose tokens are characters. Channel 0 of the hidden states is 0 for every token but SPOILS, and
    what the first layer makes of it is beyond any float: the next layer's keys and values are NaN from there on.

    changes: to the config.
    """
    from transformers import AutoConfig, LlamaForCausalLM
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    write_checkpoint(folder)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    config.update({"initializer_range": 0.2, **changes})
    model = LlamaForCausalLM(config)
    spoils = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(SPOILS)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0.0
        model.model.embed_tokens.weight[spoils, 0] = 100.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        model.model.layers[0].mlp.up_proj.weight[:, 0] = 3e38
    model.save_pretrained(folder)
    return folder
