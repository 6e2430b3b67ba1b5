"""The code in docs/language.md, docs/slo.md and docs/sessions.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scripted_client import ScriptedClient

DOCS = Path(__file__).parents[2] / "docs"
BLOCKS = [
    (name, code)
    for name in ("language.md", "slo.md", "sessions.md")
    for code in re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)
]


@pytest.mark.parametrize(("name", "code"), BLOCKS, ids=[f"{name} {i}" for i, (name, _) in enumerate(BLOCKS)])
def test_the_code_in_the_guides_runs(model: ScriptedClient, capsys, name: str, code: str) -> None:
    exec(compile(code, f"docs/{name}", "exec"), {"__name__": "docs"})
    assert "ok" in capsys.readouterr().out
    assert model.open == 0 and not model.cancelled


def test_there_is_code_in_all_guides() -> None:
    assert [name for name, _ in BLOCKS] == ["language.md"] * 3 + ["slo.md", "sessions.md"]
