"""What an output must look like: the grammar that goes to the engine, and the value that comes back."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pydantic
import pytest
from scripted_client import ScriptedClient

import superinfer as si
from superinfer.lang import ir
from superinfer.lang.backend import TextBackend
from superinfer.runtime.protocol import Grammar
from superinfer.runtime.text import TextDelta, TextRequest


class Person(pydantic.BaseModel):
    name: str
    age: int | None


class Place(msgspec.Struct):
    city: str
    streets: list[str] = []


def run(expr: Any, **options: Any) -> si.ProgramState:
    @si.function
    def program(s):
        s += "p:" + expr

    return program.run(**options)


@pytest.mark.parametrize(
    ("arguments", "kind", "source"),
    [
        ({"regex": r"\d{3}"}, "regex", r"\d{3}"),
        ({"dtype": int}, "regex", " ?" + ir.REGEX_INT),
        ({"dtype": "float"}, "regex", " ?" + ir.REGEX_FLOAT),
        ({"dtype": bool}, "regex", ir.REGEX_BOOL),
        ({"dtype": str}, "regex", ir.REGEX_STR),
        ({"json_schema": {"type": "object"}}, "json_schema", '{"type": "object"}'),
        ({"json_schema": '{"type":"object"}'}, "json_schema", '{"type": "object"}'),
        ({"json_schema": Person}, "json_schema", json.dumps(Person.model_json_schema())),
        ({"dtype": Place}, "json_schema", json.dumps(msgspec.json.schema(Place))),
    ],
)
def test_the_engine_is_sent_the_grammar(model: ScriptedClient, arguments, kind, source) -> None:
    model.answer = lambda prompt: '{"city": "Ghent"}' if arguments.get("dtype") is Place else "12"
    run(si.gen("x", **arguments))
    assert model.requests[0].sampling.grammar == Grammar(kind=kind, source=source)


def test_dtype_with_a_model_or_a_struct_gives_an_instance_and_its_json_stays_in_the_text(model: ScriptedClient) -> None:
    answers = iter(['{"name": "Anna", "age": null}', '{"city": "Ghent"}'])
    model.answer = lambda prompt: next(answers)
    state = run(si.gen("who", dtype=Person) + ";" + si.gen("where", dtype=Place))
    assert state["who"] == Person(name="Anna", age=None)
    assert state["where"] == Place("Ghent", [])
    assert state.text() == 'p:{"name": "Anna", "age": null};{"city": "Ghent"}'


def test_a_typed_answer_streams_as_text_and_several_make_a_list(model: ScriptedClient) -> None:
    model.answer = lambda prompt: '{"city": "Ghent"}'

    @si.function
    def program(s):
        s += "p:" + si.gen("x", dtype=Place, n=2)

    assert program.run()["x"] == [Place("Ghent"), Place("Ghent")]
    assert "".join(program.run(stream=True).text_iter("x")) == '{"city": "Ghent"}'


def test_json_schema_gives_text(model: ScriptedClient) -> None:
    model.answer = lambda prompt: '{"city": "Ghent"}'
    assert run(si.gen("x", json_schema=Place))["x"] == '{"city": "Ghent"}'


def test_an_answer_that_is_not_of_its_type_is_an_output_error(model: ScriptedClient) -> None:
    model.answer = lambda prompt: '{"city": "Gh'

    @si.function
    def program(s):
        s += "p:" + si.gen("x", dtype=Place)
        return s["x"]

    with pytest.raises(si.OutputError, match="cannot be read"):
        program.run()


def test_a_call_whose_time_is_up_has_no_instance(model: ScriptedClient) -> None:
    state = run(si.gen("x", dtype=Place), deadline=1e-9, slo=si.SLO(on_miss="truncate"))
    assert state["x"] is None and not model.requests


class Plain(TextBackend):
    """A backend that cannot constrain."""

    takes_grammars = False

    async def stream(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        async for delta in self.client.stream(request):
            yield delta


@pytest.mark.parametrize("arguments", [{"regex": "a"}, {"json_schema": {"type": "object"}}, {"dtype": bool}])
def test_a_backend_without_grammars_refuses_before_anything_is_sent(arguments) -> None:
    client = ScriptedClient()

    @si.function
    def program(s):
        s += "p:" + si.gen("x", **arguments)
        return s["x"]

    with pytest.raises(si.UnsupportedError, match="Plain cannot constrain"):
        program.run(backend=Plain(client))  # type: ignore[arg-type]
    assert not client.requests


def test_a_number_needs_no_grammar(model: ScriptedClient) -> None:
    client = ScriptedClient()
    client.answer = lambda prompt: " 12 lamps"
    assert run(si.gen("x", dtype=int), backend=Plain(client))["x"] == "12"  # type: ignore[arg-type]
    assert client.requests[0].sampling.grammar is None


def test_stop_regex_ends_the_text_before_the_match_and_run_may_give_it(model: ScriptedClient) -> None:
    model.answer = lambda prompt: "one. 22 two"
    state = run(si.gen("x", stop_regex=r"\d+"))
    assert (state["x"], state.get_meta_info("x")["stop"]) == ("one. ", "2")
    assert run(si.gen("x"), stop_regex=["zzz", r"\bt"])["x"] == "one. 22 "
