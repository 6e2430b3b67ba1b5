"""The names a program is written with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from superinfer.errors import InvalidRequestError, UnsupportedError
from superinfer.lang.choices import ChoicesSamplingMethod, token_length_normalized
from superinfer.lang.ir import Expr, ExprList, Gen, Number, RoleBegin, RoleEnd, Select, Tools, leaves, to_expr
from superinfer.lang.promise import check_slo
from superinfer.lang.reasoning import Reasoning
from superinfer.lang.sampling import Sampling, sampling_of
from superinfer.lang.tools import tool_schema
from superinfer.lang.typed import Reader, dtype_grammar, json_grammar, regex_grammar
from superinfer.runtime.protocol import Grammar
from superinfer.runtime.slo import SLO

_NUMBERS: dict[object, Number] = {int: "int", "int": "int", float: "float", "float": "float"}


def gen(
    name: str | None = None,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    n: int | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    stop_regex: str | Sequence[str] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    ignore_eos: bool | None = None,
    return_logprob: bool | None = None,
    logprob_start_len: int | None = None,
    top_logprobs_num: int | None = None,
    return_text_in_logprobs: bool | None = None,
    dtype: type | str | None = None,
    choices: Sequence[str] | None = None,
    choices_method: ChoicesSamplingMethod | None = None,
    regex: str | None = None,
    json_schema: str | dict[str, Any] | type | None = None,
    *,
    slo: SLO | None = None,
) -> Expr:
    """Let the model write, and keep it in variable `name` (a list of texts where n > 1).

    What is None is taken from `run`. With `choices` it is `select`. Of these at most one is given:
    regex: the whole output matches it. json_schema: a dict, JSON text, pydantic model or msgspec Struct.
    dtype: int and float end the text after the first number; bool writes True or False; str a quoted string; the
    variable is text in these cases. With a pydantic model or a msgspec Struct the variable is an instance.
    stop_regex: ends the text before the first match, which is searched for as the text grows.
    Raises InvalidRequestError for a wrong value and UnsupportedError for what cannot be honoured.
    """
    arguments: dict[str, Any] = dict(
        max_tokens=max_tokens, min_tokens=min_tokens, n=n, stop=stop, stop_token_ids=stop_token_ids,
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty, ignore_eos=ignore_eos, return_logprob=return_logprob,
        logprob_start_len=logprob_start_len, top_logprobs_num=top_logprobs_num,
        return_text_in_logprobs=return_text_in_logprobs, stop_regex=stop_regex,
    )  # fmt: skip
    said = {name: value for name, value in arguments.items() if value is not None}
    try:
        sampling = sampling_of(**said)
    except TypeError:  # a list somewhere, which cannot be looked up
        sampling = Sampling(**said)
    grammar, reader = _form(regex, json_schema, dtype)
    if choices is None:
        if choices_method is not None:
            raise InvalidRequestError("choices_method is given without choices")
        number = _NUMBERS.get(dtype) if isinstance(dtype, (type, str)) else None
        return Gen(_check_name(name), sampling, number, check_slo(slo), grammar, reader)
    if grammar is not None and dtype not in (str, "str"):
        raise UnsupportedError("gen() with choices only scores them; leave regex, json_schema and dtype out")
    if sampling != Sampling(temperature=temperature):
        given = [field for field, value in vars(sampling).items() if value is not None and field != "temperature"]
        raise UnsupportedError(f"{given[0]}: gen() with choices only scores them; leave {', '.join(given)} out")
    return select(name, choices, temperature or 0.0, choices_method or token_length_normalized, slo=slo)


def _form(regex: str | None, json_schema: object, dtype: object) -> tuple[Grammar | None, Reader | None]:
    given = {"regex": regex, "json_schema": json_schema, "dtype": dtype}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise InvalidRequestError(f"{' and '.join(names)} both say what the output looks like; give one")
    if regex is not None:
        return regex_grammar(regex), None
    if json_schema is not None:
        return json_grammar(json_schema), None
    return dtype_grammar(dtype) if dtype is not None else (None, None)


def gen_int(
    name: str | None = None,
    max_tokens: int | None = None,
    n: int | None = None,
    stop: str | Sequence[str] | None = None,
    **arguments: Any,
) -> Expr:
    """`gen(name, ..., dtype=int)`."""
    return gen(name, max_tokens, n=n, stop=stop, **arguments, dtype=int)


def gen_string(
    name: str | None = None,
    max_tokens: int | None = None,
    n: int | None = None,
    stop: str | Sequence[str] | None = None,
    **arguments: Any,
) -> Expr:
    """`gen(name, ..., dtype=str)`."""
    return gen(name, max_tokens, n=n, stop=stop, **arguments, dtype=str)


def select(
    name: str | None = None,
    choices: Sequence[str] | None = None,
    temperature: float = 0.0,
    choices_method: ChoicesSamplingMethod = token_length_normalized,
    *,
    slo: SLO | None = None,
) -> Expr:
    """Let the model choose one of `choices` by their log probability, and keep it in variable `name`.

    Raises InvalidRequestError for no choices or an empty one, UnsupportedError for a temperature other than 0.
    """
    if isinstance(choices, str) or not choices:
        raise InvalidRequestError(f"choices={choices!r} must be a list of at least one text")
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise InvalidRequestError(f"choice {choice!r} must be a text of at least one character")
    if temperature > 1e-5:
        raise UnsupportedError(f"temperature={temperature!r}: select takes the likeliest choice; leave it out")
    if not isinstance(choices_method, ChoicesSamplingMethod):
        raise InvalidRequestError(f"choices_method={choices_method!r} is not a ChoicesSamplingMethod")
    return Select(_check_name(name), tuple(choices), choices_method, check_slo(slo))


def tools(tools: Sequence[Callable[..., Any] | dict[str, Any]]) -> Expr:
    """Show the model these tools: annotated Python functions or JSON schemas. Append it before the messages."""
    return Tools(tuple(tool_schema(tool) for tool in tools))


_ROLES: dict[str, tuple[RoleBegin, RoleEnd]] = {}  # of the few roles there are


def _role(role: str, content: str | Expr | None) -> Expr:
    middle = () if content is None else leaves(to_expr(content))
    begin, end = _ROLES.get(role) or _ROLES.setdefault(role, (RoleBegin(role), RoleEnd(role)))
    return ExprList((begin, *middle, end))


def system(content: str | Expr | None = None) -> Expr:
    """A system message."""
    return _role("system", content)


def user(content: str | Expr | None = None) -> Expr:
    """A user message."""
    return _role("user", content)


def assistant(content: str | Expr | None = None) -> Expr:
    """An assistant message; with a `gen` inside, the model's."""
    return _role("assistant", content)


