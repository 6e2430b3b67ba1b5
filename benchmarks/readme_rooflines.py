"""The README's table of rooflines, from results/<gpu>-latency*.json; nothing where those were not measured."""

from __future__ import annotations

import json
import shlex
from typing import Any

from readme_vllm import GPUS, RESULTS


def rooflines() -> str:
    """A line for each shape, of the first kind of GPU that it was measured on."""
    rows: dict[str, tuple[str, dict[str, Any]]] = {}
    for gpu in GPUS:
        for path in (RESULTS / f"{gpu}-latency.json", *sorted(RESULTS.glob(f"{gpu}-latency-*.json"))):
            if path.exists() and not path.stem.endswith("-before"):
                record = json.loads(path.read_text())
                rows.setdefault(_shape(record), (path.name, record))
    if not rows:
        return ""
    lines = "".join(_row(shape, name, record) for shape, (name, record) in rows.items())
    return f"""
Share of the roofline that the engine reaches: weights read (or multiplied) and KV read in a decode step, a prompt's
arithmetic in prefill, at the copy and matrix-product rates of the same run (`superinfer bench latency`; 512-token
prompts, random weights, bf16):

| shape | GPU | decode, by batch | prefill | from `results/` |
| --- | --- | --- | --- | --- |
{lines}"""


def _shape(record: dict[str, Any]) -> str:
    """Its name; older records have it in their command alone."""
    words = shlex.split(record["command"])
    return str(record["settings"].get("shape") or words[words.index("--model") + 1])


def _row(shape: str, name: str, record: dict[str, Any]) -> str:
    decode = ", ".join(f"{row['batch']}: {row['floor_ms'] / row['tpot_ms']:.0%}" for row in record["tpot"])
    prefill = ", ".join(
        f"{row['prompts']} x {row['tokens']}: {row['tflop_s'] * 1e12 / record['ceilings']['matmul']:.0%}"
        for row in record["prefill"]
    )
    gpu = record["device"]["gpu"].removeprefix("NVIDIA ")
    return f"| {shape}, {record['settings']['layers']} layers | {gpu} | {decode} | {prefill} | `{name}` |\n"
