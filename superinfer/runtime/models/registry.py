"""Architecture name in config.json -> model class."""

from __future__ import annotations

from superinfer.runtime.models.decoder import CausalLM
from superinfer.runtime.models.llama import LlamaForCausalLM
from superinfer.runtime.models.mixtral import MixtralForCausalLM
from superinfer.runtime.models.qwen2 import Qwen2ForCausalLM
from superinfer.runtime.models.qwen3 import Qwen3ForCausalLM
from superinfer.runtime.models.qwen3_moe import Qwen3MoeForCausalLM

MODELS: dict[str, type[CausalLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": LlamaForCausalLM,
    "MixtralForCausalLM": MixtralForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "Qwen3MoeForCausalLM": Qwen3MoeForCausalLM,
}


def model_class(architecture: str) -> type[CausalLM]:
    """The class for a name that `load_config` let pass."""
    return MODELS[architecture]
