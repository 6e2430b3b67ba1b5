"""Every message on the wire: the one schema the engine and its clients import.

A message is one ZMQ frame holding one msgpack map whose `type` key is the class name. Clients own a DEALER socket, the
engine a ROUTER. A client opens with `Hello`; the engine answers `Welcome` or `Refused`. Versions are equal or the
engine refuses: there is no negotiation. See docs/protocol.md.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

from superinfer.errors import InvalidRequestError, ProtocolError
from superinfer.runtime.sampling_params import Grammar as Grammar
from superinfer.runtime.sampling_params import SamplingParams as SamplingParams
from superinfer.runtime.sampling_params import check_float
from superinfer.runtime.slo import SLO

PROTOCOL_VERSION = 5

FinishReason = Literal["stop", "length", "deadline", "cancelled", "scored"]
LiveState = Literal["waiting", "computing", "rotated", "loading"]

MAX_LIVE = 1000  # sequences in one LiveReport: 100 kB


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type", tag=True):
    """Base of all wire messages."""


# ---------------------------------------------------------------------------- client to engine


class Hello(Message, frozen=True, kw_only=True):
    """Opens a connection. `client` is a name for the engine's log."""

    version: int
    client: str = ""


class Hints(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a caller knows of a request beyond its prompt. The scheduler may use it; outputs never depend on it.

    group: requests made together, with a common prefix: siblings of a fork, choices of a `select`.
    expected_tokens: how long outputs of this call have been; above 0.
    keep_s: a later request will extend this one's tokens in about so many seconds, at least 0: its KV is worth keeping
        until then, in host memory meanwhile if room is wanted. None: nothing is known.
    rest_tokens, rest_s: of a call of a program: what follows in its program and cannot begin before this has ended. The
        machine time of it, in output tokens, and the seconds it takes at least, behind this one's deadline; at least 0.
        Of what follows several calls each has an equal part of the tokens. With it, the calls of a `program` are kept
        or let go as a whole, and the time that the program has to spare is left to all of its calls.
    spread_s: mean deviation of how long this and what follows take; at least 0.
    follows: an earlier request's `rest_tokens` had this one in it.
    may_go_on: the deadline is that of a whole program, and it is not known what of it will follow this.
    """

    group: str = ""
    expected_tokens: float | None = None
    keep_s: float | None = None
    rest_tokens: float = 0.0
    rest_s: float = 0.0
    spread_s: float = 0.0
    follows: bool = False
    may_go_on: bool = False

    def __post_init__(self) -> None:
        if self.expected_tokens is not None:
            check_float("expected_tokens", self.expected_tokens, 0.0, 1e9, above=True)
        if self.keep_s is not None:
            check_float("keep_s", self.keep_s, 0.0, 1e9)
        for name in ("rest_tokens", "rest_s", "spread_s"):
            check_float(name, getattr(self, name), 0.0, 1e9)


class Generate(Message, frozen=True, kw_only=True):
    """Continue a prompt. `request_id` is unique within the connection.

    prompt: token ids, at least one.
    after: request_id of an unfinished request of this connection, with n = 1, that this one goes on from: it begins
        when that has ended, and `prompt` stands behind that one's prompt and output, but for a token that stopped it.
        Failed("nothing_to_extend") where there is none, or it ends otherwise than by "stop" or "length".
    interval_s: the least time between two deltas of a continuation; what comes meanwhile is in the next. 0: each step's
        tokens at once. inf: all with the last.
    slo: what is left of the promise, as durations from the moment the engine receives this, or begins it.
    slo_class: a name under which attainment is counted; "": counted under "default".
    cache_salt: prefixes are shared only between equal salts.
    program: identifier shared by the calls of one program run; a hint for the scheduler.
    """

    request_id: str
    prompt: list[int]
    sampling: SamplingParams = SamplingParams()
    slo: SLO | None = None
    slo_class: str = ""
    cache_salt: str = ""
    program: str = ""
    hints: Hints | None = None
    after: str = ""
    interval_s: float = 0.0

    def __post_init__(self) -> None:
        if (
            isinstance(self.interval_s, bool)
            or not isinstance(self.interval_s, (int, float))
            or not self.interval_s >= 0
        ):
            raise InvalidRequestError(f"interval_s={self.interval_s!r} must be a number of seconds, at least 0")


class Score(Message, frozen=True, kw_only=True):
    """Log probability of each given token from position `start` (>= 1) on, given all before it. Generates none.

    top: of the most likely tokens at each of these positions, so many come too; 0 to 20.
    """

    request_id: str
    prompt: list[int]
    start: int
    top: int = 0
    slo: SLO | None = None
    slo_class: str = ""
    cache_salt: str = ""
    program: str = ""
    hints: Hints | None = None


class Cancel(Message, frozen=True, kw_only=True):
    """Stop a request, or only its continuation `index`, within one step.

    Each stopped continuation answers with a last delta, finish_reason "cancelled". Unknown or finished ids are ignored.
    """

    request_id: str
    index: int | None = None


class GetHealth(Message, frozen=True, kw_only=True):
    """Ask for a HealthReport; `token` comes back in it."""

    token: int = 0


class GetStats(Message, frozen=True, kw_only=True):
    """Ask for a StatsReport; `token` comes back in it."""

    token: int = 0


class GetLive(Message, frozen=True, kw_only=True):
    """Ask for a LiveReport of at most `limit` unfinished sequences, 0 to 1,000; `token` comes back in it."""

    token: int = 0
    limit: int = 200

    def __post_init__(self) -> None:
        if not 0 <= self.limit <= MAX_LIVE:
            raise InvalidRequestError(f"limit={self.limit} must be at least 0 and at most {MAX_LIVE}")


class Shutdown(Message, frozen=True, kw_only=True):
    """Ask the engine to end: unfinished requests fail with a clear error, then the process exits."""


# ---------------------------------------------------------------------------- engine to client


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a client must know of the engine's model and limits.

    path: folder of the checkpoint, from which the client loads the tokenizer.
    max_model_len: prompt and output together, tokens; already bounded by the KV pool.
    """

    model: str
    path: str
    architecture: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    device: str
    page_size: int
    num_blocks: int
    policy: str
    pid: int


class Welcome(Message, frozen=True, kw_only=True):
    """Answer to a Hello of the same version."""

    version: int
    info: ModelInfo


class Refused(Message, frozen=True, kw_only=True):
    """Answer to a Hello the engine will not serve."""

    version: int
    reason: str


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural log probability of a token, and the most likely (token id, logprob) pairs at its position.

    Of the model's distribution, before temperature, penalties and truncation.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []


class RequestReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one sequence went, seen from the engine. Times in seconds since arrival at the engine: the earliest moment at
    which it may have come, for between two steps it may have waited to be read.

    Six figures are a stage each and sum to e2e_s:
    queue_s: arrival until first scheduled. prefill_s: computing up to the first token. decode_s: computing after it.
    rotated_s: with its KV in the second tier, where it went `rotations` times. copy_wait_s: in a slot, waiting for
    copies. preempted_s: without KV after one of `preemptions`; computing it anew is prefill or decode.
    met is None where nothing was promised; `why` names the stage that cost most when late (slo.why_late), or
    "overload" where it was degraded: taken without its promise, which could not be kept when it came.
    """

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float
    e2e_s: float
    ttft_s: float | None = None
    max_tbt_s: float = 0.0
    preempted_s: float = 0.0
    preemptions: int = 0
    rotations: int = 0
    rotated_s: float = 0.0
    copy_wait_s: float = 0.0
    met: bool | None = None
    ttft_met: bool | None = None
    tbt_met: bool | None = None
    deadline_met: bool | None = None
    lateness_s: float | None = None
    why: str = ""
    degraded: bool = False


class SequenceDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """New tokens of continuation `index` of a request. The last delta carries finish_reason and report.

    logprobs: parallel to token_ids where asked for. For a Score: the scored tokens of the prompt.
    """

    request_id: str
    index: int = 0
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    report: RequestReport | None = None


class Deltas(Message, frozen=True, kw_only=True):
    """All of one step's new tokens for one client. Empty ones are sent to learn whether the client is there."""

    deltas: list[SequenceDelta]


class Failed(Message, frozen=True, kw_only=True):
    """The request (or, without an id, the message) was refused or lost. `code` as in superinfer.errors.

    retry_after_s: when it is worth another try, where that is known.
    """

    code: str
    message: str
    request_id: str | None = None
    retry_after_s: float | None = None


class HealthReport(Message, frozen=True, kw_only=True):
    """The engine's own view. `idle_s`: since the loop last turned."""

    token: int
    status: Literal["ok", "stopping"]
    uptime_s: float
    running: int
    waiting: int
    idle_s: float


class TierStats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The DRAM tier of the KV cache: gauges of now, counters since start.

    dram_blocks, dram_free, dram_pinned: blocks; pinned ones belong to rotated-out sequences. copies_pending: under way.
    bytes_in, bytes_out: moved to and from HBM. gbps_*: 10^9 bytes/s while the link was busy.
    both_s: busy both ways at once. stall_s: steps waited for copies. overlap: share of the busy time that no step
        waited for, 0..1.
    mirrored: blocks copied out in the background. mirror_hit_rate: share of rotated blocks mirrored before.
    blocks_left_clean: left HBM without a copy of their own. blocks_forgotten: left it for good.
    dram_hits: blocks of cached prefixes loaded rather than computed. copies_failed: blocks.
    """

    dram_blocks: int
    dram_free: int
    dram_pinned: int
    copies_pending: int = 0
    rotations_out: int = 0
    rotations_in: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    gbps_in: float = 0.0
    gbps_out: float = 0.0
    both_s: float = 0.0
    stall_s: float = 0.0
    overlap: float = 0.0
    mirrored: int = 0
    mirror_hit_rate: float = 0.0
    blocks_left_clean: int = 0
    blocks_forgotten: int = 0
    dram_hits: int = 0
    copies_failed: int = 0


class ClassStats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one SLO class's sequences, since start.

    requests: ended, or refused. met, missed: whole promises, of those that ended and had one. ttft_met: first tokens in
    time. refused: on arrival, for overload; degraded: taken without their promise for it, and ended. expired: ended at
    their deadline (`on_miss` other than "finish").
    """

    requests: int = 0
    met: int = 0
    missed: int = 0
    ttft_met: int = 0
    refused: int = 0
    degraded: int = 0
    expired: int = 0


class StatsReport(Message, frozen=True, kw_only=True):
    """Counters since start, and gauges of now. tiers: None without a DRAM tier.

    classes: by slo_class; "default" for requests that name none.
    cost_error_p50, cost_error_p90: of the last steps' predicted times, |predicted - took| / took.
    prefill_tokens: computed from known tokens, those computed again after a preemption included.
    not_finite: of the failed, sequences whose own logits were no numbers.
    """

    token: int
    steps: int
    running: int
    waiting: int
    finished: int
    cancelled: int
    failed: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    slo_met: int
    slo_missed: int
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    step_s_mean: float
    schedule_s_mean: float
    tiers: TierStats | None = None
    classes: dict[str, ClassStats] = {}
    cost_error_p50: float = 0.0
    cost_error_p90: float = 0.0
    prefill_tokens: int = 0
    not_finite: int = 0


class LiveRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One unfinished sequence as it is now.

    id: the engine's own, unique among all clients. max_tokens: the most it may generate.
    state: waiting without KV; computing: in a slot; rotated: its KV is in the second tier; loading: on its way back.
    slack_s: until its next token is due, negative when late; None where no token is promised. age_s: since arrival.
    """

    id: int
    request_id: str
    index: int = 0
    state: LiveState
    prompt_tokens: int
    output_tokens: int = 0
    max_tokens: int = 0
    slo_class: str = ""
    slack_s: float | None = None
    age_s: float
    program: str = ""


class LiveReport(Message, frozen=True, kw_only=True):
    """The engine's unfinished sequences: how many in each state, and some of them, `omitted` others left out.

    Each state has its share of `requests`: of each client's, in the order of clients, the oldest.
    """

    token: int
    requests: list[LiveRequest]
    omitted: int
    waiting: int = 0
    computing: int = 0
    rotated: int = 0
    loading: int = 0


class Stopping(Message, frozen=True, kw_only=True):
    """Last message of an engine that ends on purpose."""

    reason: str


ToEngine = Hello | Generate | Score | Cancel | GetHealth | GetStats | GetLive | Shutdown
ToClient = Welcome | Refused | Deltas | Failed | HealthReport | StatsReport | LiveReport | Stopping

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_to_client = msgspec.msgpack.Decoder(ToClient)
_loose = msgspec.msgpack.Decoder()


def encode(message: Message) -> bytes:
    """One frame."""
    return _encoder.encode(message)


def decode_to_engine(frame: bytes) -> ToEngine:
    """Raises ProtocolError (unknown or truncated message) or InvalidRequestError (a field's value is wrong)."""
    return _decode(_to_engine, frame)


def decode_to_client(frame: bytes) -> ToClient:
    """Raises ProtocolError."""
    return _decode(_to_client, frame)


def request_id_of(frame: bytes) -> str | None:
    """The request id in a frame that could not be decoded in full, to answer the right request."""
    try:
        loose = _loose.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    found = loose.get("request_id") if isinstance(loose, dict) else None
    return found if isinstance(found, str) else None


def _decode(decoder: msgspec.msgpack.Decoder[T], frame: bytes) -> T:
    try:
        return decoder.decode(frame)
    except msgspec.ValidationError as error:
        if request_id_of(frame) is not None:
            raise InvalidRequestError(str(error)) from error
        raise ProtocolError(f"message is not of protocol {PROTOCOL_VERSION}: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"message of {len(frame)} bytes cannot be decoded: {error}") from error
