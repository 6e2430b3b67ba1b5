"""`superinfer bench programs`: both arms make the same calls, and what is not the same work is not compared."""

from __future__ import annotations

import asyncio
import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from superinfer.bench import programs_lang, programs_openai
from superinfer.bench.program_texts import SHAPES, SIZES, Texts, Tokens, longest, output_tokens, scaled
from superinfer.bench.programs_report import check_tokens, compare, joined, table
from superinfer.bench.programs_run import OurArm
from superinfer.bench.shapes import write_tokenizer
from superinfer.errors import InvalidRequestError
from superinfer.lang.backend import RuntimeEndpoint
from superinfer.runtime.launch import EngineProcess
from superinfer.runtime.tokenization import Tokenizer

SMALL = ("--scale", "0.02", "--rounds", "1")
Bench = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Bench:
    def run(*arguments: str) -> tuple[int, str, str]:
        from superinfer.cli import main

        with pytest.raises(SystemExit) as ended:
            main(["bench", "programs", *arguments])
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return run


@pytest.fixture(scope="module")
def url(tiny_engine: EngineProcess) -> Iterator[str]:
    """A server beside the engine's own door."""
    command = [sys.executable, "-m", "superinfer", "serve", "--port", "0", "--engine", tiny_engine.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = next(line for line in server.stdout if "serving at" in line)
        yield line.split()[2]
        server.terminate()


@pytest.mark.slow
def test_every_shape_is_timed_on_both_arms_which_use_as_many_tokens(
    bench: Bench, tiny_engine: EngineProcess, url: str, tmp_path: Path
):
    out = tmp_path / "both.json"
    arms = ("--url-ours", tiny_engine.address, "--url-peer", url)
    status, text, err = bench(*arms, *SMALL, "--at-once", "1,2", "--json", str(out))
    assert status == 0, err
    found = json.loads(out.read_text())
    assert list(found["arms"]) == ["ours", "peer"] and found["arms"]["peer"]["owned_by"] == "superinfer"
    for shape in SHAPES:
        sizes = found["settings"]["sizes"][shape]
        for count in (1, 2):
            (ours,), (peer,) = (found["arms"][arm]["runs"][shape][str(count)] for arm in ("ours", "peer"))
            assert ours["output"] == peer["output"] == count * output_tokens(shape, sizes)
            assert (ours["calls"], ours["prompt"]) == (peer["calls"], peer["prompt"])
            assert len(ours["programs_s"]) == count and max(ours["programs_s"]) <= ours["seconds"]
            assert found["ratios"][shape][str(count)] == pytest.approx(peer["seconds"] / ours["seconds"])
        assert shape in text
    calls = {shape: found["arms"]["ours"]["runs"][shape]["1"][0]["calls"] for shape in SHAPES}
    assert calls == {
        "tree_of_thought": 84, "react": 7, "map_reduce": 17, "json_extraction": 8, "chat": 4, "select": 6,
    }  # fmt: skip


def test_our_language_is_timed_at_the_engine_too_beside_http(
    bench: Bench, tiny_engine: EngineProcess, url: str, tmp_path: Path
):
    out = tmp_path / "three.json"
    arms = ("--url-ours", url, "--url-engine", tiny_engine.address, "--url-peer", url)
    status, text, err = bench(*arms, *SMALL, "--shapes", "json_extraction,chat", "--at-once", "2", "--json", str(out))
    assert status == 0, err
    found = json.loads(out.read_text())
    assert [(name, arm["door"]) for name, arm in found["arms"].items()] == [
        ("ours", "http"), ("engine", "zmq"), ("peer", "http"),
    ]  # fmt: skip
    for shape, least in (("json_extraction", 8), ("chat", 4)):
        (engine,), (peer,) = (found["arms"][arm]["runs"][shape]["2"] for arm in ("engine", "peer"))
        assert found["engine_ratios"][shape]["2"] == pytest.approx(peer["seconds"] / engine["seconds"])
        assert engine["steps"] >= least and engine["prefill"] > 0
    assert "peer/engine" in text
    status, _, err = bench("--url-engine", url)
    assert status and "no engine's address" in err


@pytest.mark.slow
def test_arms_measured_one_by_one_are_joined(bench: Bench, tiny_engine: EngineProcess, url: str, tmp_path: Path):
    ours, peer, both = (tmp_path / f"{name}.json" for name in ("ours", "peer", "both"))
    some = (*SMALL, "--shapes", "chat,select", "--at-once", "2")
    assert bench("--url-ours", tiny_engine.address, *some, "--json", str(ours))[0] == 0
    assert bench("--url-peer", url, "--select-by", "choice", *some, "--json", str(peer))[0] == 0
    status, _, err = bench("--join", str(ours), "--join", str(peer), "--json", str(both))
    found = json.loads(both.read_text())
    assert status == 0 and found["ratios"]["chat"]["2"] > 0, err
    assert found["arms"]["peer"]["select_by"] == "choice" and found["arms"]["ours"]["measured"]["commit"]
    other = tmp_path / "other.json"
    assert bench("--url-peer", url, *some, "--seed", "5", "--json", str(other))[0] == 0
    status, _, err = bench("--join", str(ours), "--join", str(other))
    assert status == 2 and "has another seed" in err


def test_over_http_our_arm_runs_every_shape(bench: Bench, url: str, tmp_path: Path):
    path = tmp_path / "found.json"
    status, _, err = bench("--url-ours", url, *SMALL, "--shapes", "chat,select", "--at-once", "1", "--json", str(path))
    assert status == 0, err
    assert json.loads(path.read_text())["arms"]["ours"]["runs"]["select"]["1"][0]["calls"] == 6


@pytest.mark.slow
def test_an_engine_started_here_gets_lengths_that_fit_its_context(bench: Bench, tmp_path: Path):
    out = tmp_path / "found.json"
    some = ("--shapes", "react,select", "--at-once", "1", "--rounds", "1")
    status, _, err = bench("--start", "--max-model-len", "450", *some, "--json", str(out))
    assert status == 0, err
    assert "lengths are scaled as by --scale 0.1, to fit into the model's context of 450 tokens" in err
    assert json.loads(out.read_text())["settings"]["sizes"] == {
        shape: scaled(SIZES[shape], 0.1) for shape in ("react", "select")
    }
    status, _, err = bench("--start", "--max-model-len", "50", *some)
    assert status == 2 and "at --scale 0.05 the longest call has" in " ".join(err.split())


@pytest.mark.parametrize("arm", ["ours", "engine", "peer"])
def test_prompts_that_are_too_long_say_which_option_makes_them_shorter(
    bench: Bench, tiny_engine: EngineProcess, url: str, arm: str
):
    at = tiny_engine.address if arm == "engine" else url
    status, _, err = bench(f"--url-{arm}", at, "--shapes", "chat", "--at-once", "1", "--rounds", "1", "--scale", "40")
    assert status == 1 and "give a lower --scale" in " ".join(err.split())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_longest_call_of_a_shape_is_foretold(tiny_engine: EngineProcess, shape: str):
    sizes = scaled(SIZES[shape], 0.1)
    with RuntimeEndpoint(tiny_engine.address) as backend:
        state = programs_lang.PROGRAMS[shape].run(Texts(shape, sizes, "long"), backend=backend)
        metas = [made.get_meta_info(name) for made, name in state.ret_value]
        weights = OurArm(backend, "").weights([shape])
    took = max(meta["prompt_tokens"] + meta["completion_tokens"] for meta in metas)
    assert 0.98 * took <= longest(shape, sizes, weights) <= 1.1 * took


def test_both_arms_send_the_same_prompts(tiny_engine: EngineProcess, url: str):
    """Token for token, as far as the answers fed back are the same: what one arm has computed, the other finds."""
    import openai

    async def run() -> dict[str, tuple[int, int]]:
        shares = {}
        async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
            caller = programs_openai.Caller(client, (await client.models.list()).data[0].id)
            for shape in ("json_extraction", "chat", "map_reduce"):
                texts = Texts(shape, scaled(SIZES[shape], 0.1), "same")
                state = await programs_lang.PROGRAMS[shape].arun(texts, backend=backend)
                first = state.get_meta_info({"json_extraction": "field 0", "chat": "answer 0"}.get(shape, "answer"))
                used = Tokens()
                await programs_openai.PROGRAMS[shape](caller, used, texts)
                shares[shape] = (used.cached, used.prompt)
                assert first["prompt_tokens"] > 0
        return shares

    with RuntimeEndpoint(tiny_engine.address) as backend:
        for shape, (cached, prompt) in asyncio.run(run()).items():
            assert cached > 0.75 * prompt, shape


def record() -> dict[str, Any]:
    run = {"seconds": 1.0, "programs_s": [1.0], "calls": 4, "prompt": 1000, "cached": 0, "output": 4 * 64}
    arms = {
        name: {"runs": {"chat": {"1": [copy.deepcopy(run), copy.deepcopy(run)]}}} for name in ("ours", "peer")
    }  # fmt: skip
    settings = {"sizes": {"chat": SIZES["chat"]}, "shapes": ["chat"], "at_once": [1], "rounds": 2, "seed": 0}
    return {"settings": settings, "arms": arms}


def test_ratios_are_of_the_medians():
    found = record()
    found["arms"]["peer"]["runs"]["chat"]["1"] = [
        {**found["arms"]["peer"]["runs"]["chat"]["1"][0], "seconds": s} for s in (2.0, 9.0, 3.0)
    ]
    found = compare(found)
    assert found["ratios"] == {"chat": {"1": 3.0}} and "3.00" in table(found)


def test_arms_that_did_other_work_are_told_of():
    found = record()
    assert check_tokens(found) == []
    found["arms"]["peer"]["runs"]["chat"]["1"][0]["output"] -= 1
    found["arms"]["peer"]["runs"]["chat"]["1"][1]["prompt"] += 30
    assert check_tokens(found) == ["peer generated 255 tokens for chat x 1, not 256"]
    found["arms"]["peer"]["runs"]["chat"]["1"][1]["prompt"] += 30
    assert check_tokens(found)[1] == "prompts of chat x 1 had 2000 tokens in the arm 'ours' and 2060 in the other"


def test_a_server_that_ignores_the_lengths_asked_for_fails_the_command(bench: Bench, tmp_path: Path):
    paths = []
    for name in ("ours", "peer"):
        found = record() | {key: "" for key in ("date", "commit", "device", "versions", "command")}
        found["arms"] = {name: found["arms"][name]}
        found["arms"][name]["runs"]["chat"]["1"][0]["output"] += 3 * (name == "peer")
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(found))
    out = tmp_path / "out.json"
    status, _, err = bench("--join", str(paths[0]), "--join", str(paths[1]), "--json", str(out))
    assert status == 1 and "peer generated 259 tokens for chat x 1, not 256" in err and out.exists()


