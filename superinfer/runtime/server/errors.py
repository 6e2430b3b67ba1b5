"""OpenAI-shaped errors: `{"error": {"message", "type", "param", "code"}}` with the HTTP status that fits."""

from __future__ import annotations

import logging
import math
import re

import msgspec
from starlette.responses import Response

from superinfer.errors import (
    DeadlineMissedError,
    EngineUnavailableError,
    InvalidRequestError,
    OverloadedError,
    QueueFullError,
    RequestCancelledError,
    SuperinferError,
)

log = logging.getLogger(__name__)

_STATUS: tuple[tuple[type[SuperinferError], int, str], ...] = (
    (InvalidRequestError, 400, "invalid_request_error"),
    (QueueFullError, 429, "rate_limit_error"),
    (OverloadedError, 503, "server_error"),
    (DeadlineMissedError, 504, "timeout_error"),
    (EngineUnavailableError, 503, "server_error"),
    (RequestCancelledError, 503, "server_error"),
)

STOPPING = "the server is stopping; send the request again, to another one or later"


class ErrorBody(msgspec.Struct, frozen=True):
    """The inside of an OpenAI error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(msgspec.Struct, frozen=True):
    """The whole JSON of an OpenAI error."""

    error: ErrorBody


class ApiError(Exception):
    """An answer that is an error. `param`: the request's field at fault. `code`: a name a program can test for."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(message, type, param, code)
        self.headers = headers or {}

    def encode(self) -> bytes:
        """The JSON body."""
        return msgspec.json.encode(ErrorAnswer(self.body))

    def response(self) -> Response:
        """The HTTP answer."""
        return Response(self.encode(), self.status, self.headers, media_type="application/json")


def bad_request(message: str, *, param: str | None = None, code: str | None = "invalid_request") -> ApiError:
    """A 400."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of any exception. The unexpected ones are logged with their traceback and not shown."""
    if isinstance(error, ApiError):
        return error
    for cls, status, kind in _STATUS:
        if isinstance(error, cls):
            param = _named_param(str(error), status)
            return ApiError(status, str(error), type=kind, code=error.code, param=param, headers=_retry(error))
    if isinstance(error, UnicodeEncodeError):  # a lone surrogate, which JSON can spell and UTF-8 cannot
        return bad_request(f"the request holds text that is not valid Unicode: {error.reason}; send whole characters")
    log.error("unexpected error while answering", exc_info=error)
    if isinstance(error, SuperinferError):
        return ApiError(500, str(error), type="server_error", code=error.code)
    return ApiError(500, f"internal error: {type(error).__name__}", type="server_error", code="internal_error")


def _retry(error: SuperinferError) -> dict[str, str]:
    """When another try is worth it, in whole seconds: what the engine said, or 1 for a full queue."""
    if isinstance(error, QueueFullError):
        return {"retry-after": "1"}
    if isinstance(error, OverloadedError):
        return {"retry-after": str(max(1, math.ceil(error.retry_after_s or 1.0)))}
    return {}


def _named_param(message: str, status: int) -> str | None:
    """Messages on arguments open with `name=value`: the name is the OpenAI `param`."""
    named = re.match(r"([a-z_.]+)=", message)
    return named.group(1) if named and status == 400 else None
