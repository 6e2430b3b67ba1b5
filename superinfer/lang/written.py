"""What of a state an engine has, in tokens, and calls that are sent before their turn.

A call goes on from the very tokens that the model wrote; only what the program said behind them is tokenized. So the
engine finds all of it in its cache, and a call can be sent while the one before it is still being answered: it names
that one and brings what stands behind its answer. Which of the two happens depends on timing; the tokens do not.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from superinfer.lang.ir import Expr, Gen, RoleBegin, RoleEnd, Text, Tools
from superinfer.lang.prompt import Transcript
from superinfer.lang.sampling import Sampling
from superinfer.lang.steps import Step
from superinfer.runtime.text import Begun

_marks = itertools.count()


def new_mark() -> str:
    """Stands for an answer in the text of an outline."""
    return f"\x02answer {next(_marks)}\x03"


def say(transcript: Transcript, expr: Expr) -> bool:
    """Append what a program said. False where it is nothing that is said. Raises InvalidRequestError."""
    match expr:
        case Text(value=value):
            transcript.add(value)
        case RoleBegin(role=role):
            transcript.begin(role)
        case RoleEnd(role=role):
            transcript.end(role)
        case Tools(schemas=schemas):
            transcript.tools = schemas
        case _:
            return False
    return True


def can_be_extended(gen: Gen, sampling: Sampling) -> bool:
    """Whether all that the model writes, and nothing else, becomes the text."""
    cut = sampling.stop_strings or sampling.stop_patterns or gen.number is not None or gen.reasoning is not None
    return (sampling.n or 1) == 1 and not cut


@dataclass
class Written:
    """What an engine has of a state.

    outline: the state's transcript with a mark in place of each answer that is known by its tokens.
    text: the outline's, up to behind the last of these. ids: the tokens of `text`.
    """

    outline: Transcript
    text: str = ""
    ids: Sequence[int] = ()

    def copy(self) -> Written:
        """Equal and independent."""
        return Written(self.outline.copy(), self.text, self.ids)

    def rest(self) -> str | None:
        """What was said behind `text`; None where the template shows that otherwise by now, or nothing is known."""
        whole = self.outline.text()
        return whole[len(self.text) :] if self.text and whole.startswith(self.text) else None

    def answered(self, text: str, mark: str, ids: Sequence[int]) -> None:
        """The model has answered behind `text`. ids: of that, and of the answer."""
        self.outline.add(mark)
        self.text, self.ids = text + mark, ids


@dataclass(frozen=True)
class SentCall:
    """A `gen` that has been sent. extends: the prompt of `begun` stands behind an answer that was not known then.

    text: the outline's, before the answer. mark: of the answer; "" where nothing can go on from it.
    """

    step: Step
    begun: Begun
    text: str
    mark: str
    extends: bool = False


@dataclass
class Look:
    """How far the steps of a state have been looked at that are not to be executed yet.

    outline, text: as in `Written`, as they will be then. request_id: of the call whose answer the last mark stands for.
    group: of the first call, in a fork with siblings.
    """

    outline: Transcript
    text: str
    request_id: str
    group: str = ""

    def copy(self, group: str) -> Look:
        """For a fork."""
        return Look(self.outline.copy(), self.text, self.request_id, group)

    def rest(self) -> str | None:
        """What will have been said behind the answer; None where that cannot be known before it is there."""
        whole = self.outline.text()
        return whole[len(self.text) :] if whole.startswith(self.text) else None
