"""Sends calls of a state before their turn, while the call that they go on from is still being answered.

What a program appends it does not wait for: its next texts and calls are often there while an answer is being written,
those of its forks too. Such a call is sent at once and names the one that it goes on from; the engine begins it in the
step after that one's last token. Only calls without a promise: the time that a promise leaves is known at their turn.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections import deque
from typing import TYPE_CHECKING

from superinfer.errors import SuperinferError
from superinfer.lang import calls
from superinfer.lang.ir import Gen, Tools
from superinfer.lang.prompt import NO_PROMPT
from superinfer.lang.report import CallWatch
from superinfer.lang.steps import Append, Ask, Fork, Say, Step
from superinfer.lang.written import Look, SentCall, can_be_extended, new_mark, say

if TYPE_CHECKING:
    from superinfer.lang.executor import StreamExecutor
    from superinfer.lang.run import Run

logger = logging.getLogger(__name__)


def group_of(fork: Fork, run: Run) -> str:
    """The name that the first calls of siblings share; "" for an only child."""
    return f"{run.id}/{'/'.join(fork.children[0].path)}" if len(fork.children) > 1 else ""


class CallsAhead:
    """The calls of one state that were sent before their turn, on the language's loop."""

    def __init__(self, executor: StreamExecutor) -> None:
        self._executor: StreamExecutor = weakref.proxy(executor)  # whose part this is, and no circle with it
        self._sent: deque[SentCall] = deque()
        self._look: Look | None = None  # None: nothing can be sent ahead just now
        self._looked = 0  # steps at the front of the state's that were looked at

    def take(self, step: Step) -> SentCall | None:
        """The call of this step if it was sent, whose turn it is now."""
        if self._sent and self._sent[0].step is step:
            return self._sent.popleft()
        self._look = None
        return None

    def follow(self, call: SentCall) -> None:
        """A call is being answered: see what goes on from it."""
        if self._look is None and not self._sent and call.mark:
            outline = self._executor.written.outline.copy() if self._executor.written is not None else None
            if outline is not None:
                outline.add(call.mark)
                self._look = Look(outline, call.text + call.mark, call.begun.request_id)
                self._looked = 1
        self.look()

    def begin(self) -> None:
        """The state begins, its parent's calls are answered: what was not sent by now is sent at its turn."""
        if not self._sent:
            self._look = None

    def popped(self) -> None:
        """The first step is done."""
        self._looked = max(0, self._looked - 1)
        if not self._sent:
            self._look = None

    def close(self) -> None:
        """The state has failed: nobody will read these."""
        self._look = None
        while self._sent:
            self._sent.pop().begun.close()

    def look(self) -> None:
        """Send what can be sent of the steps that there are by now."""
        steps = self._executor.steps
        try:
            while self._look is not None and self._looked < len(steps):
                if not self._pass(steps[self._looked], self._look):
                    self._look = None
                self._looked += 1
        except SuperinferError as error:  # will be raised when the step is executed
            logger.debug("nothing is sent ahead: %s", error)
            self._look = None

    def _pass(self, step: Say | Step | Ask | Fork | Append, look: Look) -> bool:
        """Whether what comes behind the step can be looked at too."""
        match step:
            case Say(exprs=exprs):
                return all(not isinstance(expr, Tools) and say(look.outline, expr) for expr in exprs)
            case Ask():
                return True
            case Fork(children=children):
                for child in children:
                    child.ahead._look, child.ahead._looked = look.copy(group_of(step, self._executor.run)), 0
                    child.ahead.look()
                return True
            case Step(expr=Gen()):
                return self._send(step, look)
            case _:
                return False

    def _send(self, step: Step, look: Look) -> bool:
        executor, gen = self._executor, step.expr
        assert isinstance(gen, Gen)
        run, promises = executor.run, step.promises
        sampling = gen.sampling.over(run.sampling)
        rest = look.rest()
        if gen.slo is not None or promises.slo is not None or promises.due < math.inf or rest is None:
            return False
        shown = run.backend.keeps_answers or look.outline.is_plain
        if gen.reasoning is not None or run.stream or executor.error is not None or not shown:
            return False
        sent = executor.plan_ahead(step, look.group, sum(call.step.expr.name == gen.name for call in self._sent))
        context = calls.Context(
            run.backend, NO_PROMPT, sent.slo, run.program_id, CallWatch(gen.name or "gen", executor.path, None),
            sent.hints, run.slo_class, None, step.variable.feed.is_read,
        )  # fmt: skip
        prompt = run.backend.encode(rest, special=False) if rest else []
        begun = run.backend.begin(calls.request_of(context, gen, sampling, prompt, look.request_id))
        mark = new_mark() if can_be_extended(gen, sampling) else ""
        self._sent.append(SentCall(step, begun, look.text + rest, mark, extends=True))
        look.group, look.request_id = "", begun.request_id
        look.outline.add(mark)
        look.text += rest + mark
        return bool(mark)
