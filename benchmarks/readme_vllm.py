"""The README's tables beside vLLM, from results/<gpu>-vs-vllm-*.json; nothing where those were not measured.

Each table is of the first kind of GPU that it was measured on: the H100's wherever there is one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
_ARMS = {"vllm": "vLLM", "vllm-tight": "vLLM", "vllm-edf": "vLLM, earliest deadline", "vllm-offload": "vLLM, offload"}


GPUS = ("h100", "h200")


def beside_vllm() -> str:
    """As many tables as there are results for."""
    return "".join(next(filter(None, map(made, GPUS)), "") for made in (_speed, _turns, _promises))


def _read(gpu: str, schedule: str) -> dict[str, Any] | None:
    path = RESULTS / f"{gpu}-vs-vllm-{schedule}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _phase(record: dict[str, Any], arm: str, phase: str) -> dict[str, Any] | None:
    found = record["arms"].get(arm, {}).get("phases", {}).get(phase)
    return None if found is None or "failed" in found or "left_out" in found else found


def _speed(gpu: str) -> str:
    """Each phase of the last run that measured both engines in it."""
    of = {phase: _last_with(gpu, phase) for phase in ("tpot", "prefill", "offline", "online")}
    rows = []
    for phase, key, label, number, digits in (
        ("tpot", "tpot", "TPOT at batch {batch}, ms", "steps_ms", 2),
        ("prefill", "prefill", "prefill {prompts} x {tokens}, tokens/s", "tokens_per_s", 0),
    ):
        for mine, theirs in zip(*(each[key] for each in of[phase].found), strict=True):
            rows.append(_row(label.format(**mine), mine[number], theirs[number], digits))
    if of["offline"].found:
        mine, theirs = of["offline"].found
        name = f"offline, {mine['requests']:,} mixed requests, output tokens/s"
        rows.append(_row(name, mine["output_tokens_per_s"], theirs["output_tokens_per_s"], 0))
    for mine, theirs in zip(*(each["runs"] for each in of["online"].found), strict=False):
        at = f"at {mine['rate']:g} requests/s, Azure's lengths:"
        for name, quantile in (("ttft", "p50"), ("ttft", "p99"), ("tpot", "p50")):
            label = f"{at} {name.upper()} {quantile}, ms"
            rows.append(_row(label, *(run["report"][name][quantile] * 1e3 for run in (mine, theirs)), 1))
    if not rows:
        return ""
    known = {phase: run for phase, run in of.items() if run.found}
    last = max(known.values(), key=lambda run: run.record["date"])
    arms = last.record["arms"]
    beside = "two servers on one GPU at once, ours with a second tier; " if last.schedule == "whole" else ""
    started = f"start to ready, s ({beside}kernels compiled by an earlier start)"
    rows.append(_row(started, arms["ours"]["start_s"], arms["vllm"]["start_s"], 0))
    files: dict[str, list[str]] = {}
    for phase, run in known.items():
        files.setdefault(run.schedule, []).append({"tpot": "TPOT"}.get(phase, phase))
    said = ", ".join(f"{' and '.join(phases)}: `results/{gpu}-vs-vllm-{name}.json`" for name, phases in files.items())
    return f"""
Llama-3-8B's shape, random weights, bf16, {last.record["device"]["gpu"]}, beside vLLM {arms["vllm"]["version"]},
each phase of both in one run, over HTTP ([how](docs/benchmarks.md#beside-vllm); {said}):

| | superinfer | vLLM | faster |
| --- | --- | --- | --- |
{"".join(rows)}"""


class _Run(NamedTuple):
    """A phase of ours and of vLLM's in one record; `found` is empty where no record has both."""

    schedule: str
    record: dict[str, Any]
    found: tuple[dict[str, Any], ...]


def _last_with(gpu: str, phase: str) -> _Run:
    runs = []
    for schedule in ("speed", "steady", "whole", "ample", "ample-turns"):
        record = _read(gpu, schedule)
        if record is not None:
            both = tuple(_phase(record, arm, phase) for arm in ("ours", "vllm"))
            if None not in both:
                runs.append(_Run(schedule, record, both))  # type: ignore[arg-type]
    return max(runs, key=lambda run: run.record["date"], default=_Run("", {}, ()))


def _turns(gpu: str) -> str:
    """Conversations on a small pool, with a second tier and without one, and vLLM's with its own."""
    arms: dict[str, Any] = {}
    for record in filter(None, (_read(gpu, schedule) for schedule in ("ample-turns", "tiers"))):
        arms |= record["arms"]
    names = ("ours-turns-tiers", "ours-turns", "vllm-turns-offload")
    tiers, alone, offload = (_phase({"arms": arms}, arm, "turns") for arm in names)
    if tiers is None or alone is None:
        return ""
    times = tiers["working_set_tokens"] / tiers["pool_tokens"]
    with_tier, without = (found["ttft_returning"]["p50"] * 1e3 for found in (tiers, alone))
    peer = f"; vLLM's offload {offload['ttft_returning']['p50'] * 1e3:.1f} ms" if offload else ""
    return f"""
Conversations of the Mooncake trace on a KV pool of 1/{times:.0f} of their working set{_on(gpu)}: TTFT p50 of
returning turns {with_tier:.1f} ms with DRAM behind it, {without:.1f} ms recomputed ({without / with_tier:.1f} ×){peer}.
"""


def _on(gpu: str) -> str:
    """Which GPU, where tables are of several."""
    return f" ({gpu.upper()})"


def _row(name: str, ours: float, peer: float, digits: int) -> str:
    faster = ours / peer if name.endswith("tokens/s") else peer / ours
    return f"| {name} | {ours:,.{digits}f} | {peer:,.{digits}f} | {faster:.2f} × |\n"


def _promises(gpu: str) -> str:
    slo, tiers = _read(gpu, "slo"), _read(gpu, "tiers")
    arms = (slo or {"arms": {}})["arms"] | (
        {name: arm for name, arm in tiers["arms"].items() if name == "vllm-offload"} if tiers else {}
    )
    rows = []
    for name, arm in sorted(arms.items()):
        for run in (_phase({"arms": arms}, name, "slo") or {"runs": []})["runs"]:
            met, label = run["report"]["attainment"], _ARMS.get(name, name.replace("ours-", "superinfer, "))
            cells = f"{met['ttft_met']:.1%} | {met['met']:.1%} | {run['window_tokens_per_s']:,.0f}"
            rows.append((run["rate"], f"| {run['rate']:g}/s | {label} | {cells} |\n"))
            assert arm["pool_tokens"], name
    if slo is None or not rows:
        return ""
    settings = slo["settings"]
    promise = f"first token within {settings['slo']['ttft']:g} s and {settings['slo']['tbt']:g} s a token"
    return f"""
Promises kept with a KV pool of {settings["sizes"]["tight"] * 16:,} tokens{_on(gpu)}: Azure's conversation lengths,
Poisson arrivals for {settings["slo_s"]:g} s, {promise}
(`results/{gpu}-vs-vllm-slo.json`):

| requests/s | | first token in time | whole answer in time | output tokens/s |
| --- | --- | --- | --- | --- |
{"".join(row for _, row in sorted(rows, key=lambda item: item[0]))}"""
