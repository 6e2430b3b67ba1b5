"""`superinfer run FILE`."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

Run = Callable[..., tuple[int, str, str]]

PROGRAM = """
import sys
import superinfer as si

@si.function
def ask(s, question):
    s += si.user(question)
    s += si.assistant(si.gen("answer", max_tokens=8, ignore_eos=True))

if __name__ == "__main__":
    state = ask.run(sys.argv[1])
    print(repr(sys.argv[1:]), len(state["answer"]) > 0)
"""


def test_a_program_runs_as_main_with_its_arguments(run: Run, tiny_engine: Any, tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    status, out, err = run("run", "--engine", tiny_engine.address, str(file), "why?", "--loud", "-h")
    assert (status, out) == (0, "['why?', '--loud', '-h'] True\n"), err


def test_a_missing_file_is_named(run: Run, tmp_path: Path) -> None:
    status, _, err = run("run", str(tmp_path / "none.py"))
    assert status == 2 and "none.py" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "program,error",
    [
        ("import json\n\ndef ask():\n    json.loads('{')\n\nask()\n", "json.decoder.JSONDecodeError: "),
        ("print(1 /)\n", "SyntaxError: "),
    ],
    ids=["raised", "not Python"],
)
def test_a_programs_own_error_is_shown_as_python_shows_it(
    run: Run, tiny_engine: Any, tmp_path: Path, program: str, error: str
) -> None:
    file = tmp_path / "program.py"
    file.write_text(program)
    status, _, err = run("run", "--engine", tiny_engine.address, str(file))
    python = subprocess.run([sys.executable, str(file)], capture_output=True, text=True)
    assert status == 1 and error in err
    assert err == python.stderr  # no frame of ours above the program's


def test_a_known_error_names_the_programs_line(run: Run, tiny_engine: Any, tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text("import superinfer as si\n\nsi.SLO\nraise si.InvalidRequestError('no such thing')\n")
    status, _, err = run("run", "--engine", tiny_engine.address, str(file))
    assert status == 1 and "Traceback" not in err
    assert "program.py, line 4: no such thing" in err


def test_a_stopped_program_leaves_no_engine(start: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text("import time\nprint('running', flush=True)\ntime.sleep(60)\n")
    command = start("run", "--model", str(tiny_checkpoint), "--load-format", "dummy", "--device", "cpu", str(file))
    command.line("running")
    children = command.children()
    assert children and command.left_behind()
    command.process.send_signal(signal.SIGTERM)
    assert command.end()[0] == 128 + signal.SIGTERM
    assert psutil.wait_procs(children, timeout=30)[1] == []
    assert command.left_behind() == []


def test_the_programs_exit_status_is_kept(run: Run, tiny_engine: Any, tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text("raise SystemExit(7)\n")
    assert run("run", "--engine", tiny_engine.address, str(file))[0] == 7
