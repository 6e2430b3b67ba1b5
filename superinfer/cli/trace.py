"""The `trace` commands: what can be made of an engine's trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from superinfer.errors import InvalidRequestError

app = typer.Typer(help="Draw what an engine's trace says.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command()
def plot(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What an engine wrote with --trace.")],
    out: Annotated[Path, typer.Option(help="Where to save the picture; .png, .svg or .pdf.")] = Path("rotation.png"),
    requests: Annotated[
        str,
        typer.Option(
            help="Which requests to draw: their numbers in the trace, with commas.",
            show_default="up to three that were rotated",
        ),
    ] = "",
    begin: Annotated[
        float | None, typer.Option("--from", help="Where the close view begins, s.", show_default="around one exchange")
    ] = None,
    end: Annotated[
        float | None, typer.Option("--to", help="Where it ends, s.", show_default="behind that exchange")
    ] = None,
    title: Annotated[str, typer.Option(help="Above the picture.", show_default="the trace's name")] = "",
) -> None:
    """Draw a rotation: steps, copies each way, and the life of some requests across the tiers (needs matplotlib)."""
    from superinfer.cli.trace_file import read_trace
    from superinfer.cli.trace_picture import choose_view, save_picture

    trace = read_trace(file)
    try:
        chosen = [int(part) for part in requests.split(",") if part.strip()]
    except ValueError:
        raise InvalidRequestError(f"--requests {requests!r} is not a list of numbers, like 3,7,12") from None
    view = choose_view(trace, chosen, begin, end)
    save_picture(trace, view, out, title or file.name)
    print(
        f"requests {', '.join(str(life.id) for life in view.lives)}, from {view.begin:.3f} to {view.end:.3f} s: "
        f"written to {out}"
    )
