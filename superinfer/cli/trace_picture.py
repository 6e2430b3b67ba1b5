"""The picture of a rotation, from an engine's trace: the lives of some requests, and below, closer, one exchange.

Above, seconds: where each of the requests was. Below, milliseconds: the engine's steps, the copies each way, and the
same requests. A copy is pale until it was reported; the dark part is as long as the link was busy with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from superinfer.cli.trace_file import DECODE, IN_HOST, MOVING_IN, MOVING_OUT, PREFILL, WAITING, EngineTrace, Life, Span
from superinfer.errors import InvalidRequestError, UnsupportedError
from superinfer.runtime.tracing import COPIES_IN, COPIES_OUT, MIRRORING, STEPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    WAITING: "#d9d9d9",
    PREFILL: "#74c476",
    DECODE: "#238b45",
    MOVING_OUT: "#fd8d3c",
    IN_HOST: "#9ecae1",
    MOVING_IN: "#08519c",
}
LANES = {STEPS: "steps", COPIES_IN: "copies in", COPIES_OUT: "copies out", MIRRORING: "mirroring"}
INK, PALE, STEP, OTHER_STEP = "#444444", 0.3, "#bdbdbd", "#969696"
COPY = {COPIES_IN: COLOURS[MOVING_IN], COPIES_OUT: COLOURS[MOVING_OUT], MIRRORING: "#756bb1"}
MARGIN = 1.5  # of the exchange's length, before and after it
LEAST_STEPS = 6  # in the window
MOST_BLOCK_LABELS = 40


class View(NamedTuple):
    """What is drawn: requests, and the window of the lower part, seconds."""

    lives: list[Life]
    begin: float
    end: float


def choose_view(
    trace: EngineTrace, requests: Sequence[int] = (), begin: float | None = None, end: float | None = None
) -> View:
    """The requests asked for, else up to three that were rotated; the window asked for, else around the longest
    exchange among them: one moves out while another moves in.

    Raises InvalidRequestError where a request is not in the trace, nothing was rotated, or the window is empty.
    """
    unknown = [id for id in requests if id not in trace.lives]
    if unknown:
        raise InvalidRequestError(f"request {unknown[0]} is not in the trace; it has {_some(sorted(trace.lives))}")
    lives = [trace.lives[id] for id in requests] or [life for life in trace.lives.values() if life.moves]
    exchange = _exchange(lives)
    if exchange is None:
        raise InvalidRequestError(
            "no KV of a request was moved in this trace: it needs --dram-tokens, a policy that rotates (lru, rota) and "
            "more requests than HBM holds"
        )
    (first, out), (second, in_) = exchange
    if not requests:
        middle = (out.begin + in_.end) / 2
        chosen = [first, second] if first is not second else [first]
        rest = [life for life in lives if life not in chosen]
        chosen += sorted(rest, key=lambda life: min(abs(middle - move.begin) for move in life.moves))[: 3 - len(chosen)]
        lives = sorted(chosen, key=lambda life: life.id)
    low, high = min(out.begin, in_.begin), max(out.end, in_.end)
    steps = trace.tracks.get(STEPS, [])
    longest = sorted(step.end - step.begin for step in steps)[len(steps) // 2] * LEAST_STEPS if steps else 0.0
    margin = max(MARGIN * (high - low), (longest - (high - low)) / 2)
    low = low - margin if begin is None else begin
    high = high + margin if end is None else end
    if high <= low:
        raise InvalidRequestError(f"the window from {low:.3f} s to {high:.3f} s is empty")
    return View(lives, low, high)


def _exchange(lives: Sequence[Life]) -> tuple[tuple[Life, Span], tuple[Life, Span]] | None:
    """A move out and a move in that overlap longest, of two requests; else any two, else a single move twice."""
    outs = [(life, move) for life in lives for move in life.moves if move.name == MOVING_OUT]
    ins = [(life, move) for life in lives for move in life.moves if move.name == MOVING_IN]
    best, found = 0.0, None
    for one, out in outs:
        for other, in_ in ins:
            both = min(out.end, in_.end) - max(out.begin, in_.begin)
            if one is not other and both > best:
                best, found = both, ((one, out), (other, in_))
    if found is None and (outs or ins):
        return (outs or ins)[0], (outs or ins)[0]
    return found


def save_picture(trace: EngineTrace, view: View, path: Path, title: str) -> None:
    """Write it as a PNG, or what the name's ending says.

    Raises UnsupportedError where matplotlib is not installed, InvalidRequestError where the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise UnsupportedError("pictures need matplotlib; install it with: pip install 'superinfer[plot]'") from None
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[len(view.lives) + 0.5, len(view.lives) + len(LANES) + 0.5])
    figure.suptitle(title, fontsize=11)
    _draw_lives(above, view)
    _draw_window(below, trace, view)
    handles = [Patch(color=colour, label=place) for place, colour in COLOURS.items()]
    handles.append(Patch(color=COPY[MIRRORING], label="mirroring"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"the picture {str(path)!r} cannot be written: {error}") from None


def _draw_lives(axes: Axes, view: View) -> None:
    for row, life in enumerate(view.lives):
        for span in life.places():
            axes.broken_barh(
                [(span.begin, span.end - span.begin)], (row - 0.36, 0.72), color=COLOURS.get(span.name, INK)
            )
    begin = min(life.stages[0].begin for life in view.lives if life.stages)
    end = max(life.stages[-1].end for life in view.lives if life.stages)
    axes.set_xlim(begin - 0.01 * (end - begin), end + 0.01 * (end - begin))
    axes.axvspan(view.begin, view.end, facecolor="none", edgecolor="#cb181d", linewidth=1.2, zorder=3)
    _lanes(axes, [f"request {life.id}" for life in view.lives])
    axes.set_xlabel("s since the engine began to start; the frame is what is below", fontsize=9)


def _draw_window(axes: Axes, trace: EngineTrace, view: View) -> None:
    def shown(span: Span) -> tuple[float, float] | None:
        begin, end = max(span.begin, view.begin), min(span.end, view.end)
        return ((begin - view.begin) * 1e3, (end - begin) * 1e3) if begin < end else None

    whole = (view.end - view.begin) * 1e3
    for row, tid in enumerate(LANES):
        spans = [(span, at) for span in trace.tracks.get(tid, []) if (at := shown(span)) is not None]
        for number, (span, at) in enumerate(spans):
            if tid == STEPS:
                axes.broken_barh([at], (row - 0.36, 0.72), color=(STEP, OTHER_STEP)[number % 2])
                label = f"{span.name}\n{span.args.get('tokens', 0)}"
            else:
                axes.broken_barh([at], (row - 0.36, 0.72), color=COPY[tid], alpha=PALE)
                busy = Span("", span.begin, min(span.end, span.begin + span.args.get("link_busy_ms", 0.0) / 1e3), {})
                if (dark := shown(busy)) is not None:
                    axes.broken_barh([dark], (row - 0.36, 0.72), color=COPY[tid])
                label = str(span.args.get("blocks", ""))
            wide = max(map(len, label.split("\n"))) * 0.011 * whole
            if at[1] > wide and len(spans) <= MOST_BLOCK_LABELS:
                axes.text(at[0] + at[1] / 2, row, label, ha="center", va="center", fontsize=7, color="black")
    for row, life in enumerate(view.lives, len(LANES)):
        for span in life.places():
            if (at := shown(span)) is not None:
                axes.broken_barh([at], (row - 0.36, 0.72), color=COLOURS.get(span.name, INK))
    axes.set_xlim(0, whole)
    names = [LANES[STEPS] + " (tokens)", *[LANES[tid] + " (blocks)" for tid in LANES if tid != STEPS]]
    _lanes(axes, [*names, *[f"request {life.id}" for life in view.lives]])
    axes.set_xlabel(f"ms since {view.begin:.3f} s", fontsize=9)


def _lanes(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _some(ids: list[int]) -> str:
    return "none" if not ids else f"{ids[0]} to {ids[-1]}" if len(ids) > 8 else ", ".join(map(str, ids))
