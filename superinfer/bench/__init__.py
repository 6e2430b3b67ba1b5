"""`superinfer bench …`: a file for each command, registered below. They import what is slow when they run."""

from __future__ import annotations

import typer

from superinfer.bench.serve import serve

app = typer.Typer(help="Measure: a server under load, this engine, its kernels.", no_args_is_help=True)

for command in (serve,):
    app.command()(command)
