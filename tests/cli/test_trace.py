"""The picture of a rotation, from the trace of a real engine to the file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from superinfer.cli.trace_file import DECODE, IN_HOST, MOVING_IN, MOVING_OUT, PREFILL, WAITING, read_trace
from superinfer.cli.trace_picture import choose_view, save_picture
from superinfer.errors import InvalidRequestError, UnsupportedError
from superinfer.runtime.client import EngineClient, new_request_id
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import launch_engine
from superinfer.runtime.protocol import Generate, SamplingParams
from superinfer.runtime.tracing import COPIES_IN, COPIES_OUT, MIRRORING

REQUESTS = 10
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def rotated(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The trace of an engine that takes turns, and how often it rotated."""
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    config = EngineConfig(
        model=str(random_llama),
        kv_tokens=256,
        dram_tokens=4096,
        max_batch_size=8,
        max_batch_tokens=64,
        page_size=8,
        policy="lru",
        link_gbps=0.5,
        trace=str(path),
    )
    sampling = SamplingParams(max_tokens=100, ignore_eos=True)
    with launch_engine(config) as engine, EngineClient(engine.address) as client:
        asks = [
            Generate(request_id=new_request_id(), prompt=[at + 3] * 20, sampling=sampling) for at in range(REQUESTS)
        ]
        with ThreadPoolExecutor(REQUESTS) as threads:
            list(threads.map(lambda ask: list(client.generate(ask)), asks))
        tiers = client.stats().tiers
    assert tiers is not None and tiers.rotations_out > 0
    return path, tiers.rotations_out


def test_every_rotation_is_in_the_trace_and_a_life_has_no_gap(rotated: tuple[Path, int]) -> None:
    path, rotations = rotated
    trace = read_trace(path)
    assert len(trace.lives) == REQUESTS
    in_host = [stage for life in trace.lives.values() for stage in life.stages if stage.name == "rotated out"]
    assert len(in_host) == rotations
    moves_in = [move for life in trace.lives.values() for move in life.moves if move.name == MOVING_IN]
    assert moves_in, "the private tail at least has to come back"
    for life in trace.lives.values():
        places = life.places()
        assert {place.name for place in places} <= {WAITING, PREFILL, DECODE, MOVING_OUT, IN_HOST, MOVING_IN}
        assert places[0].begin == life.stages[0].begin and places[-1].end == life.stages[-1].end
        assert sum(p.end - p.begin for p in places) == pytest.approx(places[-1].end - places[0].begin, abs=1e-4)
        for move in life.moves:
            copies = trace.tracks[COPIES_IN if move.name == MOVING_IN else COPIES_OUT]
            assert any(abs(copy.end - move.end) < 1e-5 for copy in copies), "it ends with a report of copies"
    shown = {place.name for life in trace.lives.values() for place in life.places()}
    assert {MOVING_OUT, MOVING_IN} <= shown
    assert trace.tracks[MIRRORING]


def test_the_command_draws_it_and_says_what_it_drew(rotated: tuple[Path, int], tmp_path: Path, run: Run) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "rotation.png"
    status, said, err = run("trace", "plot", str(rotated[0]), "--out", str(out))
    assert status == 0, err
    assert said.startswith("requests ") and said.strip().endswith(f"written to {out}")
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and 10_000 < out.stat().st_size < 200_000


def test_the_window_and_the_requests_are_those_asked_for(rotated: tuple[Path, int]) -> None:
    trace = read_trace(rotated[0])
    view = choose_view(trace)
    assert 1 <= len(view.lives) <= 3 and all(life.moves for life in view.lives)
    moves = [move for life in view.lives for move in life.moves]
    assert any(view.begin <= move.begin and move.end <= view.end for move in moves), "an exchange is in the window"
    id = view.lives[-1].id
    asked = choose_view(trace, [id], 1.0, 2.5)
    assert ([life.id for life in asked.lives], asked.begin, asked.end) == ([id], 1.0, 2.5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--requests", "9999"), "request 9999 is not in the trace"),
        (("--requests", "one"), "'one' is not a list of numbers"),
        (("--from", "2", "--to", "1"), "window from 2.000 s to 1.000 s is empty"),
    ],
)
def test_what_cannot_be_drawn_is_one_clear_line(
    rotated: tuple[Path, int], run: Run, options: tuple[str, ...], says: str
) -> None:
    status, _, err = run("trace", "plot", str(rotated[0]), *options)
    assert status == 2 and says in err and "Traceback" not in err


@pytest.mark.parametrize("content", ["", "[1, 2]", "{}", '[{"ph":"M","name":"process_name","args":{"name":"lang"}}]'])
def test_a_file_that_is_no_engines_trace_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(InvalidRequestError, match="no trace of an engine"):
        read_trace(path)
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read_trace(tmp_path / "nowhere.json")


def test_a_trace_without_a_rotation_says_what_it_takes(rotated: tuple[Path, int], tmp_path: Path) -> None:
    events: list[dict[str, Any]] = json.loads(rotated[0].read_text())
    path = tmp_path / "still.json"
    path.write_text(json.dumps([e for e in events if not e.get("cat", "").startswith("moving")]))
    with pytest.raises(InvalidRequestError, match="--dram-tokens"):
        choose_view(read_trace(path))


def test_the_trace_of_a_killed_engine_is_read_up_to_its_last_whole_event(rotated: tuple[Path, int], tmp_path: Path):
    text = rotated[0].read_text()
    path = tmp_path / "killed.json"
    path.write_text(text[: len(text) * 3 // 4])
    whole, cut = read_trace(rotated[0]), read_trace(path)
    assert 0 < len(cut.tracks[COPIES_IN]) <= len(whole.tracks[COPIES_IN])
    stages = [sum(len(life.stages) for life in trace.lives.values()) for trace in (cut, whole)]
    assert 0 < stages[0] < stages[1]


def test_without_matplotlib_it_says_what_to_install(
    rotated: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trace = read_trace(rotated[0])
    with pytest.raises(UnsupportedError, match=r"superinfer\[plot\]"):
        save_picture(trace, choose_view(trace), tmp_path / "x.png", "x")


def test_a_picture_that_cannot_be_written_is_said(rotated: tuple[Path, int], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trace = read_trace(rotated[0])
    for name in ("nowhere/x.png", "x.nothing"):
        with pytest.raises(InvalidRequestError, match="cannot be written"):
            save_picture(trace, choose_view(trace), tmp_path / name, "x")
