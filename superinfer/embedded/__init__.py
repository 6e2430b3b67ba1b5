"""The embedded model: a 14 M parameter chat model in Hugging Face format, so that programs run without a download.

`MODEL_CARD.md` says what it can do and how well, `tools/embedded_model` how it is made.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["model_path"]


def model_path() -> Path:
    """The folder to give to `AutoModelForCausalLM.from_pretrained` or to an engine; 29 MB, read only."""
    return Path(__file__).parent
