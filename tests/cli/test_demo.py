"""`superinfer demo` on a random model: the words are noise, the course of events is not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from superinfer.cli.demo import examples_folder

Run = Callable[..., tuple[int, str, str]]


def test_both_examples_run_and_every_call_is_in_the_table(run: Run, tiny_engine: Any) -> None:
    status, out, err = run("demo", "--engine", tiny_engine.address)
    assert (status, err) == (0, "")
    table = out[out.index("What was promised") :]
    for call in ("turn 0", "turn 1", "turn 2", "fork[0]/note", "fork[2]/note", "summary"):
        assert call in table
    assert "shop_assistant" in table and "summarise" in table
    assert table.count("deadline") == 9, "every call inherits one, both programs have one"
    assert table.count(" met") + table.count(" missed") >= 9
    assert "not ours to overload" in out


def test_the_openai_example_streams_and_reports(tiny_engine: Any, start: Callable[..., Any]) -> None:
    server = start("serve", "--port", "0", "--engine", tiny_engine.address)
    url = server.line("serving at").split()[2]
    example = Path(examples_folder()) / "openai_client.py"
    done = subprocess.run([sys.executable, str(example), url], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "first token after" in done.stdout.splitlines()[-1]
