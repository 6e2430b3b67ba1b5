"""What a request leaves out is as the checkpoint's generation_config.json says, as at vLLM's server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from chat_checkpoint import write_checkpoint

import superinfer as si
from superinfer.errors import ModelLoadError
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import EngineProcess, launch_engine
from superinfer.runtime.server.model_defaults import model_defaults

GREEDY = {"do_sample": True, "temperature": 0.6, "top_k": 1, "top_p": None, "transformers_version": "4.51.0"}
ASK: dict[str, Any] = {"model": "tiny", "max_tokens": 24}
CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def greedy_engine(tiny_config: EngineConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """Of a checkpoint whose authors want the most likely token."""
    folder = write_checkpoint(tmp_path_factory.mktemp("greedy") / "tiny")
    (folder / "generation_config.json").write_text(json.dumps(GREEDY))
    with launch_engine(msgspec.structs.replace(tiny_config, model=str(folder))) as process:
        yield process


def answers(client: openai.OpenAI, **given: Any) -> list[str]:
    """What all three routes say."""
    extra = given.pop("extra_body", {})
    chat = client.chat.completions.create(messages=CHAT, **ASK, **given, extra_body=extra)
    text = client.completions.create(prompt="hello", **ASK, **given, extra_body=extra)
    response = client.responses.create(model="tiny", input="hello", max_output_tokens=24, **given, extra_body=extra)
    return [chat.choices[0].message.content or "", text.choices[0].text, response.output_text]


def test_the_models_own_sampling_holds_where_a_request_says_nothing(greedy_engine: EngineProcess, serving: Any) -> None:
    with serving(greedy_engine.address) as server, server.openai() as client:
        best = answers(client, temperature=0)
        assert answers(client) == answers(client) == best
        other = answers(client, temperature=1, extra_body={"top_k": -1, "seed": 5})
        assert all(one != another for one, another in zip(other, best, strict=True))
        said = client.responses.create(model="tiny", input="hello", max_output_tokens=1)
        assert said.temperature == 0.6 and said.top_p == 1.0


def test_it_can_be_left_aside(greedy_engine: EngineProcess, serving: Any) -> None:
    with serving(greedy_engine.address, sampling_defaults="openai") as server, server.openai() as client:
        seeded = {"extra_body": {"seed": 5}}
        assert answers(client, **seeded) == answers(client, temperature=1, extra_body={"seed": 5, "top_k": -1})


def test_a_program_says_the_same_on_the_engine_and_over_http(greedy_engine: EngineProcess, serving: Any) -> None:
    @si.function
    def program(s: Any) -> None:
        s += "hello" + si.gen("answer", max_tokens=24)

    with si.RuntimeEndpoint(greedy_engine.address) as backend:
        direct = {program.run(backend=backend)["answer"] for _ in range(4)}
    with serving(greedy_engine.address) as server, si.RuntimeEndpoint(server.url) as backend:
        served = {program.run(backend=backend)["answer"] for _ in range(4)}
    assert len(direct) > 1 and len(served) > 1, "a program's temperature is 1 unless it says another"


@pytest.mark.parametrize(
    "stated,match",
    [({"top_p": 3}, "top_p=3.0 must be"), ({"temperature": "low"}, r"Expected `float \| null`, got `str`")],
)
def test_values_that_no_request_could_have_are_refused_by_the_file(
    tmp_path: Path, stated: dict[str, Any], match: str
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    with pytest.raises(ModelLoadError, match=rf"generation_config\.json cannot be used: .*{match}.*--sampling-def"):
        model_defaults(tmp_path)
