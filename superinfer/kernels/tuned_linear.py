"""Linear layers whose algorithm was measured: of those that cuBLASLt proposes, its first guess is often not its best.

Under load a GPU runs at its power limit, where the best is another than on an idle one. So that is how they are
measured: on the layers' own weights, one product right after another. `benchmarks/gpu_products.py` compares with torch.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Sequence

import torch

from superinfer.kernels.cublaslt import Algorithm, Product

CANDIDATES = 8  # that cuBLASLt gives at most
ROUNDS = 3  # of all candidates, by turns
MARGIN = 0.99  # of the first guess's time: who is not quicker than this does not replace it
LEAST_MS, MOST_CALLS = 0.4, 8  # of one measurement
HOPELESS = 1.25  # times the quickest's first call: who takes longer is measured no further
ALIKE = 0.03  # how many fewer rows, as a share, an algorithm takes than it was measured for
TILE = 256  # rows; of algorithms' tiles all heights are divisors
ALIGNMENT = 256  # bytes, which cuBLASLt's proposals count on


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

        def measure(candidate: int, calls: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
            begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begun.record()
            for call in range(calls):
                product.run(words[candidate], x, weights[call % len(weights)], bias, out)
            ended.record()
            return begun, ended

        loaded = [measure(candidate, 1) for candidate in range(len(found))]
        torch.cuda.synchronize(x.device)
        once = [begun.elapsed_time(ended) for begun, ended in loaded]
        # The first guess is what the others must beat.
        tried = [candidate for candidate, ms in enumerate(once) if not candidate or ms <= HOPELESS * min(once)]
        calls = min(MOST_CALLS, 2 + int(LEAST_MS / min(once)))
        # All at once: a device that waits for the host between two of them has cooled down for the next.
        rounds = [[measure(candidate, calls) for candidate in tried] for _ in range(ROUNDS)]
        torch.cuda.synchronize(x.device)
        times = [[begun.elapsed_time(ended) for begun, ended in measured] for measured in rounds]
        typical = [statistics.median(of) for of in zip(*times, strict=True)]
        best = min(range(len(tried)), key=lambda at: typical[at])
        if typical[best] > MARGIN * typical[0]:
            best = 0
        self._tuned[rows] = found[tried[best]]
        self._words.clear()

    def run(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """[rows, outputs]; None where nothing that was measured computes this. x: [rows, depth]."""
        rows = len(x)
        words = self._words[rows] if rows in self._words else self._find(rows)
        if words is None or not x.is_contiguous() or x.data_ptr() % ALIGNMENT:
            return None
        out = torch.empty(rows, self._product.outputs, dtype=x.dtype, device=x.device)
        return self._product.run(words, x, weight, bias, out)

    def _find(self, rows: int) -> ctypes.Array[ctypes.c_uint64] | None:
        """The algorithm of the next number of rows that was measured, if that is nearly as many and has no more tiles;
        for others, whose last tiles it would leave nearly empty, another may be the quickest."""
        words = None
        above = min((measured for measured in self._tuned if measured >= rows), default=0)
        if rows >= (1.0 - ALIKE) * above > 0 and -(-rows // TILE) == -(-above // TILE):
            algorithm = self._tuned[above]
            words = _words(algorithm) if self._product.takes(rows, algorithm) else None
        self._words[rows] = words
        return words


def _words(algorithm: Algorithm) -> ctypes.Array[ctypes.c_uint64]:
    return (ctypes.c_uint64 * 8)(*algorithm.words)
