"""`python -m superinfer.runtime.sim`: the simulator as a command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from superinfer.errors import SuperinferError
from superinfer.runtime.sim.command import simulate


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 for an error, in one line on stderr; 2 for wrong usage or a wrong value; 130 for Ctrl-C."""
    app = typer.Typer(
        pretty_exceptions_enable=False, add_completion=False, context_settings={"help_option_names": ["-h", "--help"]}
    )
    app.command()(simulate)
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="superinfer.runtime.sim")
    except SuperinferError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_status
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
