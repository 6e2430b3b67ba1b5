"""The README's GPU tables: made from what was measured, on the H100 where there is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import readme_rooflines
    import readme_vllm

    for module in (readme_vllm, readme_rooflines):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path


def write(folder: Path, name: str, **record: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps(record))


def turns(arm: str, ms: float) -> dict[str, Any]:
    phase = {"working_set_tokens": 1000, "pool_tokens": 100, "ttft_returning": {"p50": ms / 1e3}}
    return {arm: {"phases": {"turns": phase}}}


def slo(name: str, met: float) -> dict[str, Any]:
    report = {"attainment": {"ttft_met": met, "met": met}}
    run = {"rate": 25.0, "report": report, "window_tokens_per_s": 100.0}
    return {name: {"pool_tokens": 16, "phases": {"slo": {"runs": [run]}}}}


def test_a_table_is_the_h100s_where_there_is_one_and_the_h200s_elsewhere(results: Path):
    from readme_vllm import beside_vllm

    assert beside_vllm() == ""
    settings = {"slo": {"ttft": 1, "tbt": 0.1}, "sizes": {"tight": 9600}, "slo_s": 60}
    write(results, "h200-vs-vllm-slo", arms=slo("ours-rota", 0.25), settings=settings)
    write(results, "h200-vs-vllm-ample-turns", arms=turns("ours-turns-tiers", 3) | turns("ours-turns", 9))
    assert "25.0%" in beside_vllm() and "(3.0 ×)" in beside_vllm() and "H100" not in beside_vllm()
    write(results, "h100-vs-vllm-slo", arms=slo("ours-rota", 0.75) | slo("vllm-tight", 0.5), settings=settings)
    found = beside_vllm()
    assert "75.0%" in found and "| vLLM | 50.0%" in found and "25.0%" not in found and "h100-vs-vllm-slo.json" in found
    assert "working set (H200)" in found and "(3.0 ×)" in found  # of the H100 nothing was measured there


def test_turns_of_two_records_make_one_sentence(results: Path):
    from readme_vllm import beside_vllm

    write(results, "h100-vs-vllm-ample-turns", arms=turns("ours-turns-tiers", 4) | turns("ours-turns", 8))
    write(results, "h100-vs-vllm-tiers", arms=turns("vllm-turns-offload", 6))
    assert "4.0 ms with DRAM behind it, 8.0 ms recomputed (2.0 ×); vLLM's offload 6.0 ms." in beside_vllm()


def test_rooflines_have_a_line_for_each_shape(results: Path):
    from readme_rooflines import rooflines

    assert rooflines() == ""
    measured = {
        "device": {"gpu": "NVIDIA H200"},
        "command": "superinfer bench latency --model llama-3-8b",
        "tpot": [{"batch": 1, "floor_ms": 3.0, "tpot_ms": 4.0}],
        "prefill": [{"prompts": 16, "tokens": 2048, "tflop_s": 300.0}],
        "ceilings": {"matmul": 6e14},
    }
    write(results, "h200-latency", **measured, settings={"layers": 32})
    write(results, "h200-latency-before", **measured, settings={"layers": 1})
    write(results, "h200-latency-mixtral-8x7b", **measured, settings={"layers": 16, "shape": "mixtral-8x7b"})
    assert "| llama-3-8b, 32 layers | H200 | 1: 75% | 16 x 2048: 50% | `h200-latency.json` |\n" in rooflines()
    assert "| mixtral-8x7b, 16 layers | H200 |" in rooflines() and "1 layers" not in rooflines()
    write(results, "h100-latency", **(measured | {"device": {"gpu": "NVIDIA H100"}}), settings={"layers": 32})
    assert rooflines().count("| llama-3-8b") == 1 and "`h100-latency.json`" in rooflines()
