"""The command line: `superinfer demo | run | serve | chat | engine`.

Only typer and rich are imported until a command runs, so that `--help` comes at once.
"""

from superinfer.cli.main import main as main
