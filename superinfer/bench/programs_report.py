"""What `superinfer bench programs` found: medians, ratios, and whether both arms did the same work."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from superinfer.bench.program_texts import output_tokens
from superinfer.errors import InvalidRequestError

MOST_APART = 0.02  # of the arms' token counts
_SAME = ("shapes", "at_once", "rounds", "sizes", "seed")  # settings that joined records must share


def compare(found: dict[str, Any]) -> dict[str, Any]:
    """The record with `median_s` by arm, shape and number of programs, `ratios`, peer's seconds over ours, and
    `engine_ratios`, over those of our arm without HTTP."""
    medians = {
        name: {
            shape: {count: statistics.median(run["seconds"] for run in runs) for count, runs in by.items()}
            for shape, by in arm["runs"].items()
        }
        for name, arm in found["arms"].items()
    }
    return {
        **found,
        "median_s": medians,
        "ratios": _ratios(medians, "ours"),
        "engine_ratios": _ratios(medians, "engine"),
    }


def _ratios(medians: dict[str, dict[str, dict[str, float]]], name: str) -> dict[str, dict[str, float]]:
    ratios: dict[str, dict[str, float]] = {}
    for shape, by in medians.get(name, {}).items():
        for count, ours_s in by.items():
            peer_s = medians.get("peer", {}).get(shape, {}).get(count)
            if peer_s is not None:
                ratios.setdefault(shape, {})[count] = peer_s / ours_s
    return ratios


def joined(paths: Sequence[Path]) -> dict[str, Any]:
    """One record of several that hold one arm each. Raises InvalidRequestError where they do not belong together."""
    if len(paths) < 2:
        raise InvalidRequestError("--join compares records: give it twice")
    records = []
    for path in paths:
        try:
            records.append(json.loads(path.read_text()))
            records[-1]["arms"], records[-1]["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidRequestError(f"--join {str(path)!r} is no record of this command: {error!r}") from None
    first, arms = records[0], {}
    for path, record in zip(paths, records, strict=True):
        for name in _SAME:
            if record["settings"][name] != first["settings"][name]:
                raise InvalidRequestError(f"--join {str(path)!r} has another {name} than {str(paths[0])!r}")
        for name, arm in record["arms"].items():
            if name in arms:
                raise InvalidRequestError(f"--join: both records have the arm {name!r}")
            measured = {key: record[key] for key in ("date", "commit", "device", "versions", "command")}
            arms[name] = {**arm, "measured": measured}
    return {"settings": first["settings"] | {"arms": list(arms)}, "arms": arms}


def check_tokens(found: dict[str, Any]) -> list[str]:
    """What is wrong: answers of other lengths than asked for, or arms whose prompts differ by more than MOST_APART."""
    wrong, prompts = [], {}
    for name, shape, count, runs in _runs(found):
        wanted = int(count) * output_tokens(shape, found["settings"]["sizes"][shape])
        for made in {run["output"] for run in runs} - {wanted}:
            wrong.append(f"{name} generated {made} tokens for {shape} x {count}, not {wanted}")
        prompts[name, shape, count] = sum(run["prompt"] for run in runs)
    other_select = found["arms"].get("peer", {}).get("select_by") == "choice"  # it reads each prompt once
    for (name, shape, count), ours in prompts.items():
        peers = prompts.get(("peer", shape, count)) if shape != "select" or not other_select else None
        if name != "peer" and peers is not None and abs(ours - peers) > MOST_APART * max(ours, peers):
            wrong.append(f"prompts of {shape} x {count} had {ours} tokens in the arm {name!r} and {peers} in the other")
    return wrong


def _runs(found: dict[str, Any]) -> Iterator[tuple[str, str, str, list[dict[str, Any]]]]:
    for name, arm in found["arms"].items():
        for shape, by in arm["runs"].items():
            for count, runs in by.items():
                yield name, shape, count, runs


def table(found: dict[str, Any]) -> str:
    """A row for each shape and number of programs."""
    rows = []
    keys = dict.fromkeys((shape, count) for _, shape, count, _ in _runs(found))
    for shape, count in keys:
        cells = [f"{shape:16} {count:>4}"]
        for name in ("ours", "engine", "peer"):
            seconds = found["median_s"].get(name, {}).get(shape, {}).get(count)
            cells.append(f"{seconds:9.2f}" if seconds is not None else f"{'-':>9}")
        for ratios in ("ratios", "engine_ratios"):
            ratio = found[ratios].get(shape, {}).get(count)
            cells.append(f"{ratio:11.2f}" if ratio is not None else f"{'-':>11}")
        used = next(runs for name, s, c, runs in _runs(found) if (s, c) == (shape, count))[0]
        cells.append(f"{used['calls']:8} {used['prompt']:10} {used['output']:9}")
        rows.append(" ".join(cells))
    head = (
        f"{'shape':16} {'n':>4} {'ours s':>9} {'engine s':>9} {'peer s':>9} {'peer/ours':>11} {'peer/engine':>11} "
        f"{'calls':>8} {'prompt':>10} {'output':>9}"
    )
    return "\n".join([head, *rows])
