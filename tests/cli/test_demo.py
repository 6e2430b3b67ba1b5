"""`superinfer demo` on a random model: the words are noise, the course of events is not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from superinfer.cli.demo import examples_folder

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def roomy_engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An engine whose context holds an agent's conversation: a token is a character here."""
    from chat_checkpoint import write_checkpoint

    from superinfer.runtime.config import EngineConfig
    from superinfer.runtime.launch import launch_engine

    path = write_checkpoint(tmp_path_factory.mktemp("roomy"), context=4096)
    config = EngineConfig(model=str(path), load_format="dummy", device="cpu", kv_tokens=16384, threads=1)
    with launch_engine(config) as engine:
        yield engine


def test_both_examples_run_and_every_call_is_in_the_table(run: Run, roomy_engine: Any) -> None:
    status, out, err = run("demo", "--engine", roomy_engine.address)
    assert (status, err) == (0, "")
    table = out[out.index("What was promised") :]
    for call in (
        "turn 0",
        "turn 1",
        "turn 2",
        "shop_assistant",
        "fork[0]/note",
        "fork[2]/note",
        "summary",
        "summarise",
    ):
        assert call in table
    assert table.count("deadline") == 9, "every call inherits one, both programs have one"
    assert table.count(" met") + table.count(" missed") >= 9


def test_the_openai_example_streams_and_reports(roomy_engine: Any, start: Callable[..., Any]) -> None:
    server = start("serve", "--port", "0", "--engine", roomy_engine.address)
    url = server.line("serving at").split()[2]
    example = Path(examples_folder()) / "openai_client.py"
    done = subprocess.run([sys.executable, str(example), url], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "first token after" in done.stdout.splitlines()[-1]
