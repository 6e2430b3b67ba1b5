"""Expressions: what `s += ...` appends. Immutable; one expression may be appended to many states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from superinfer.errors import InvalidRequestError
from superinfer.lang.choices import ChoicesSamplingMethod
from superinfer.lang.reasoning import Reasoning
from superinfer.lang.sampling import Sampling
from superinfer.lang.typed import REGEX_BOOL as REGEX_BOOL
from superinfer.lang.typed import REGEX_FLOAT as REGEX_FLOAT
from superinfer.lang.typed import REGEX_INT as REGEX_INT
from superinfer.lang.typed import REGEX_STR as REGEX_STR
from superinfer.lang.typed import Reader
from superinfer.lang.unknown import as_text
from superinfer.runtime.protocol import Grammar
from superinfer.runtime.slo import SLO

Number = Literal["int", "float"]


class Expr:
    """Base of all expressions. `+` joins two, or one and a text."""

    def __add__(self, other: object) -> Expr:
        return ExprList((*leaves(self), *leaves(to_expr(other))))

    def __radd__(self, other: object) -> Expr:
        return ExprList((*leaves(to_expr(other)), *leaves(self)))


@dataclass(frozen=True, eq=False)
class ExprList(Expr):
    """Expressions one after the other, none of them a list."""

    exprs: tuple[Expr, ...]


@dataclass(frozen=True, eq=False)
class Text(Expr):
    """Constant text."""

    value: str


@dataclass(frozen=True, eq=False)
class Gen(Expr):
    """One generation.

    number: cut the text after the first number of that kind. grammar: what the text must look like. reader: makes the
    variable's value of the text; None: the text is the value. reasoning: tell it apart.
    """

    name: str | None
    sampling: Sampling
    number: Number | None = None
    slo: SLO | None = None
    grammar: Grammar | None = None
    reader: Reader | None = None
    reasoning: Reasoning | None = None


@dataclass(frozen=True, eq=False)
class Select(Expr):
    """The most likely of `choices`."""

    name: str | None
    choices: tuple[str, ...]
    method: ChoicesSamplingMethod
    slo: SLO | None = None


@dataclass(frozen=True, eq=False)
class RoleBegin(Expr):
    """Opens a message of `role`."""

    role: str


@dataclass(frozen=True, eq=False)
class RoleEnd(Expr):
    """Closes the open message, which must be of `role`."""

    role: str


@dataclass(frozen=True, eq=False)
class VarScopeBegin(Expr):
    """From here on text is also collected in variable `name`."""

    name: str


@dataclass(frozen=True, eq=False)
class VarScopeEnd(Expr):
    """Ends the innermost scope, which must be `name`."""

    name: str


@dataclass(frozen=True, eq=False)
class Tools(Expr):
    """The tools that the chat template shows the model, as JSON schemas; replaces those set before."""

    schemas: tuple[dict[str, Any], ...]


def to_expr(value: object) -> Expr:
    """Raises InvalidRequestError for what is neither text nor an expression."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, str):
        return Text(as_text(value))
    raise InvalidRequestError(f"cannot append {value!r:.80} ({type(value).__name__}); give text or an expression")


def leaves(expr: Expr) -> tuple[Expr, ...]:
    """The expressions that it consists of, in order."""
    return expr.exprs if isinstance(expr, ExprList) else (expr,)
