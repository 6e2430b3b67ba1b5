"""`superinfer bench serve`: load on any OpenAI-compatible server, ours and others measured by the same client."""

from __future__ import annotations

import asyncio
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from superinfer.errors import InvalidRequestError, SuperinferError, UnsupportedError
from superinfer.runtime.sim.command import Promises, parse_slos

if TYPE_CHECKING:
    from superinfer.bench.load import Asking
    from superinfer.bench.load_report import LoadReport
    from superinfer.bench.openai_stream import OpenAIStreams, Sample, Server
    from superinfer.bench.workload import Load
    from superinfer.runtime.sim.workload import Job


def serve(
    url: Annotated[str, typer.Option(help="The server: http://HOST:PORT, with or without /v1.")],
    model: Annotated[str, typer.Option(help="Which of its models.", show_default="the first")] = "",
    api_key: Annotated[str, typer.Option(help="Sent as bearer.", envvar="OPENAI_API_KEY", show_envvar=True)] = "",
    workload: Annotated[
        str, typer.Option(help="sharegpt, lmsys, azure, mooncake or uniform.", show_default="by trace")
    ] = "",
    trace: Annotated[Path | None, typer.Option(help="A trace's file: Azure's CSV, or Mooncake's JSON lines.")] = None,
    prompt_tokens: Annotated[
        str, typer.Option(help="Prompts' lengths with uniform: 512, or 100:1024.", show_default="512")
    ] = "",
    output_tokens: Annotated[str, typer.Option(help="The same, of outputs.", show_default="128")] = "",
    scale: Annotated[float, typer.Option(help="Multiplies all lengths, for models with a short context.")] = 1.0,
    rate: Annotated[str, typer.Option(help="Requests/s; several with commas are run one after another.")] = "1",
    arrivals: Annotated[str, typer.Option(help="poisson, or trace: the trace's own times, stretched.")] = "poisson",
    duration: Annotated[float, typer.Option(help="Seconds of arrivals.")] = 60.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same requests at the same times.")] = 0,
    slo: Promises = "ttft=1,tbt=0.1",
    send_slo: Annotated[bool, typer.Option("--send-slo", help="Tell a superinfer server the promises.")] = False,
    priority: Annotated[
        str, typer.Option(help="edf: send `priority` as vLLM knows it, arrival plus TTFT objective, ms.")
    ] = "",
    ignore_eos: Annotated[bool, typer.Option(help="Outputs of exactly the lengths asked for.")] = True,
    vocab: Annotated[int, typer.Option(help="Prompts are random token ids below this.")] = 2000,
    warmup: Annotated[int, typer.Option(help="Requests sent before, at once, and not counted.")] = 8,
    drain: Annotated[float, typer.Option(help="Seconds to wait after the last arrival.")] = 300.0,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write everything here, raw samples included; - is stdout.")
    ] = None,
) -> None:
    """Send requests to a server at a rate, whatever it answers, and say which promises it kept."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in locals().items()}
    del settings["api_key"]
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise UnsupportedError("bench serve needs aiohttp; install it with: pip install 'superinfer[bench]'") from None
    from superinfer.bench.workload import FIRST_TOKEN, UNIFORM, Load, Span, make_load, workload_name
    from superinfer.out_file import check_writable

    check_writable(json_path, or_stdout=True)
    if priority not in ("", "edf"):
        raise InvalidRequestError(f"priority={priority!r} must be edf, or not given")
    if vocab <= FIRST_TOKEN:
        raise InvalidRequestError(
            f"vocab={vocab} must be above {FIRST_TOKEN}: prompts are token ids from {FIRST_TOKEN} on"
        )
    if warmup < 0:
        raise InvalidRequestError(f"warmup={warmup} must be at least 0")
    if not drain >= 0:
        raise InvalidRequestError(f"drain={drain} must be at least 0 seconds")
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        raise InvalidRequestError(f"url={url!r} must be http://HOST:PORT or https://HOST:PORT")
    named = workload_name(workload, trace)
    for option, given in (("--prompt-tokens", prompt_tokens), ("--output-tokens", output_tokens)):
        if given and named != UNIFORM:
            raise InvalidRequestError(
                f"{option} {given!r}: workload {named!r} has lengths of its own; give --workload {UNIFORM} with it"
            )
    load = Load(
        workload=named,
        trace=trace,
        prompt_tokens=Span.parse("--prompt-tokens", prompt_tokens or "512"),
        output_tokens=Span.parse("--output-tokens", output_tokens or "128"),
        scale=scale,
        arrivals=arrivals,
        duration=duration,
        seed=seed,
        slos=tuple(parse_slos(slo)),
    )
    rates = _rates(rate)
    for each in rates:
        make_load(load, each)  # so that what is wrong with it is said before a server is asked
    command = _Command(url, model, api_key, load, rates, send_slo, priority, ignore_eos, vocab, warmup, drain)
    found = asyncio.run(command.run(quiet=str(json_path) == "-"))
    _write(json_path, settings, found)
    if not any(run["report"]["completed"] for run in found["runs"]):
        raise SuperinferError(f"no request was answered: {found['runs'][0]['report']['errors']}")


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        rates = []
    if not rates or min(rates) <= 0:
        raise InvalidRequestError(f"--rate {text!r} must be numbers above 0, several with commas")
    return rates


def _write(path: Path | None, settings: dict[str, Any], found: dict[str, Any]) -> None:
    from superinfer.bench.record import environment, write_record
    from superinfer.out_file import json_text

    if path is None:
        return
    command, measured = shlex.join(["superinfer", *_arguments()]), {"settings": settings, **found}
    if str(path) == "-":
        print(json_text(environment(command) | measured))
    else:
        print(f"written to {write_record(path, command, measured)}", file=sys.stderr)


def _arguments() -> list[str]:
    """The command line as given, but for a key."""
    given = list(sys.argv[1:])
    return ["…" if at and given[at - 1] == "--api-key" else part for at, part in enumerate(given)]


class _Command:
    """One call of the command."""

    def __init__(
        self, url: str, model: str, api_key: str, load: Load, rates: list[float], send_slo: bool, priority: str,
        ignore_eos: bool, vocab: int, warmup: int, drain: float,
    ) -> None:  # fmt: skip
        self._url, self._model, self._api_key = url, model, api_key
        self._load, self._rates = load, rates
        self._send_slo, self._priority, self._ignore_eos = send_slo, priority, ignore_eos
        self._vocab, self._warmup, self._drain = vocab, warmup, drain

    async def run(self, quiet: bool) -> dict[str, Any]:
        """All rates, one after another, as JSON knows them."""
        import msgspec
        from rich.console import Console

        from superinfer.bench.load_report import columns, report
        from superinfer.bench.load_table import table
        from superinfer.bench.openai_stream import OpenAIStreams

        runs = []
        async with OpenAIStreams(self._url, self._api_key) as streams:
            asking = await self._asking(streams)
            server = asking.server
            await self._warm_up(streams, asking)
            for number, rate in enumerate(self._rates):
                jobs, skipped = self._jobs(rate, server)
                seed = self._load.seed + 1000 * number  # no run finds another's prompts in a cache
                samples, delay = await self._one(streams, asking, jobs, seed, f"{rate:g}/s")
                found = report(samples, delay)
                if not quiet:
                    title = f"{server.model} at {server.url}, {self._load.workload}, {rate:g} requests/s"
                    Console(width=None if sys.stdout.isatty() else 120).print(table(found, title))
                    _say_warnings(found, server, skipped)
                runs.append(
                    {
                        "rate": rate,
                        "skipped": skipped,
                        "report": msgspec.to_builtins(found),
                        "samples": columns(samples),
                    }
                )
        return {"server": vars(server), "sent_slo": asking.send_slo, "runs": runs}

    async def _asking(self, streams: OpenAIStreams) -> Asking:
        from dataclasses import replace

        from superinfer.bench.load import Asking, probe

        server = await streams.describe(self._model)
        if self._send_slo and not server.is_superinfer:
            print(f"the server is {server.owned_by or 'unknown'}, not superinfer: no slo is sent", file=sys.stderr)
        asking = Asking(server, self._ignore_eos, self._send_slo and server.is_superinfer, self._priority)
        return replace(asking, server=await probe(streams, server, asking, list(range(10, 18))))

    def _jobs(self, rate: float, server: Server) -> tuple[list[Job], int]:
        """The jobs that the server's context holds, and how many it does not."""
        from superinfer.bench.workload import make_load

        jobs = make_load(self._load, rate)
        room = server.max_model_len
        fitting = [job for job in jobs if room is None or job.prompt_length + job.output_length <= room]
        if not fitting:
            raise InvalidRequestError(
                f"none of {len(jobs)} requests fits the server's context of {room} tokens; lower --scale"
            )
        return fitting, len(jobs) - len(fitting)

    async def _warm_up(self, streams: OpenAIStreams, asking: Asking) -> None:
        """Other prompts of the same lengths, so that nothing of them is found in a cache later. Without promises: all
        come at once, and a server may refuse what it cannot keep."""
        if self._warmup <= 0:
            return
        from superinfer.bench.load import run_load
        from superinfer.bench.workload import prompts_of

        first = self._jobs(self._rates[0], asking.server)[0][: self._warmup]
        jobs = [job._replace(at=0.0, slo=None) for job in first]
        prompts = prompts_of(jobs, self._vocab, self._load.seed + 1)
        bodies = [asking.body(prompt, job) for prompt, job in zip(prompts, jobs, strict=True)]
        samples, _ = await run_load(streams, jobs, bodies, drain_s=self._drain)
        failed = [sample for sample in samples if sample.error]
        if failed:
            why = f"{failed[0].error} {failed[0].detail}"
            raise SuperinferError(f"{len(failed)} of {len(jobs)} warm-up requests failed: {why}")

    async def _one(self, streams: OpenAIStreams, asking: Asking, jobs: list[Job], seed: int, what: str) -> Any:
        from superinfer.bench.load import run_load
        from superinfer.bench.progress import Bar
        from superinfer.bench.workload import prompts_of

        bodies = []
        with Bar(f"{what}: making prompts", len(jobs)) as bar:
            for prompt, job in zip(prompts_of(jobs, self._vocab, seed), jobs, strict=True):
                bodies.append(asking.body(prompt, job))
                bar.advance()
        failed = 0
        with Bar(what, len(jobs)) as bar:

            def finished(sample: Sample) -> None:
                nonlocal failed
                failed += bool(sample.error)
                bar.advance(f"({failed} failed)" if failed else "")

            return await run_load(streams, jobs, bodies, drain_s=self._drain, on_finished=finished)


def _say_warnings(found: LoadReport, server: Server, skipped: int) -> None:
    if found.client_warning:
        print(f"warning: {found.client_warning}", file=sys.stderr)
    if skipped:
        print(f"{skipped} requests are longer than the server's context and were not sent", file=sys.stderr)
    if not server.counts:
        print("the server does not count tokens in its chunks: each chunk is taken for one", file=sys.stderr)
