"""The demo's picture: every request of both runs as a line over time, in the colour of where it was. Plain SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from superinfer.cli.overload import Outcome, Overload, PolicyRun
from superinfer.errors import InvalidRequestError

COLOURS = {
    "queue": "#d9d9d9",
    "prefill": "#74c476",
    "decode": "#238b45",
    "rotated out": "#6baed6",
    "copy wait": "#08519c",
    "preempted": "#fd8d3c",
}
LABELS = {
    "queue": "waiting to begin",
    "prefill": "prefill",
    "decode": "decode",
    "rotated out": "in host memory",
    "copy wait": "waiting for copies",
    "preempted": "waiting, KV lost",
}
KEPT, BROKEN, INK, FAINT = "#238b45", "#cb181d", "#222222", "#888888"
LEFT, RIGHT, TOP, WIDTH, ROW, GAP = 40, 40, 64, 900, 8, 40


def save_picture(path: Path, overload: Overload, runs: Sequence[PolicyRun]) -> Path:
    """Write it. Raises InvalidRequestError where it cannot be written."""
    try:
        path.write_text(picture(overload, runs))
    except OSError as error:
        raise InvalidRequestError(f"the picture {str(path)!r} cannot be written: {error.strerror}") from None
    return path


def picture(overload: Overload, runs: Sequence[PolicyRun]) -> str:
    """An SVG document."""
    end = max(run.seconds for run in runs) * 1.02
    scale = (WIDTH - LEFT - RIGHT) / end
    parts: list[str] = []
    y = TOP
    for run in runs:
        y = _panel(parts, run, y, scale)
    _axis(parts, y - GAP + 14, end, scale)
    height = y + 10
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">'
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>'
    )
    slo = overload.slo
    title = (
        f"{len(overload.asks)} requests in HBM for {overload.kv_tokens} tokens; promised: first token in "
        f"{slo.ttft:.1f} s, then one every {1e3 * (slo.tbt or 0.0):.0f} ms"
    )
    return "\n".join([head, _text(LEFT, 20, title, INK, 14), _legend(), *parts, "</svg>\n"])


def _panel(parts: list[str], run: PolicyRun, top: float, scale: float) -> int:
    """One run's requests, a row each, in order of arrival. Returns where the next may begin."""
    title = (
        f"{run.policy}: first token in time {run.ttft_kept:.0%}, every token in time {run.kept:.0%} "
        f"({run.tokens_per_s:.0f} tokens/s)"
    )
    parts.append(_text(LEFT, top, title, INK, 13, bold=True))
    y = int(top) + 10
    for outcome in run.outcomes:
        for stage, begin, end in _joined(outcome, 0.5 / scale):
            x, width = LEFT + begin * scale, (end - begin) * scale
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 2}" fill="{COLOURS.get(stage, FAINT)}"/>'
            )
        verdict = outcome.verdict
        if outcome.timeline.first is not None:
            colour = INK if verdict.ttft_met else BROKEN
            parts.append(_tick(LEFT + (outcome.ask.at + outcome.timeline.first) * scale, y, colour))
        end = LEFT + (outcome.ask.at + (outcome.finished or 0.0)) * scale
        parts.append(_text(end + 3, y + ROW - 2, "✓" if verdict.met else "✗", KEPT if verdict.met else BROKEN, 9))
        y += ROW
    return y + GAP


def _joined(outcome: Outcome, least_s: float) -> list[tuple[str, float, float]]:
    """Stages, with what is too short to be seen given to the one before it."""
    joined: list[tuple[str, float, float]] = []
    for stage, begin, end in outcome.stages:
        if joined and (end - begin < least_s or joined[-1][0] == stage):
            joined[-1] = (joined[-1][0], joined[-1][1], end)
        else:
            joined.append((stage, begin, end))
    return joined


def _axis(parts: list[str], y: float, end: float, scale: float) -> None:
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1e9) if end / s <= 12)
    for at in range(int(end / step) + 1):
        x = LEFT + at * step * scale
        parts.append(f'<line x1="{x:.1f}" y1="{TOP + 4}" x2="{x:.1f}" y2="{y - 10}" stroke="#000" opacity="0.07"/>')
        parts.append(_text(x - 6, y + 4, f"{at * step:g} s", FAINT, 10))


def _legend() -> str:
    parts, x = [], LEFT
    for stage, label in LABELS.items():
        parts.append(f'<rect x="{x}" y="30" width="12" height="9" fill="{COLOURS[stage]}"/>')
        parts.append(_text(x + 16, 39, label, INK, 11))
        x += 30 + 6 * len(label)
    parts.append(_tick(x + 4, 30, INK))
    parts.append(_text(x + 10, 39, "first token (red: late)", INK, 11))
    return "".join(parts)


def _tick(x: float, y: float, colour: str) -> str:
    return f'<rect x="{x - 1:.1f}" y="{y - 1}" width="2" height="{ROW}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, colour: str, size: int, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}"{weight}>{escape(text)}</text>'
