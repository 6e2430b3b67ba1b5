"""Linear layers whose algorithm was measured: of those that cuBLASLt proposes, its first guess is often not its best.

On one H200 the best of its eight proposals took 4.7 % less than its first for 8,192 rows of Llama-3-8B's four matrices,
7 % for 1,280 and 9 % for 256 (seen once, in no file; `benchmarks/gpu_products.py` measures it). Under load such a GPU
runs at its power limit, so that it is measured as it is used: on the layers' own weights, one product after another.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Sequence

import torch

from superinfer.kernels.cublaslt import Algorithm, Product

CANDIDATES = 8  # that cuBLASLt gives at most
FINALISTS = 3
ROUNDS = 3  # of the finalists, by turns
MARGIN = 0.985  # of the first guess's time: who is not quicker than this does not replace it
LEAST_MS, MOST_CALLS = 0.5, 10  # of one measurement
ALIGNMENT = 256  # bytes, which cuBLASLt's proposals count on
HEAD_START_CYCLES = 400_000  # for the host, so that the device never waits for it: a fifth of a millisecond


class TunedLinear:
    """x · weightᵀ + bias for all layers with weights of one shape."""

    def __init__(self, product: Product) -> None:
        self._product = product
        self._tuned: dict[int, Algorithm] = {}
        # Rows seen -> what computes them; None: nothing that was tuned. At most as many as a step has rows.
        self._words: dict[int, ctypes.Array[ctypes.c_uint64] | None] = {}

    def tune(self, rows: int, weights: Sequence[torch.Tensor], bias: torch.Tensor | None = None) -> None:
        """Measure for `rows` rows, and take the quickest from now on. weights: of different layers, of one shape."""
        product = self._product
        x = torch.randn(rows, product.depth, dtype=product.dtype, device=weights[0].device)
        out = torch.empty(rows, product.outputs, dtype=product.dtype, device=weights[0].device)
        found = product.candidates(rows, CANDIDATES)
        if not found:
            return
        words = [_words(algorithm) for algorithm in found]

        def milliseconds(candidate: int, calls: int) -> float:
            begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(HEAD_START_CYCLES)
            begun.record()
            for call in range(calls):
                product.run(words[candidate], x, weights[call % len(weights)], bias, out)
            ended.record()
            ended.synchronize()
            return begun.elapsed_time(ended) / calls

        milliseconds(0, 1)  # loads it
        calls = min(MOST_CALLS, 2 + int(LEAST_MS / milliseconds(0, 2)))
        rough = []
        for candidate in range(1, len(found)):
            milliseconds(candidate, 1)
            rough.append((milliseconds(candidate, calls), candidate))
        finalists = [0, *(candidate for _, candidate in sorted(rough)[:FINALISTS])]
        times: dict[int, list[float]] = {candidate: [] for candidate in finalists}
        for _ in range(ROUNDS):
            for candidate in finalists:
                times[candidate].append(milliseconds(candidate, calls))
        typical = {candidate: statistics.median(measured) for candidate, measured in times.items()}
        best = min(typical, key=lambda candidate: typical[candidate])
        if typical[best] > MARGIN * typical[0]:
            best = 0
        self._tuned[rows] = found[best]
        self._words.clear()

    def run(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """[rows, outputs], in `out` if given; None where nothing that was tuned computes this. x: [rows, depth]."""
        rows = len(x)
        words = self._words[rows] if rows in self._words else self._find(rows)
        if words is None or not x.is_contiguous():
            return None
        if out is None:
            out = torch.empty(rows, self._product.outputs, dtype=x.dtype, device=x.device)
        if (x.data_ptr() | out.data_ptr()) % ALIGNMENT:
            return None
        return self._product.run(words, x, weight, bias, out)

    def _find(self, rows: int) -> ctypes.Array[ctypes.c_uint64] | None:
        """Of rows that were not tuned, the algorithm of the next that were, if it can do them."""
        words = None
        if rows and self._tuned:
            near = min((tuned for tuned in self._tuned if tuned >= rows), default=max(self._tuned))
            if near == rows or self._product.takes(rows, self._tuned[near]):
                words = _words(self._tuned[near])
        self._words[rows] = words
        return words


def _words(algorithm: Algorithm) -> ctypes.Array[ctypes.c_uint64]:
    return (ctypes.c_uint64 * 8)(*algorithm.words)