def test_lengths_are_what_they_are_said_to_be(tmp_path: Path):
    tokenizer = Tokenizer(str(write_tokenizer(tmp_path, 128256)))
    texts = Texts("select", SIZES["select"], "0")
    assert len(tokenizer.encode(texts.shared + texts.part("document") + texts.part("question", 3))) == 64 + 256 + 12
    options = [tokenizer.encode(option) for option in texts.options(3)]
    assert [len(ids) for ids in options] == [4] * 5 and len({ids[0] for ids in options}) == 5
    assert texts.part("question", 3) != texts.part("question", 4) and texts.shared == Texts(*_other(texts)).shared


def _other(texts: Texts) -> tuple[str, dict[str, int], str]:
    return texts.shape, texts.sizes, "another"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "nothing to measure"),
        (("--start", "--url-ours", "ipc:///x"), "--start and --url-ours are both our arm"),
        (("--url-peer", "http://127.0.0.1:9", "--shapes", "tree"), "'tree' is not one of tree_of_thought"),
        (("--url-peer", "http://127.0.0.1:9"), "no OpenAI server answers at http://127.0.0.1:9/v1"),
        (("--url-peer", "http://127.0.0.1:9", "--select-by", "x"), "--select-by 'x' must be one of scores, choice"),
        (("--join", "nowhere.json"), "give it twice"),
        (("--join", "nowhere.json", "--join", "nowhere.json"), "is no record of this command"),
    ],
)
def test_what_cannot_be_measured_is_refused(bench: Bench, arguments: tuple[str, ...], said: str):
    status, _, err = bench(*arguments)
    assert status == (1 if "server answers" in said else 2) and said in " ".join(err.split())


def test_records_with_one_arm_twice_are_not_joined(tmp_path: Path):
    for name in ("a", "b"):
        found = record() | {key: "" for key in ("date", "commit", "device", "versions", "command")}
        (tmp_path / name).write_text(json.dumps(found))
    with pytest.raises(InvalidRequestError, match="both records have the arm 'ours'"):
        joined([tmp_path / "a", tmp_path / "b"])