def tool(content: str | Expr | None = None) -> Expr:
    """A message with a tool's result."""
    return _role("tool", content)


def system_begin() -> Expr:
    """Opens a system message."""
    return RoleBegin("system")


def system_end() -> Expr:
    """Closes a system message."""
    return RoleEnd("system")


def user_begin() -> Expr:
    """Opens a user message."""
    return RoleBegin("user")


def user_end() -> Expr:
    """Closes a user message."""
    return RoleEnd("user")


def assistant_begin() -> Expr:
    """Opens an assistant message."""
    return RoleBegin("assistant")


def assistant_end() -> Expr:
    """Closes an assistant message."""
    return RoleEnd("assistant")


def tool_begin() -> Expr:
    """Opens a message with a tool's result."""
    return RoleBegin("tool")


def tool_end() -> Expr:
    """Closes a message with a tool's result."""
    return RoleEnd("tool")


def image(path: Any) -> NoReturn:
    """Raises UnsupportedError: models that see are not served yet."""
    raise UnsupportedError("image() is not supported yet: only text models are served")


def video(path: Any, num_frames: int) -> NoReturn:
    """Raises UnsupportedError: models that see are not served yet."""
    raise UnsupportedError("video() is not supported yet: only text models are served")


def separate_reasoning(expr: Expr, model_type: str | None = None) -> Expr:
    """Tell reasoning apart in every `gen` of `expr`: variable NAME and the text keep the answer alone, variable
    NAME_reasoning_content gets the reasoning. The next call therefore does not read it.

    model_type: SGLang's name for a kind of model ("qwen3", "deepseek-r1", "kimi", ...); None: `<think>` tags.
    Raises UnsupportedError for another kind, InvalidRequestError for `dtype` numbers or an `expr` without a `gen`.
    """
    reasoning = Reasoning.of(model_type)
    parts = list(leaves(to_expr(expr)))
    if not any(isinstance(part, Gen) for part in parts):
        raise InvalidRequestError("separate_reasoning() holds no gen(); give it the one in which the model thinks")
    for part in parts:
        if isinstance(part, Gen) and part.number is not None:
            raise InvalidRequestError(f"separate_reasoning(): gen({part.name!r}, dtype={part.number}) ends at a number")
    return ExprList(tuple(replace(part, reasoning=reasoning) if isinstance(part, Gen) else part for part in parts))


def _check_name(name: object) -> str | None:
    if name is None or isinstance(name, str):
        return name
    raise InvalidRequestError(f"name={name!r} must be a text, the name of a variable")
