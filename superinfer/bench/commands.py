"""The `bench` commands, a file for each: add yours to the tuple. They import what is slow when they run."""

from __future__ import annotations

import typer

from superinfer.bench.constrained import constrained
from superinfer.bench.kernels import kernels
from superinfer.bench.latency import latency
from superinfer.bench.link import link
from superinfer.bench.offline import offline
from superinfer.bench.programs import programs
from superinfer.bench.serve import serve

app = typer.Typer(help="Measure a server under load, an engine, its kernels.", no_args_is_help=True)

for command in (serve, offline, latency, kernels, link, programs, constrained):
    app.command()(command)
