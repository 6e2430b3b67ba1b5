"""Measures, at the start, which algorithm each of a model's matrix products is to take for each number of rows."""

from __future__ import annotations

import logging
from collections import defaultdict

import torch

from superinfer.kernels.cublaslt import TYPES, CublasError, CublasLt, Product
from superinfer.kernels.tuned_linear import TunedLinear
from superinfer.runtime.engine.cuda_batch import decode_buckets
from superinfer.runtime.engine.cuda_mixed import graph_rows
from superinfer.runtime.models.decoder import CausalLM
from superinfer.runtime.models.layers import Linear
from superinfer.runtime.models.loader import Progress

log = logging.getLogger("superinfer.engine")

LARGE_STEP = 1024  # steps beyond those with graphs take the algorithm of the next multiple
LEAST_WEIGHTS = 1 << 20  # of a matrix worth measuring
MOST_LAYERS = 8  # whose weights take turns: more than a GPU's cache holds


def tune_linears(
    model: CausalLM, max_batch_size: int, max_batch_tokens: int, on_progress: Progress | None = None
) -> None:
    """Give the model's linear layers the algorithms that are quickest for the rows that steps will have.

    Needs memory for one layer's inputs and outputs at `max_batch_tokens`. Where cuBLASLt cannot be asked, layers stay
    with torch's choice, and a warning says so.
    """
    if model.lm_head.weight.dtype not in TYPES:
        return
    try:
        library = CublasLt(model.lm_head.weight.device)
        _tune(model, library, max_batch_size, max_batch_tokens, on_progress)
    except (OSError, CublasError) as error:
        for layer in _linears(model):
            layer.tuned = None
        log.warning("matrix products take cuBLAS's own choice of algorithm, untuned: %s", error)


@torch.inference_mode()
def _tune(
    model: CausalLM, library: CublasLt, max_batch_size: int, max_batch_tokens: int, on_progress: Progress | None
) -> None:
    shapes: dict[tuple[int, int, bool], list[Linear]] = defaultdict(list)
    for layer in _linears(model):
        if layer.weight.numel() >= LEAST_WEIGHTS:
            shapes[(*layer.weight.shape, layer.bias is not None)].append(layer)
    steps = step_rows(max_batch_size, max_batch_tokens)
    logits = [rows for rows in steps if rows < max_batch_size] + [max_batch_size]
    todo = [(shape, rows) for shape, of in shapes.items() for rows in (logits if of == [model.lm_head] else steps)]
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


def step_rows(max_batch_size: int, max_batch_tokens: int) -> list[int]:
    """The numbers of rows to measure: those of graphs of steps with chunks, of decodes in coarser steps than there are
    graphs, and some for longer steps."""
    most = max_batch_size + max_batch_tokens
    captured = graph_rows(most)
    longer = range((captured[-1] // LARGE_STEP + 1) * LARGE_STEP, most + LARGE_STEP, LARGE_STEP)
    decodes = [rows for rows in decode_buckets(max_batch_size) if rows < 16 or rows % 16 == 0]
    return sorted({*decodes, *captured, *(longer if most > captured[-1] else ())})


def _linears(model: CausalLM) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, Linear)]
