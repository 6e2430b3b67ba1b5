"""What the state of a program has still to do, in order: the queue between who submits and who executes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from superinfer.lang.ir import Expr, Gen, Select, VarScopeBegin
from superinfer.lang.outcome import Outcome
from superinfer.lang.promise import Promises
from superinfer.lang.variable import Variable

if TYPE_CHECKING:
    from superinfer.lang.executor import StreamExecutor


class Say(NamedTuple):
    """Expressions to execute that make no call and fill no variable."""

    exprs: tuple[Expr, ...]


class Step(NamedTuple):
    """An expression to execute, the variable it fills, and what held where it was appended."""

    expr: Gen | Select | VarScopeBegin
    variable: Variable
    promises: Promises
    seen: frozenset[int]  # calls whose outcome the program knew when it appended this


class Ask(NamedTuple):
    """Compute something from the state when its turn comes, even after a failure."""

    compute: Callable[[], Any]
    answer: Outcome[Any]


class Fork(NamedTuple):
    """Let children begin from here."""

    children: tuple[StreamExecutor, ...]


class Append(NamedTuple):
    """Append what children, all of them idle, have said since they were forked."""

    children: tuple[StreamExecutor, ...]


@dataclass(frozen=True)
class OpenScope:
    """A variable scope that has begun: where in the text, and what it will fill."""

    name: str
    start: int
    variable: Variable
