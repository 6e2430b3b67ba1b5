"""`superinfer bench serve`: whatever a server answers is counted, timed and judged, ours and others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from scripted_server import ScriptedServer, Stream, steady

from superinfer.bench.load import Asking, ClientDelay, new_sample, probe, run_load
from superinfer.bench.load_report import LoadReport, columns, report, stages_of
from superinfer.bench.openai_stream import EngineSlo, OpenAIStreams, Sample, Server
from superinfer.errors import EngineUnavailableError, InvalidRequestError
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import launch_engine
from superinfer.runtime.sim.workload import Job
from superinfer.runtime.slo import SLO

SLO_1S = SLO(ttft=1.0, tbt=0.1)
IDLE = ClientDelay([0.0], [0.0], 0.0)


def job(at: float = 0.0, output: int = 5, slo: SLO | None = SLO_1S) -> Job:
    return Job(at, 3, output, (0,), 3, slo)


def load(server: ScriptedServer, jobs: list[Job], drain_s: float = 60.0, **asking: Any) -> list[Sample]:
    """Send the jobs as the command does, without its printing."""

    async def run() -> list[Sample]:
        async with OpenAIStreams(server.url) as streams:
            known = await probe(streams, await streams.describe(""), Asking(Server("", "m", "", "", None)), [1, 2])
            asks = Asking(known, **asking)
            samples, _ = await run_load(streams, jobs, [asks.body([1, 2, 3], j) for j in jobs], drain_s=drain_s)
            return samples

    return asyncio.run(run())


def one(answer: Callable[..., Any], drain_s: float = 30.0, **asking: Any) -> Sample:
    with ScriptedServer() as server:

        async def after_the_probe(body: dict[str, Any], stream: Stream) -> None:
            await (steady if body["max_tokens"] == 1 else answer)(body, stream)

        server.answer = after_the_probe
        (sample,) = load(server, [job()], drain_s=drain_s, **asking)
    return sample


def test_every_token_of_every_stream_is_counted_and_timed():
    patient = SLO(ttft=60.0, tbt=10.0)  # however busy the machine is
    jobs = [job(at=0.002 * at, output=1 + at % 7, slo=patient) for at in range(200)]
    with ScriptedServer() as server:
        samples = load(server, jobs)
    found = report(samples, IDLE)
    assert (found.completed, found.failed, found.errors) == (200, 0, {})
    assert [s.tokens for s in samples] == [j.output_length for j in jobs]
    assert [s.timeline.count for s in samples] == [s.tokens for s in samples]
    assert found.attainment.requests == 200 and found.attainment.met == 1.0
    assert found.ttft is not None and found.ttft.p50 > 0


def test_several_tokens_in_a_chunk_count_as_several():
    async def in_threes(body: dict[str, Any], stream: Stream) -> None:
        stream.begin()
        await stream.token(2)
        await stream.token(5, "length")
        await stream.end()

    sample = one(in_threes)
    assert (sample.tokens, sample.timeline.count, len(sample.gaps)) == (5, 5, 1)


def test_events_may_be_cut_anywhere_and_joined_at_will():
    async def in_pieces(body: dict[str, Any], stream: Stream) -> None:
        stream.begin()
        text = b"".join(
            b'data: {"choices":[{"text":"x"}],"usage":{"completion_tokens":%d}}\r\n\r\n: a comment\n\n' % (at + 1)
            for at in range(5)
        )
        for at in range(0, len(text), 7):
            await stream.raw(text[at : at + 7])
        await stream.raw(b"data: [DONE]\n\n")
        await stream.end()

    sample = one(in_pieces)
    assert (sample.error, sample.tokens) == ("", 5)


def test_a_server_that_does_not_count_is_asked_without_and_its_last_chunk_believed():
    async def plain(body: dict[str, Any], stream: Stream) -> None:
        if "continuous_usage_stats" in body["stream_options"]:
            await stream.refuse(400, {"error": {"message": "unknown parameter"}})
            return
        stream.begin()
        for _ in range(3):
            await stream.token()
        await stream.event({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
        await stream.end()

    with ScriptedServer(answer=plain) as server:
        (sample,) = load(server, [job()])
    assert (sample.error, sample.tokens, sample.timeline.count) == ("", 5, 5)


def test_a_server_that_takes_the_option_and_does_not_heed_it_is_known_not_to_count():
    async def deaf(body: dict[str, Any], stream: Stream) -> None:
        stream.begin()
        await stream.token()
        await stream.event({"choices": [], "usage": {"completion_tokens": 1}})
        await stream.end()

    async def ask(url: str) -> bool:
        async with OpenAIStreams(url) as streams:
            known = await streams.describe("")
            return (await probe(streams, known, Asking(known), [1])).counts

    with ScriptedServer(answer=deaf) as server:
        assert not asyncio.run(ask(server.url))
        server.answer = steady
        assert asyncio.run(ask(server.url))


async def _refuses(body: dict[str, Any], stream: Stream) -> None:
    await stream.refuse(429, {"error": {"message": "queue full"}})


async def _breaks(body: dict[str, Any], stream: Stream) -> None:
    stream.begin()
    await stream.token(1)
    stream.cut()


async def _says_an_error(body: dict[str, Any], stream: Stream) -> None:
    stream.begin()
    await stream.token(1)
    await stream.raw(b'event: error\ndata: {"error": {"message": "engine died"}}\n\n')
    await stream.end()


async def _ends_early(body: dict[str, Any], stream: Stream) -> None:
    stream.begin()
    await stream.token(1)
    stream._writer.write(b"0\r\n\r\n")


async def _never_ends(body: dict[str, Any], stream: Stream) -> None:
    stream.begin()
    await stream.token(1)
    await asyncio.sleep(60)


async def _talks_nonsense(body: dict[str, Any], stream: Stream) -> None:
    stream.begin()
    await stream.event(b"{nonsense")


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (_refuses, "HTTP 429"),
        (_breaks, "connection lost"),
        (_says_an_error, "error event"),
        (_ends_early, "stream cut short"),
        (_never_ends, "not finished in time"),
        (_talks_nonsense, "unreadable answer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_failure_is_counted_by_kind_and_keeps_no_promise(answer: Callable[..., Any], kind: str):
    sample = one(answer, drain_s=0.5 if answer is _never_ends else 30.0)
    found = report([sample], IDLE)
    assert sample.error == kind
    assert (found.completed, found.failed, found.errors[kind]["count"]) == (0, 1, 1)
    assert (found.attainment.met, found.goodput) == (0.0, 0.0)
    json.dumps(columns([sample]))


def test_a_dead_server_fails_each_request_and_the_others_keep_their_figures():
    with ScriptedServer() as server:
        url = server.url
        samples = load(server, [job()])

    async def afterwards() -> list[Sample]:
        async with OpenAIStreams(url) as streams:
            body = Asking(Server(url, "m", "", "", None)).body([1], job())
            more, _ = await run_load(streams, [job(), job(0.01)], [body, body], drain_s=60)
            return more

    found = report(samples + asyncio.run(afterwards()), IDLE)
    assert (found.completed, found.failed) == (1, 2)
    assert found.errors["no connection"]["count"] == 2


def test_a_server_that_dies_at_once_is_given_no_rate_of_the_moment_that_it_lived():
    with ScriptedServer() as server:
        answered = load(server, [job()])
    lost = [new_sample(job(at=float(at))) for at in (1, 10)]
    for sample in lost:
        sample.error, sample.finished = "no connection", 0.001
    found = report(answered + lost, IDLE)
    assert found.attainment.met == pytest.approx(1 / 3)
    assert found.duration >= 10.0
    assert found.goodput <= 0.1 and found.output_tokens_per_s <= 0.5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--trace", "/nowhere/trace.csv"), "/nowhere/trace.csv"),
        (("--arrivals", "soon"), "arrivals='soon'"),
        (("--duration", "-1"), "duration=-1.0"),
        (("--scale", "nan"), "scale=nan"),
        (("--vocab", "10"), "vocab=10"),
        (("--warmup", "-1"), "warmup=-1"),
        (("--drain", "nan"), "drain=nan"),
        (("--json", "/"), "'/' is a folder"),
        (("--url", "127.0.0.1:9"), "url='127.0.0.1:9'"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_is_wrong_is_said_before_a_server_is_asked(
    run: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], said: str
):
    status, _, err = run("bench", "serve", "--url", "http://127.0.0.1:9", *arguments)
    assert status == 2 and "Traceback" not in err
    assert said in err


def test_times_count_from_when_a_request_was_due_not_from_when_it_was_sent():
    sample = new_sample(job(at=3.0))

    async def late() -> None:
        clock = iter([10.5, 10.6, 10.7, 10.8, 10.9])
        async with OpenAIStreams("http://127.0.0.1:9") as streams:
            await streams.stream(b"{}", sample, 7.0, lambda: next(clock))

    asyncio.run(late())
    assert sample.sent == pytest.approx(0.5)
    assert sample.finished == pytest.approx(0.6) and sample.error == "no connection"


def test_vllms_priority_is_the_deadline_of_the_first_token():
    asks = Asking(Server("", "m", "vllm", "", None), priority="edf")
    assert json.loads(asks.body([1], job(at=2.0)))["priority"] == 3000
    assert "priority" not in json.loads(Asking(asks.server).body([1], job()))


def test_an_slo_goes_out_in_milliseconds_and_only_where_it_is_sent():
    server = Server("", "m", "superinfer", "", None)
    assert json.loads(Asking(server, send_slo=True).body([1], job()))["slo"] == {"ttft_ms": 1000.0, "tbt_ms": 100.0}
    assert "slo" not in json.loads(Asking(server).body([1], job()))


def test_a_busy_client_says_so():
    assert ClientDelay([0.0] * 100, [0.001] * 100, 0.2).warning == ""
    assert "sent over 500 ms late" in ClientDelay([0.0] * 50 + [0.5] * 50, [0.0], 0.2).warning
    assert "read" in ClientDelay([0.0], [0.2] * 10, 0.2).warning
    assert "99%" in ClientDelay([0.0], [0.0], 0.99).warning


def test_the_stages_of_a_late_request_sum_to_what_its_client_saw():
    sample = new_sample(job())
    sample.timeline.tokens(1, 2.0)
    sample.timeline.tokens(4, 2.5)
    sample.tokens, sample.finished = 5, 2.6
    sample.engine = EngineSlo(
        e2e_ms=2400, queue_ms=1500, prefill_ms=100, decode_ms=300, rotated_ms=450, copy_wait_ms=50, lateness_ms=950,
        met=False, why="queue",
    )  # fmt: skip
    assert sum(stages_of(sample).values()) == pytest.approx(2.6)
    assert stages_of(sample)["client"] == pytest.approx(0.2)
    found = report([sample], IDLE)
    assert found.late_by == {"queue": 1} and found.late_stages["rotated out"] == pytest.approx(0.45)
    sample.engine.met, sample.engine.lateness_ms, sample.engine.why = True, -100.0, ""
    assert report([sample], IDLE).late_by == {"client": 1}


def test_what_is_no_server_is_said_clearly():
    async def describe(url: str, model: str = "") -> None:
        async with OpenAIStreams(url) as streams:
            await streams.describe(model)

    with pytest.raises(EngineUnavailableError, match="no server answers at http"):
        asyncio.run(describe("http://127.0.0.1:9/v1"))
    with ScriptedServer() as server, pytest.raises(InvalidRequestError, match="'other' is not served"):
        asyncio.run(describe(server.url, "other"))


def test_a_request_that_a_server_refuses_outright_ends_the_command_with_its_words():
    async def ask(server: ScriptedServer) -> None:
        async with OpenAIStreams(server.url) as streams:
            known = await streams.describe("")
            await probe(streams, known, Asking(known), [1])

    async def no_ids(body: dict[str, Any], stream: Stream) -> None:
        await stream.refuse(400, {"error": {"message": "prompt must be a string"}})

    with ScriptedServer(answer=no_ids) as server, pytest.raises(InvalidRequestError, match="prompt must be a string"):
        asyncio.run(ask(server))


@pytest.mark.parametrize(
    "options,reason",
    [
        (("--prompt-tokens", "300"), "--prompt-tokens '300': workload 'sharegpt' has lengths of its own"),
        (("--workload", "lmsys", "--output-tokens", "9"), "--output-tokens '9': workload 'lmsys' has lengths"),
        (("--workload", "uniform", "--trace", "a.csv"), "workload 'uniform' reads no trace"),
        (("--workload", "uniform", "--arrivals", "trace"), "workload 'uniform' reads no trace"),
    ],
)
def test_an_option_that_the_workload_does_not_heed_is_refused(
    run: Callable[..., tuple[int, str, str]], options: tuple[str, ...], reason: str
):
    status, _, err = run("bench", "serve", "--url", "http://127.0.0.1:9", *options)
    assert status == 2 and reason in err


def test_lengths_of_ones_own_have_one_name(run: Callable[..., tuple[int, str, str]]):
    status, _, err = run("bench", "serve", "--url", "http://127.0.0.1:9", "--workload", "fixed")
    assert status == 2 and "workload 'fixed' is unknown; choose one of sharegpt" in err and "mooncake, uniform" in err


def test_the_command_measures_our_server_and_breaks_lateness_down(
    start: Callable[..., Any], run: Callable[..., tuple[int, str, str]], tiny_engine: Any, tmp_path: Path
):
    server = start("serve", "--port", "0", "--engine", tiny_engine.address)
    url = server.line("serving at").split()[2]
    out = tmp_path / "found.json"
    arguments = ["--url", url, "--workload", "uniform", "--prompt-tokens", "5:40", "--output-tokens", "3:9"]
    arguments += ["--rate", "15", "--duration", "2", "--slo", "0.5: ttft=0.0001; 0.5: ttft=30,tbt=10", "--send-slo"]
    status, text, err = run("bench", "serve", *arguments, "--vocab", "90", "--warmup", "2", "--json", str(out))
    assert status == 0, err
    found = json.loads(out.read_text())
    (one_run,) = found["runs"]
    parsed = LoadReport(**{name: one_run["report"][name] for name in LoadReport.__struct_fields__})
    assert found["server"]["owned_by"] == "superinfer" and found["server"]["counts"] and found["sent_slo"]
    # On a busy machine several tokens come at once; that single ones do is tests/runtime/server's.
    assert parsed.completed == parsed.requests > 15 and 1.0 <= parsed.tokens_per_chunk < 9.0
    samples = one_run["samples"]
    asked = [9 >= count >= 3 for count in samples["output_tokens"]]
    assert all(asked) and len(asked) == parsed.requests
    stages = ("queue", "prefill", "rotated out", "copy wait", "preempted", "decode", "client")
    for at, e2e in enumerate(samples["e2e"]):
        assert sum(samples[f"{stage} s"][at] for stage in stages) == pytest.approx(e2e, abs=1e-4)
    late = [at for at, met in enumerate(samples["met"]) if met is False]
    assert late and sum(parsed.late_by.values()) == len(late)
    assert all(samples["why"][at] in stages for at in late)
    assert found["commit"] is not None and found["versions"]["aiohttp"] and "cores" in found["device"]
    assert "whole timeline kept" in text


def test_what_our_server_refuses_is_counted_and_the_warm_up_promises_nothing(
    start: Callable[..., Any], run: Callable[..., tuple[int, str, str]], tiny_config: EngineConfig, tmp_path: Path
):
    config = msgspec.structs.replace(tiny_config, policy="rota", admission="refuse")
    out = tmp_path / "found.json"
    with launch_engine(config) as engine:
        server = start("serve", "--port", "0", "--engine", engine.address)
        arguments = ["--url", server.line("serving at").split()[2], "--workload", "uniform", "--prompt-tokens", "5"]
        arguments += [
            "--output-tokens",
            "200",
            "--rate",
            "40",
            "--duration",
            "1",
            "--slo",
            "deadline=0.01",
            "--send-slo",
        ]
        status, _, err = run("bench", "serve", *arguments, "--vocab", "90", "--warmup", "8", "--json", str(out))
    assert status == 0, err
    (one_run,) = json.loads(out.read_text())["runs"]
    found, samples = one_run["report"], one_run["samples"]
    refused = [error for error in samples["error"] if error]
    assert len(refused) == found["failed"] == sum(kind["count"] for kind in found["errors"].values()) > 0
    assert all("cannot keep what was promised" in kind["example"] for kind in found["errors"].values())
    assert found["attainment"]["met"] == 0.0 and found["attainment"]["requests"] == len(samples["error"])
    assert sum(found["late_by"].values()) == found["completed"]
