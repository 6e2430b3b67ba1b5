"""For which numbers of rows products are measured; what is measured is in tests/gpu/test_tuned_linear.py."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from superinfer.kernels.tuned_linear import TILE
from superinfer.runtime.engine.cuda_mixed import graph_rows
from superinfer.runtime.engine.cuda_tuning import FINE, LEAST_ROWS, step_rows


@pytest.mark.parametrize("most", [1, 200, LEAST_ROWS, 700, 2048, 2304, 8192, 8448, 16640])
def test_every_graph_with_chunks_is_measured_and_no_step_longer_than_there_can_be(most):
    rows = step_rows(most)
    assert rows == sorted(set(rows))
    captured = [count for count in graph_rows(most) if count >= LEAST_ROWS]
    assert rows[: len(captured)] == captured
    assert all(LEAST_ROWS <= count <= max(most, captured[-1]) for count in rows) if rows else most < LEAST_ROWS
    for steps in range(LEAST_ROWS, min(most // TILE * TILE, FINE) + 1):
        above = min(count for count in rows if count >= steps)
        assert -(-above // TILE) == -(-steps // TILE)  # as many tiles
    if most >= 16384:
        assert 16384 in rows  # a long step, but for its decodes
