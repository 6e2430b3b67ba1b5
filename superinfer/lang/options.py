"""How to run a program: the arguments that `run` and its siblings take besides the program's own."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from superinfer.errors import InvalidRequestError
from superinfer.lang.backend import Backend
from superinfer.lang.conversation import Conversation
from superinfer.lang.promise import check_deadline, check_slo
from superinfer.lang.sampling import NO_SAMPLING, Sampling
from superinfer.runtime.slo import SLO

# As SGLang's frontend names them; `max_new_tokens` is `max_tokens` of gen().
SAMPLING_OPTIONS = (
    "max_new_tokens", "stop", "stop_token_ids", "temperature", "top_p", "top_k", "min_p", "frequency_penalty",
    "presence_penalty", "ignore_eos", "return_logprob", "logprob_start_len", "top_logprobs_num",
    "return_text_in_logprobs", "stop_regex",
)  # fmt: skip
# A program may have an argument of that name, which is then its own: say it in gen() there.
SAMPLING_UNLESS_OWN = ("n", "min_tokens")
# use_thread is taken for SGLang's sake and changes nothing: a program is never made to wait for its calls here.
TAKEN_NAMES = (*SAMPLING_OPTIONS, "backend", "stream", "use_thread")
# What SGLang's frontend does not have: an argument of that name is the program's own, and the option is set elsewhere.
OWN_OPTIONS = ("deadline", "slo", "plan", "session")


@dataclass(frozen=True)
class RunOptions:
    """How to run a program. `deadline`: seconds from the start of each run; `slo`: what its calls inherit.
    `plan`: split the deadline among its calls by what was learnt. `session`: what the run is a turn of."""

    sampling: Sampling = NO_SAMPLING
    backend: Backend | None = None
    deadline: float | None = None
    slo: SLO | None = None
    plan: bool = True
    session: Conversation | None = None

    @classmethod
    def take(cls, arguments: dict[str, Any], own: Collection[str] = ()) -> RunOptions:
        """Take the options out of `arguments`; those that are the program's `own` stay."""
        arguments.pop("use_thread", None)
        ours: dict[str, Any] = {
            name: arguments.pop(name) for name in OWN_OPTIONS if name in arguments and name not in own
        }
        session = ours.get("session")
        if session is not None and not isinstance(session, Conversation):
            raise InvalidRequestError(f"session={session!r:.80} is not a Session")
        sampling = [*SAMPLING_OPTIONS, *(name for name in SAMPLING_UNLESS_OWN if name not in own)]
        given = {name: arguments.pop(name) for name in sampling if name in arguments}
        if "max_new_tokens" in given:
            given["max_tokens"] = given.pop("max_new_tokens")
        return cls(
            Sampling(**given) if given else NO_SAMPLING,
            arguments.pop("backend", None),
            check_deadline(ours.get("deadline")),
            check_slo(ours.get("slo")),
            bool(ours.get("plan", True)),
            session,
        )
