"""How a model's authors want it sampled where a request does not say: what its generation_config.json states."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from superinfer.errors import InvalidRequestError, ModelLoadError
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.server.schema import Common

R = TypeVar("R", bound=Common)


class ModelDefaults(msgspec.Struct, frozen=True):
    """Those that vLLM takes from the file too; None where it says nothing, which leaves OpenAI's. top_k: -1 is off."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def fill(self, request: R) -> R:
        """The request, with what it leaves out."""
        missing = {name: value for name, value in self.stated().items() if getattr(request, name) is None}
        return msgspec.structs.replace(request, **missing) if missing else request

    def stated(self) -> dict[str, Any]:
        """What is not None."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}


def model_defaults(folder: Path) -> ModelDefaults:
    """Of the checkpoint in `folder`. Raises ModelLoadError for values that no request could have."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return ModelDefaults()
    try:
        defaults = msgspec.json.decode(file.read_bytes(), type=ModelDefaults)
        SamplingParams(**defaults.stated() | ({"top_k": 0} if defaults.top_k == -1 else {}))
    except (OSError, msgspec.DecodeError, InvalidRequestError) as error:
        raise ModelLoadError(f"{file} cannot be used: {error}; mend it, or give --sampling-defaults openai") from error
    return defaults
