"""`superinfer bench constrained`: both arms are measured, and an output that breaks its schema fails the command."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from superinfer.bench.constrained_schemas import SCHEMAS, Invoice, Line, wrong_outputs
from superinfer.cli import main
from superinfer.runtime.tokenization import Tokenizer


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "constrained", *arguments])
    shown = capsys.readouterr()
    return int(ended.value.code or 0), shown.out, shown.err


@pytest.mark.slow
def test_both_arms_are_timed_and_every_output_is_read(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, tmp_path: Path
):
    out = tmp_path / "constrained.json"
    engine = ("--model", str(tiny_checkpoint), "--load-format", "dummy", "--device", "cpu", "--threads", "1")
    sizes = ("--batch", "2", "--rounds", "1", "--temperatures", "1", "--prompt-tokens", "5", "--kv-tokens", "8192")
    status, text, err = run(capsys, *engine, *sizes, "--json", str(out))
    assert status == 0, err
    (one,) = json.loads(out.read_text())["results"]
    assert one["outputs"] == 4 and one["wrong"] == [] and "0 of them wrong" in text
    (constrained,), (free,) = one["rounds"]["constrained"], one["rounds"]["free"]
    assert one["slower"] == pytest.approx(constrained["token_ms"] / free["token_ms"] - 1)
    assert constrained["ends"] == ["stop"] * 2 and free["ends"] == ["length"] * 2
    assert len(set(free["tokens"])) == 1 and constrained["window_s"] > 0


def test_an_output_that_breaks_its_schema_is_found(tiny_checkpoint: Path):
    tokenizer = Tokenizer(str(tiny_checkpoint))
    good = msgspec.json.encode(Invoice(1, "EUR", True, [Line("a", 1, 0)] * 10)).decode()
    texts = ["{}", good, good.replace("EUR", "GBP"), good, good[:-1]]
    outputs = [[], *[tokenizer.encode(text) for text in (texts[1], "{}", texts[2], "{}", texts[1])]]
    found = wrong_outputs(tokenizer, outputs, ["stop", "stop", "stop", "stop", "stop", "length"])
    assert len(found) == 5 and "GBP" in found[2] and found[4].startswith("ended by length")
    assert SCHEMAS[1] is Invoice


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--batch", "65"), "--batch 65 is more than --max-batch-size 64"),
        (("--temperatures", "warm"), "--temperatures 'warm' must be numbers"),
        (("--rounds", "0"), "rounds=0"),
    ],
)
def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str):
    status, _, err = run(capsys, *arguments)
    assert status == 2 and said in err
