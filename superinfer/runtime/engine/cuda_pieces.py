"""Steps with prefill chunks as CUDA graphs of what lies between the layers' attention.

Attention of chunks is planned anew each step and is not captured. All else depends on the number of rows alone, so it
is captured for padded numbers of rows: a step then costs the host a replay and an attention call a layer instead of a
dozen launches (15 ms a step for Llama-3-8B, which steps of few rows cannot hide).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from superinfer.kernels import fused, host_memory
from superinfer.kernels.paged import AttentionCall
from superinfer.runtime.engine.cuda_tails import Tails
from superinfer.runtime.models.config import ModelConfig
from superinfer.runtime.models.decoder import CausalLM

# Numbers of rows that steps are padded to. Longer steps keep the GPU busy for longer than they take to launch.
MIXED_ROWS = (16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
Calls = Sequence[tuple[int, AttentionCall]]  # who attends, in the order of the rows: (rows, call)


def mixed_rows(most: int) -> list[int]:
    """The numbers of rows to capture where no step has more than `most`."""
    return [rows for rows in MIXED_ROWS if rows < most] + [rows for rows in MIXED_ROWS if rows >= most][:1]


class MixedBuffers:
    """What the graphs of all sizes read and write: ids, positions, places: [rows] int32; q: [rows, heads, head_dim];
    attended, residual: see Tails."""

    def __init__(self, rows: int, config: ModelConfig, tails: Tails) -> None:
        """tails: with room for as many rows."""
        dtype, device = tails.attended.dtype, tails.attended.device
        self.ids, self.positions, self.places = torch.zeros(3, rows, dtype=torch.int32, device=device).unbind()
        self.q = torch.zeros(rows, config.num_heads, config.head_dim, dtype=dtype, device=device)
        self.attended, self.residual = tails.attended[:rows], tails.residual

    def fill(
        self, ids: torch.Tensor, positions: torch.Tensor, places: torch.Tensor, rows: int, padding_place: int
    ) -> None:
        """A step's rows, int32, and padding up to `rows` that writes its KV to `padding_place`."""
        count = len(ids)
        for buffer, given in ((self.ids, ids), (self.positions, positions), (self.places, places)):
            host_memory.copy(buffer[:count], given)
        self.places[count:rows].fill_(padding_place)


class Pieces:
    """The model's forward pass over `rows` rows: a graph up to the first layer's attention, and one from each layer's
    attention to the next one's. `buffers` has the rows then, for who finishes them."""

    def __init__(
        self, model: CausalLM, views: list[torch.Tensor], buffers: MixedBuffers, rows: int, stream: torch.cuda.Stream,
        pool: Any,
    ) -> None:  # fmt: skip
        """Captures, on `stream`. views: the cache by layer. pool: handle of the graphs' memory, shared by all sizes."""
        self.rows = rows
        self._views = views
        self._buffers = buffers
        self._graphs: list[torch.cuda.CUDAGraph] = []
        inputs = buffers.ids[:rows], buffers.positions[:rows]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model.begin(*inputs, _Cut(self, None))  # loads kernels and libraries, which a capture must not
            stream.synchronize()
            cut = _Cut(self, pool)
            cut.begin()
            _, residual = model.begin(*inputs, cut)
            buffers.residual[:rows].copy_(residual)
            cut.end()
        torch.cuda.current_stream().wait_stream(stream)

    def run(self, calls: Calls) -> None:
        """Replay, with the attention of `calls` in between; rows beyond theirs are padding."""
        q, attended = self._buffers.q, self._buffers.attended.view(self._buffers.q.shape)
        places, start = [], 0
        for rows, call in calls:
            places.append((call, q[start : start + rows], attended[start : start + rows]))
            start += rows
        for layer, view in enumerate(self._views):
            self._graphs[layer].replay()
            for call, part, out in places:
                call.run(part, view, layer, out)
        self._graphs[-1].replay()  # keeps the residual stream


class _Cut:
    """Implements `AttentionBackend`: ends a graph where attention would be and begins the next one."""

    def __init__(self, pieces: Pieces, pool: Any) -> None:
        """pool: None to run without capturing."""
        self._pieces = pieces
        self._pool = pool

    def rotate_and_attend(
        self, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See AttentionBackend."""
        rows, buffers, view = self._pieces.rows, self._pieces._buffers, self._pieces._views[layer]
        fused.rope_and_store(qkv, cos, sin, buffers.places[:rows], view, view.shape[3], out=buffers.q[:rows])
        if self._pool is not None:
            self.end()
            self.begin()
        return buffers.attended[:rows]

    def begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool)
        self._pieces._graphs.append(graph)

    def end(self) -> None:
        self._pieces._graphs[-1].capture_end()
