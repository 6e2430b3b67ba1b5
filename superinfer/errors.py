"""Every error superinfer raises on purpose. Each says what was wrong, with which value, and what to do.

`code` is the name an error carries on the wire and in HTTP answers; `error_from_code` turns it back into the class.
`exit_status` is what a command ends with: 2 where an argument is wrong, 1 for all else.
"""

from __future__ import annotations


class SuperinferError(Exception):
    """Base of all errors raised on purpose by superinfer."""

    code = "internal_error"
    exit_status = 1


class InvalidRequestError(SuperinferError, ValueError):
    """The caller's input is wrong: an argument, a prompt, an SLO, a template."""

    code = "invalid_request"
    exit_status = 2


class UnsupportedError(InvalidRequestError):
    """The argument is known, but this backend or model cannot honour it."""

    code = "unsupported"
    exit_status = 1  # the argument is a right one elsewhere


class NothingToExtendError(InvalidRequestError):
    """A request is to go on from another one that is not there any more, or has not ended in a way to go on from."""

    code = "nothing_to_extend"


class ModelLoadError(SuperinferError):
    """A checkpoint, its config or its tokenizer cannot be loaded."""

    code = "model_load_failed"


class CheckpointNotFoundError(ModelLoadError):
    """There is no checkpoint of the name or at the path that was given."""

    code = "checkpoint_not_found"
    exit_status = 2


class OutputError(SuperinferError, ValueError):
    """The model's answer is not of the kind that the program asked for."""

    code = "bad_output"


class NonFiniteError(SuperinferError):
    """The model computed logits that are no numbers (NaN, infinity): there is no next token to choose."""

    code = "non_finite"


class QueueFullError(SuperinferError):
    """The engine holds as many unfinished requests as it is configured to."""

    code = "queue_full"


class OverloadedError(SuperinferError):
    """The request was refused on arrival because its promise cannot be kept under the load there is.

    retry_after_s: seconds after which another try is worth it, or None.
    """

    code = "overloaded"
    retry_after_s: float | None = None


class DeadlineMissedError(SuperinferError):
    """An SLO with `on_miss="raise"` was missed."""

    code = "deadline_missed"


class RequestCancelledError(SuperinferError):
    """The request was cancelled before it finished."""

    code = "cancelled"


class EngineUnavailableError(SuperinferError, ConnectionError):
    """No engine answers at the address, or it stopped answering."""

    code = "engine_unavailable"


class EngineDeadError(EngineUnavailableError):
    """The engine died, or its link broke, while requests were waiting for it."""

    code = "engine_dead"


class ProtocolError(SuperinferError):
    """A wire message is unknown, truncated, or of another protocol version."""

    code = "protocol_error"


def _subclasses(cls: type[SuperinferError]) -> list[type[SuperinferError]]:
    return [cls, *(found for sub in cls.__subclasses__() for found in _subclasses(sub))]


def error_from_code(code: str, message: str) -> SuperinferError:
    """The exception a wire `code` stands for; an unknown code gives the base class."""
    for cls in _subclasses(SuperinferError):
        if cls.code == code:
            return cls(message)
    return SuperinferError(f"{code}: {message}")
