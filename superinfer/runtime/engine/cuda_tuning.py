"""Measures, at the start, which algorithm each of a model's matrix products is to take for each number of rows."""

from __future__ import annotations

import logging
from collections import defaultdict

import torch

from superinfer.kernels.cublaslt import TYPES, CublasError, CublasLt, Product
from superinfer.kernels.tuned_linear import TILE, TunedLinear
from superinfer.runtime.engine.cuda_mixed import graph_rows
from superinfer.runtime.models.decoder import CausalLM
from superinfer.runtime.models.layers import Linear
from superinfer.runtime.models.loader import Progress

log = logging.getLogger("superinfer.engine")

LEAST_ROWS = 512  # below, products wait for weights, and the first guess was the best but for a percent
FINE, COARSE = 8192, 4096  # rows: up to the former every number of tiles is measured, then multiples of the latter
LEAST_WEIGHTS = 1 << 20  # of a matrix worth measuring
MOST_LAYERS = 8  # whose weights take turns: more than a GPU's cache holds


def tune_linears(model: CausalLM, most_rows: int, on_progress: Progress | None) -> None:
    """Give the model's linear layers the algorithms that are quickest for the rows that steps with chunks will have.

    most_rows: of any step; there must be memory for one layer's inputs and outputs of as many. Where cuBLASLt cannot be
    asked, layers stay with torch's choice, and a warning says so.
    """
    if model.lm_head.weight.dtype not in TYPES:
        return
    try:
        library = CublasLt(model.lm_head.weight.device)
        _tune(model, library, most_rows, on_progress)
    except (OSError, CublasError) as error:
        for layer in _linears(model):
            layer.tuned = None
        log.warning("matrix products take cuBLAS's own choice of algorithm, untuned: %s", error)


@torch.inference_mode()
def _tune(model: CausalLM, library: CublasLt, most_rows: int, on_progress: Progress | None) -> None:
    shapes: dict[tuple[int, int, bool], list[Linear]] = defaultdict(list)
    for layer in _linears(model):
        if layer is not model.lm_head and layer.weight.numel() >= LEAST_WEIGHTS:
            shapes[(*layer.weight.shape, layer.bias is not None)].append(layer)
    steps = step_rows(most_rows)
    todo = [(shape, rows) for shape in shapes for rows in steps]
    tuned = {
        shape: TunedLinear(Product(library, shape[0], shape[1], model.lm_head.weight.dtype, bias=shape[2]))
        for shape in shapes
    }
    for done, (shape, rows) in enumerate(reversed(todo)):
        if on_progress is not None:
            on_progress("measuring matrix products", done / len(todo))
        some = shapes[shape][:MOST_LAYERS]
        tuned[shape].tune(rows, [layer.weight for layer in some], some[0].bias)
    for shape, layers in shapes.items():
        for layer in layers:
            layer.tuned = tuned[shape]


def step_rows(most: int) -> list[int]:
    """The numbers of rows to measure where a step has at most `most`."""
    captured = [rows for rows in graph_rows(most) if rows >= LEAST_ROWS]
    last = captured[-1] if captured else most
    fine = range(last // TILE * TILE + TILE, min(most, FINE) + 1, TILE)
    coarse = range(max(last, FINE) // COARSE * COARSE + COARSE, most + 1, COARSE)
    return [*captured, *fine, *coarse]


def _linears(model: CausalLM) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, Linear)]
