"""`superinfer bench …`: a file for each command, registered below. They import what is slow when they run."""

from __future__ import annotations

import typer

from superinfer.bench.link import link

app = typer.Typer(help="Measure: a server under load, this engine, its kernels.", no_args_is_help=True)


@app.callback()
def _top() -> None:
    """Keeps the command's name needed while there is one command only."""


for command in (link,):
    app.command()(command)
