"""What turns a StepPlan into a StepResult. `model_executor` does it on a CPU, `cuda_executor` on a GPU."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Protocol

from superinfer.runtime.engine.grammar import GrammarCompiler
from superinfer.runtime.kv.copies import Copies, LinkUse
from superinfer.runtime.kv.link_profile import LinkProfile
from superinfer.runtime.scheduler.plan import StepPlan, StepResult


class ExecutorLimits(NamedTuple):
    """What the scheduler may use. Block ids are 0 .. num_blocks - 1, slots 0 .. num_slots - 1.

    max_model_len: tokens of prompt and output together, bounded by the model's context and by the KV pool.
    """

    num_blocks: int
    page_size: int
    num_slots: int
    max_model_len: int
    vocab_size: int


class TierLimits(NamedTuple):
    """The second tier. Its block ids are 0 .. num_blocks - 1. block_bytes: of one block, all layers.

    link: what is known of the link between the tiers; None where nothing is.
    """

    num_blocks: int
    block_bytes: int
    link: LinkProfile | None = None


class Duplex(Protocol):
    """The body of the second tier, as an executor uses it: docs/duplexkv.md says what it guarantees."""

    def start(self, copies: Copies, wanted: Collection[int] = (), *, hold: bool = False) -> None:
        """Begin a plan's copies; call before its work, after that of the plans before it. wanted: what it waits for.
        hold: those that no `wait` asks for may begin with `release` only, when the work has been given to the device.
        """

    def release(self) -> None:
        """See `start`."""

    def wait(self, ids: Collection[int]) -> None:
        """The work that follows comes after all of `ids`."""

    def report(self) -> tuple[list[int], list[int], LinkUse]:
        """Ids copied and ids failed that no report has had, and the link's seconds since the last one."""
        ...

    def close(self) -> None:
        """Returns when all copies are over."""


class Executor(Protocol):
    """Runs steps in the order given. `collect` returns results in that order.

    depth: how many steps may be submitted and not yet collected. tier: None where plans bring no copies.
    waited_s: how long `submit` has waited for the device by now, all calls together.
    grammars: compiles what requests constrain their output by, before they are planned.
    """

    limits: ExecutorLimits
    tier: TierLimits | None
    depth: int
    waited_s: float
    grammars: GrammarCompiler

    @property
    def busy(self) -> bool:
        """Whether it has work that is not done."""
        ...

    def submit(self, plan: StepPlan) -> None:
        """Begin a step, and with a second tier its copies, in the order that docs/duplexkv.md says.

        It may return before the step has run, so that the next plan can be made meanwhile. An error is the end of that
        step alone.
        """

    def collect(self) -> StepResult:
        """The result of the earliest step that was submitted and not collected; waits for it.

        An error is the end of that step alone.
        """
        ...

    def close(self) -> None:
        """Give up memory and threads; nothing is submitted afterwards."""
