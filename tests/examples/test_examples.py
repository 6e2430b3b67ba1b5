"""Every example runs as a person would run it, on the embedded model, and says something sensible."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import superinfer

ROOT = Path(__file__).parents[2]
EMBEDDED = Path(superinfer.__file__).parent / "embedded"

pytestmark = pytest.mark.skipif(not any(EMBEDDED.glob("*.safetensors")), reason="the embedded model is not built yet")


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, f"examples/{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def test_few_shot_qa_answers_from_the_contexts() -> None:
    lines = run("few_shot_qa.py").splitlines()
    assert [line.split("  ")[1] for line in lines] == ["$45", "pilot", "Tom Berg"]


def test_the_agent_calls_its_tools_and_keeps_its_deadline() -> None:
    out = run("agent_with_tools.py")
    for expected in ("lookup(price of lamp) = 9", "calculator(12 * 9) = 108", "calculator(30 * 9) = 270"):
        assert expected in out
    assert "cost 108." in out and "cost 270." in out and "40" in out
    assert out.splitlines()[-1].startswith("= shop_assistant") and out.splitlines()[-1].endswith("yes")


@pytest.mark.slow
def test_agents_at_once_call_their_tools_and_keep_their_deadlines() -> None:
    lines = run("agents_64.py", "--agents", "6", "--deadline", "600").splitlines()
    assert [line.split()[:5] for line in lines[1:3]] == [
        ["shop", "6", "of", "6", "9"],
        ["support", "6", "of", "6", "9"],
    ]
    assert lines[3] == "for example: 30 lamps cost 270." and lines[-1].startswith("6 agents in ")


def test_notes_are_taken_in_forks_and_merged() -> None:
    out = run("documents_fork_join.py")
    notes = ["Ghent is in Belgium.", "Anna works as a pilot.", "The lamp costs $45."]
    assert " ".join(notes) in out
    assert [f"fork[{i}]/note" in out for i in range(3)] == [True] * 3


def test_fields_are_extracted_as_json() -> None:
    assert [json.loads(line) for line in run("json_extraction.py").splitlines()] == [
        {"name": "Anna Berg", "city": "Lisbon", "phone": "271-2675"},
        {"name": "Max Patel", "city": "Oslo", "phone": None},
        {"name": "Mira Smith", "city": "Ghent", "phone": "529-3099"},
    ]


def test_the_chat_answers_and_reports() -> None:
    out = run("streaming_chat.py", "What is TTFT?", "Thank you.")
    assert "Model: TTFT is the time to first token" in out and "Model: You are welcome!" in out
    assert "ttft 2.00 s" in out
