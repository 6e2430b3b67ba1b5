"""The commands and their help; what each does is in the module of its name."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from superinfer.bench.commands import app as bench
from superinfer.cli.options import EngineAddress, check_unset, with_engine_options
from superinfer.cli.others_options import OURS
from superinfer.cli.server_options import with_server_options
from superinfer.cli.trace import app as trace
from superinfer.errors import InvalidRequestError, SuperinferError
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.server.settings import ServerSettings
from superinfer.runtime.sim.command import simulate

# Signals that end a process without unwinding it; as an exception they let the engine and its socket be cleaned up.
_ENDING = (signal.SIGTERM, signal.SIGHUP)


def _hint(error: Any) -> None:
    """Adds to click's errors of usage, or typer's own: what an option of another server is called here, and where a
    model goes that was given without its option."""
    if (ours := OURS.get(getattr(error, "option_name", ""))) is not None:
        error.possibilities = [ours]
    extra = re.match(r"Got unexpected extra argument.*\(([^\s)]+)", str(getattr(error, "message", "")))
    context = getattr(error, "ctx", None)
    if extra and context and any(parameter.name == "model" for parameter in context.command.params):
        error.message += f". Did you mean --model {extra[1]}?"


class _Group(TyperGroup):
    """Errors raised on purpose are one line for a person, with their exit status; Ctrl-C is 130, as shells expect."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SuperinferError as error:
            print_error(str(error))
            raise typer.Exit(error.exit_status) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except Exception as error:
            _hint(error)
            raise


app = typer.Typer(
    name="superinfer",
    cls=_Group,
    help="Serves large language models to a deadline: programs, a chat, or an OpenAI-compatible server.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit status: 0; 1 for an error, said in one line on stderr; 2 for wrong usage or a wrong value; 130
    for Ctrl-C."""
    for number in _ENDING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _exit)
    app(args=list(arguments) if arguments is not None else None, prog_name="superinfer")


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def print_error(message: str) -> None:
    """One line on stderr."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def _version(wanted: bool) -> None:
    if wanted:
        from superinfer.version import version as installed

        print(f"superinfer {installed()}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
@with_engine_options
def demo(
    config: EngineConfig,
    engine: EngineAddress = "",
    overload: Annotated[float, typer.Option(help="Seconds of each overloaded run; 0 leaves them out.")] = 10.0,
    against: Annotated[str, typer.Option(help="Policy to compare with fcfs.")] = "rota",
    picture: Annotated[Path, typer.Option(help="Where to save a picture of both runs.")] = Path("superinfer-demo.svg"),
) -> None:
    """Run two example programs with deadlines, then one overload under two policies, and show which promises were
    kept."""
    from superinfer.cli.demo import DemoOptions, run_demo

    run_demo(config, engine, DemoOptions(overload, against, picture))


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
@with_engine_options
def run(
    config: EngineConfig,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A Python file with a superinfer program.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[ARGUMENTS]...", help="Passed to FILE.")] = None,
    engine: EngineAddress = "",
) -> None:
    """Run FILE with an engine as its default backend. Options of this command go before FILE."""
    from superinfer.cli.run import run_file

    run_file(file, arguments or [], config, engine)


@app.command()
@with_engine_options
@with_server_options
def serve(
    config: EngineConfig,
    settings: ServerSettings,
    engine: EngineAddress = "",
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one.")] = 8000,
    engine_address: Annotated[
        str,
        typer.Option(
            help="Where the engine that is started listens, for programs beside HTTP: ipc://PATH or tcp://HOST:PORT.",
            show_default="private",
        ),
    ] = "",
) -> None:
    """Serve the OpenAI API, and a page that shows what the engine does, over HTTP until Ctrl-C or SIGTERM."""
    import msgspec

    from superinfer.cli.engines import start_progress
    from superinfer.runtime.server.serve import serve

    if engine and engine_address:
        raise InvalidRequestError(
            f"--engine {engine} runs already; --engine-address {engine_address} is of one to start: give one"
        )
    if engine:
        check_unset(config, f"--engine {engine}")
    config = msgspec.structs.replace(config, address=engine_address)

    def ready(url: str) -> None:
        progress.close()
        print(f"serving at {url}/v1 and showing at {url}/ (Ctrl-C to stop)", flush=True)

    with start_progress("starting the engine") as progress:
        serve(engine or config, settings, host=host, port=port, on_progress=progress, on_ready=ready)


@app.command()
@with_engine_options
def chat(
    config: EngineConfig,
    engine: EngineAddress = "",
    url: Annotated[
        str, typer.Option(help="Chat with an OpenAI endpoint instead: http://HOST:PORT or with a path.")
    ] = "",
    api_key: Annotated[str, typer.Option(help="Key for --url.", envvar="OPENAI_API_KEY", show_envvar=True)] = "",
    system: Annotated[str, typer.Option(help="A system prompt.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 0.7,
) -> None:
    """Chat in the terminal. Reads questions line by line from a pipe too."""
    from superinfer.cli.chat import ChatOptions, run_chat

    if url and engine:
        raise InvalidRequestError(f"--url {url} and --engine {engine} exclude each other; give one")
    if url:
        check_unset(config, f"--url {url}")
    run_chat(config, engine, url, api_key, ChatOptions(system=system, max_tokens=max_tokens, temperature=temperature))


@app.command()
@with_engine_options
def engine(
    config: EngineConfig,
    address: Annotated[
        str, typer.Option(help="Where to listen: ipc://PATH or tcp://HOST:PORT.")
    ] = "tcp://127.0.0.1:5555",
) -> None:
    """Run an engine in the foreground, for other commands and programs to use with its address."""
    from superinfer.cli.engines import run_engine

    run_engine(config, address)


app.command()(simulate)
app.add_typer(bench, name="bench")
app.add_typer(trace, name="trace")
