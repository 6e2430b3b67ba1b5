"""The libraries that applications use, each against the embedded model behind `superinfer serve`'s application.

The embedded model answers a tool question with a call, which is what agents need; see its model card.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import launch_engine

MODEL = "tiny"
QUESTION = "What is the weather in Oslo?"


@pytest.fixture(scope="module")
def chatty(serving: Callable[..., Any]) -> Iterator[Any]:
    """The embedded model, which speaks and calls tools."""
    with (
        launch_engine(EngineConfig(device="cpu", threads=1, kv_tokens=16384)) as engine,
        serving(engine.address, tool_parser="auto") as served,
    ):
        yield served


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch, chatty: Any) -> str:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("OPENAI_BASE_URL", f"{chatty.url}/v1")
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    return "none"


def weather(city: str) -> str:
    """The weather in a city."""
    return f"It rains in {city}."


# The embedded model was not trained on the form of a demanded call: in a string without an end it would go on for ever.
CITY = {"type": "string", "maxLength": 12}
PARAMETERS = {"type": "object", "properties": {"city": CITY}, "required": ["city"], "additionalProperties": False}
TOOL: Any = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather in a city.", "parameters": PARAMETERS},
}


PERSON_TEXT = "Ann Lee is 34 years old.\n\nExtract name and age as JSON."


class Person(BaseModel):
    """A structured answer."""

    name: str
    age: int


ANN = Person(name="Ann Lee", age=34)


def test_openai_calls_a_tool_and_uses_its_answer(chatty: Any) -> None:
    with chatty.openai() as client:
        messages: list[Any] = [{"role": "user", "content": QUESTION}]
        first = client.chat.completions.create(
            model=MODEL, messages=messages, tools=[TOOL], temperature=0, max_tokens=64
        )
        assert first.choices[0].finish_reason == "tool_calls", first
        (call,) = first.choices[0].message.tool_calls
        assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Oslo"}
        messages += [
            first.choices[0].message,
            {"role": "tool", "tool_call_id": call.id, "content": weather("Oslo")},
        ]
        second = client.chat.completions.create(
            model=MODEL, messages=messages, tools=[TOOL], temperature=0, max_tokens=64
        )
        assert second.choices[0].message.content


async def test_openai_async_streams_the_same_call(chatty: Any) -> None:
    async with chatty.openai_async() as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": QUESTION}],
            tools=[TOOL],
            temperature=0,
            max_tokens=64,
            stream=True,
        )
        name, arguments = "", ""
        async for chunk in stream:
            for call in chunk.choices[0].delta.tool_calls or []:
                name += call.function.name or ""
                arguments += call.function.arguments or ""
        assert name == "weather" and json.loads(arguments) == {"city": "Oslo"}


def test_openai_responses_calls_a_tool(chatty: Any) -> None:
    tool: Any = {"type": "function", **TOOL["function"], "strict": True}
    with chatty.openai() as client:
        answer = client.responses.create(model=MODEL, input=QUESTION, tools=[tool], temperature=0, max_output_tokens=64)
        (call,) = answer.output
        assert call.type == "function_call" and json.loads(call.arguments) == {"city": "Oslo"}
        output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": weather("Oslo")}
        after = client.responses.create(
            model=MODEL, input=[output], previous_response_id=answer.id, tools=[tool], temperature=0,
            max_output_tokens=64,
        )  # fmt: skip
        assert after.output_text


def test_openai_parses_structured_output(chatty: Any) -> None:
    with chatty.openai() as client:
        ask: Any = {"model": MODEL, "messages": [{"role": "user", "content": PERSON_TEXT}], "temperature": 0}
        assert client.chat.completions.parse(**ask, response_format=Person).choices[0].message.parsed == ANN
        answer = client.chat.completions.create(**ask, response_format={"type": "json_object"}, max_tokens=60)
        assert json.loads(answer.choices[0].message.content) == {"name": "Ann Lee", "age": 34}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_call_can_be_demanded(chatty: Any, choice: Any, stream: bool) -> None:
    with chatty.openai() as client:
        ask: Any = {
            "model": MODEL,
            "messages": [{"role": "user", "content": QUESTION}],
            "tools": [TOOL],
            "tool_choice": choice,
            "parallel_tool_calls": False,  # nor does it know when a list of calls is long enough
            "temperature": 0,
            "max_tokens": 300,
        }
        if not stream:
            answer = client.chat.completions.create(**ask)
        else:
            with client.chat.completions.stream(**ask) as events:
                answer = events.get_final_completion()
        calls = [
            (call.function.name, json.loads(call.function.arguments)) for call in answer.choices[0].message.tool_calls
        ]
        assert calls[0][0] == "weather" and set(calls[0][1]) == {"city"}


def test_openai_parses_what_may_be_a_call_or_in_a_format(chatty: Any) -> None:
    """Agents that end with a structured answer: the model calls first, and answers in the format when it knows."""
    with chatty.openai() as client:
        strict: Any = TOOL | {"function": TOOL["function"] | {"strict": True}}  # as the client wants it to parse
        ask: Any = {"model": MODEL, "tools": [strict], "temperature": 0, "max_tokens": 100, "response_format": Person}
        asking: Any = [{"role": "user", "content": QUESTION}]
        calls = client.chat.completions.parse(messages=asking, **ask).choices[0]
        with client.chat.completions.stream(messages=asking, **ask) as events:
            streamed = events.get_final_completion().choices[0]
        for choice in (calls, streamed):
            (call,) = choice.message.tool_calls
            assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})
            assert choice.finish_reason == "tool_calls" and choice.message.parsed is None
        telling: Any = [{"role": "user", "content": PERSON_TEXT}]
        answer = client.chat.completions.parse(messages=telling, **ask | {"tool_choice": "none"}).choices[0]
        assert answer.message.parsed == ANN
        plain = client.chat.completions.parse(messages=telling, **ask).choices[0]
        assert plain.message.parsed == ANN or plain.message.tool_calls


def test_demanded_calls_may_have_arguments_of_several_models(chatty: Any) -> None:
    """Schemas with references into themselves, as pydantic makes them: two tools have each its own `Place`."""

    def tool(name: str, place: dict[str, Any]) -> Any:
        line = {"type": "object", "properties": {"at": {"$ref": "#/$defs/Place"}}, "required": ["at"]}
        parameters = line | {"additionalProperties": False, "$defs": {"Place": place}}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    places = {"go": {"type": "boolean"}, "stay": {"enum": [7]}}
    with chatty.openai() as client:
        for name, at in (("go", (True, False)), ("stay", (7,))):
            answer = client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": QUESTION}],
                tools=[tool(other, places[other]) for other in places],
                tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [tool(name, {})]}},
                parallel_tool_calls=False,
                max_tokens=100,
            )
            (call,) = answer.choices[0].message.tool_calls
            assert call.function.name == name and json.loads(call.function.arguments)["at"] in at
        both = [tool(other, places[other]) for other in places]
        ask: Any = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "tools": both}
        for seed in range(3):
            answer = client.chat.completions.create(
                **ask, tool_choice="required", parallel_tool_calls=False, seed=seed, max_tokens=100
            )
            (call,) = answer.choices[0].message.tool_calls
            assert json.loads(call.function.arguments)["at"] in ((True, False) if call.function.name == "go" else (7,))


def test_logit_bias_reaches_the_engine(chatty: Any) -> None:
    with chatty.openai() as client:
        ask: Any = {"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}], "temperature": 0}
        answer = client.chat.completions.create(**ask, max_tokens=5, logit_bias={"300": 100})
        plain = client.chat.completions.create(**ask, max_tokens=5)
        assert answer.choices[0].message.content != plain.choices[0].message.content


def test_langchain_invokes_streams_and_binds_tools(chatty: Any, key: str) -> None:
    chat_openai = pytest.importorskip("langchain_openai").ChatOpenAI
    llm = chat_openai(model=MODEL, temperature=0, max_tokens=32)
    assert llm.invoke("Hello! What can you do?").content
    pieces = [chunk.content for chunk in llm.stream("Hello! What can you do?")]
    assert "".join(pieces) == llm.invoke("Hello! What can you do?").content
    called = llm.bind_tools([weather]).invoke(QUESTION)
    assert called.tool_calls[0]["name"] == "weather" and called.tool_calls[0]["args"] == {"city": "Oslo"}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_litellm_completes_and_streams(chatty: Any, key: str) -> None:
    litellm = pytest.importorskip("litellm")
    ask: Any = {
        "model": f"openai/{MODEL}", "api_base": f"{chatty.url}/v1", "api_key": key, "temperature": 0, "max_tokens": 32,
        "messages": [{"role": "user", "content": "Hello! What can you do?"}],
    }  # fmt: skip
    whole = litellm.completion(**ask).choices[0].message.content
    assert whole and "".join(c.choices[0].delta.content or "" for c in litellm.completion(**ask, stream=True)) == whole
    with pytest.raises(litellm.exceptions.NotFoundError):
        litellm.completion(**ask | {"model": "openai/other"})


@pytest.mark.parametrize("api", ["chat", "responses"])
async def test_openai_agents_run_a_tool(chatty: Any, key: str, api: str) -> None:
    agents = pytest.importorskip("agents")
    ran: list[str] = []

    def weather(city: str) -> str:
        """The weather in a city."""
        ran.append(city)
        return f"It rains in {city}."

    async with chatty.openai_async() as client:
        models = {"chat": agents.OpenAIChatCompletionsModel, "responses": agents.OpenAIResponsesModel}
        agent = agents.Agent(
            name="helper",
            model=models[api](model=MODEL, openai_client=client),
            tools=[agents.function_tool(weather)],
            model_settings=agents.ModelSettings(temperature=0, max_tokens=48),
        )
        config = agents.RunConfig(tracing_disabled=True)
        result = await agents.Runner.run(agent, QUESTION, run_config=config, max_turns=3)
    assert ran == ["Oslo"] and result.final_output


def test_pydantic_ai_runs_a_tool(chatty: Any, key: str) -> None:
    ai = pytest.importorskip("pydantic_ai")
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    ran: list[str] = []
    provider = OpenAIProvider(base_url=f"{chatty.url}/v1", api_key=key)
    agent = ai.Agent(OpenAIChatModel(MODEL, provider=provider), model_settings={"temperature": 0, "max_tokens": 48})

    @agent.tool_plain
    def weather(city: str) -> str:
        """The weather in a city."""
        ran.append(city)
        return f"It rains in {city}."

    async def run() -> Any:
        return await agent.run(QUESTION)

    assert asyncio.run(run()).output and ran == ["Oslo"]


def test_instructor_gets_a_model(chatty: Any, key: str) -> None:
    instructor = pytest.importorskip("instructor")
    with chatty.openai() as client:
        patched = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA)
        messages: Any = [{"role": "user", "content": PERSON_TEXT}]
        answer = patched.chat.completions.create(
            model=MODEL, messages=messages, response_model=Person, max_retries=1, temperature=0, max_tokens=60
        )
        assert answer.model_dump() == ANN.model_dump()  # it is of a class that instructor derives
