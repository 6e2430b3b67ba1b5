"""The model's end, behind the last layer's attention, for the rows whose hidden states are wanted and no others.

Of a step with prefill chunks those are few: its decodes and the last token of each prompt that ends. They are gathered
from where the step's graph, or what was launched in its stead, leaves the rows, so the end has graphs of its own, one
for each padded number of wanted rows, that serve steps of any size.
"""

from __future__ import annotations

from typing import Any

import torch

from superinfer.kernels import host_memory
from superinfer.runtime.models.decoder import CausalLM


def tail_rows(slots: int, most_chunks: int) -> list[int]:
    """The numbers of wanted rows to capture: up to a row for each slot and for each chunk."""
    most = slots + most_chunks
    sizes = [8, 16, *range(32, 257, 32), *range(320, most + 64, 64)]
    return [size for size in sizes if size < most] + [most]


class Tails:
    """attended: [rows, heads · head_dim]; residual: [rows, hidden]: where steps leave what `CausalLM.begin` answers."""

    def __init__(self, model: CausalLM, rows: int, sizes: list[int]) -> None:
        """rows: the most of any step that leaves its rows here. sizes: from `tail_rows`."""
        weight, config = model.lm_head.weight, model.config
        self._model = model
        dtype, device = weight.dtype, weight.device
        self.attended = torch.zeros(rows, config.num_heads * config.head_dim, dtype=dtype, device=device)
        self.residual = torch.zeros(rows, config.hidden_size, dtype=dtype, device=device)
        self._sizes = sizes
        self._wanted = torch.zeros(sizes[-1], dtype=torch.int64, device=device)  # rows of padding repeat others
        self._hidden = torch.zeros(sizes[-1], config.hidden_size, dtype=dtype, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def capture(self, pool: Any) -> None:
        """All graphs, the largest first. pool: handle of the graphs' memory."""
        for size in reversed(self._sizes):
            self._forward(size)  # loads kernels and libraries, which a capture must not
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._forward(size)
            self._graphs[size] = graph

    def run(self, wanted: torch.Tensor) -> torch.Tensor:
        """wanted: rows, int64 on the device. Returns their final hidden states, [wanted, hidden]; valid until the next
        run."""
        count = len(wanted)
        size = next((size for size in self._sizes if size >= count), None)
        if size is None or not count:  # scored prompts want nearly all their rows
            return self._model.finish(self.attended, self.residual, wanted)
        if wanted.is_cuda:
            host_memory.copy(self._wanted[:count], wanted)
        else:
            self._wanted[:count] = wanted
        graph = self._graphs.get(size)
        if graph is None:
            self._forward(size)
        else:
            graph.replay()
        return self._hidden[:count]

    def _forward(self, size: int) -> None:
        hidden = self._model.finish(self.attended, self.residual, self._wanted[:size])
        self._hidden[:size].copy_(hidden)
