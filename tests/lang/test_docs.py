"""The code in docs/language.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scripted_client import ScriptedClient

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/language.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=[f"block {i}" for i in range(len(BLOCKS))])
def test_the_code_in_the_language_guide_runs(model: ScriptedClient, capsys, code: str) -> None:
    exec(compile(code, "docs/language.md", "exec"), {"__name__": "docs"})
    assert "ok" in capsys.readouterr().out
    assert model.open == 0 and not model.cancelled


def test_there_is_code_in_the_language_guide() -> None:
    assert len(BLOCKS) == 3
