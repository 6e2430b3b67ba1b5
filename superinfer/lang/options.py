"""How to run a program: the arguments that `run` and its siblings take besides the program's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from superinfer.lang.backend import Backend
from superinfer.lang.promise import check_deadline, check_slo
from superinfer.lang.sampling import NO_SAMPLING, Sampling
from superinfer.runtime.slo import SLO

# As SGLang's frontend names them; `max_new_tokens` is `max_tokens` of gen().
SAMPLING_OPTIONS = (
    "max_new_tokens", "stop", "stop_token_ids", "temperature", "top_p", "top_k", "min_p", "frequency_penalty",
    "presence_penalty", "ignore_eos", "return_logprob", "logprob_start_len", "top_logprobs_num",
    "return_text_in_logprobs", "stop_regex",
)  # fmt: skip
# use_thread is taken for SGLang's sake and changes nothing: a program is never made to wait for its calls here.
RUN_OPTIONS = (*SAMPLING_OPTIONS, "backend", "deadline", "slo", "plan", "stream", "use_thread")


@dataclass(frozen=True)
class RunOptions:
    """How to run a program. `deadline`: seconds from the start of each run; `slo`: what its calls inherit.
    `plan`: split the deadline among its calls by what was learnt."""

    sampling: Sampling = NO_SAMPLING
    backend: Backend | None = None
    deadline: float | None = None
    slo: SLO | None = None
    plan: bool = True

    @classmethod
    def take(cls, arguments: dict[str, Any]) -> RunOptions:
        """Take the options out of `arguments`; the program's own stay."""
        arguments.pop("use_thread", None)
        given = {name: arguments.pop(name) for name in SAMPLING_OPTIONS if name in arguments}
        if "max_new_tokens" in given:
            given["max_tokens"] = given.pop("max_new_tokens")
        return cls(
            Sampling(**given) if given else NO_SAMPLING,
            arguments.pop("backend", None),
            check_deadline(arguments.pop("deadline", None)),
            check_slo(arguments.pop("slo", None)),
            bool(arguments.pop("plan", True)),
        )
