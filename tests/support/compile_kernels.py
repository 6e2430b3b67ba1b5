"""Compiles every Triton kernel to machine code for Hopper (bfloat16) and for Ampere (float32); needs no GPU.

Run as a process of its own: a kernel is either interpreted or compiled, decided when it is defined. Prints a line each.
Kernels that are the same whatever the activations are compiled for Hopper alone: nothing in them depends on the
architecture.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from superinfer.kernels import decode_step, drawing, filters, fused, fused_moe, host_memory, paged_triton, skinny

INT = "i32"
# What one block of threads may have, A100 and H100: CUDA's programming guide, "Compute Capabilities".
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}


def pointers(kind: str, *names: str) -> dict[str, str]:
    return {name: f"*{kind}" for name in names}


def numbers(*names: str) -> dict[str, str]:
    return {name: INT for name in names}


def kernels(kind: str) -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """(kernel, types of its arguments, constants) with activations of `kind`."""
    norm = {**pointers(kind, "x", "residual", "weight", "out"), "floor": "*fp32"}
    norm |= numbers("heads", "size", "token_step", "head_step", "part_step")
    gate = {**pointers(kind, "gate_up", "out"), **numbers("size")}
    rope = {**pointers(kind, "qkv", "cos", "sin", "q_out", "cache", "rows_out"), "places": "*i32"}
    rope |= numbers("tokens", "page", "qkv_row", "block_step", "value_step", "offset_step", "part_step")
    heads = dict(SHARED=4, KV_HEADS=8, HEAD_DIM=128, HEADS_2=4)
    # In float32, products of 128 are compiled for seconds, and the decodes' have them.
    chunks = dict(heads, DIM_2=128) if kind == "bf16" else dict(heads, HEAD_DIM=64, DIM_2=64)
    paged = {**pointers(kind, "q", "kv", "out"), "scale": "fp32"}
    paged |= pointers(INT, "qo_indptr", "kv_indptr", "kv_indices", "last_page_len")
    paged |= numbers("window", "page", "block_step", "value_step", "offset_step")
    chosen = {**pointers("fp32", "scaled", "out"), "top_k": "*i64", "top_p": "*fp64"}
    chosen |= numbers("vocab", "top_k_step", "top_p_step")
    pdl = kind == "bf16"  # as launch.overlap has it on an Ampere and a Hopper
    in_parts = {**rope, "qkv": "*fp32"}, dict(heads, HALF_2=64, TOKENS=1, PARTS=2, KEEP=False, PDL=pdl)
    receive = {**pointers(INT, "host", "there", "table", "turn"), **numbers("half", "inputs", "changes")}
    describe = pointers(INT, "positions", "slots", "places", "last_page_len", "indptr", "indices", "table", "turn")
    describe |= numbers("sequences", "padding_slot", "width", "page")
    look = {"logits": f"*{kind}", "best": "*fp32", "at_best": "*i32", **numbers("vocab", "row_step", "part")}
    keep = {"best": "*fp32", **pointers("i64", "last_tokens", "host"), **pointers(INT, "at_best", "slots", "turn")}
    keep |= numbers("rows", "half")
    drawn = {"logits": f"*{kind}", **pointers("fp32", "temperatures", "best", "total")}
    sums = {**drawn, **numbers("vocab", "row_step", "part")}
    draws = {**sums, "uniforms": "*fp64", **pointers("i64", "tokens", "told")}
    return [
        (fused._rms_norm, norm, dict(ADD=True, PARTS=0, BLOCK=4096, PDL=pdl)),
        (fused._rms_norm, {**norm, "x": "*fp32"}, dict(ADD=True, PARTS=4, BLOCK=4096, PDL=pdl)),
        (fused._rms_norm, norm, dict(ADD=False, PARTS=0, BLOCK=128, PDL=pdl)),
        (fused._silu_and_mul, gate, dict(BLOCK=2048, PDL=pdl)),
        (fused._rope_and_store, rope, dict(heads, HALF_2=64, TOKENS=1, PARTS=1, KEEP=False, PDL=pdl)),
        (fused._rope_and_store, rope, dict(heads, HALF_2=64, TOKENS=8, PARTS=1, KEEP=True, PDL=pdl)),
        (fused._rope_and_store, *in_parts),
        (paged_triton._paged_attention, paged, dict(heads, DIM_2=128, QUERIES=4, KEYS=32)),
        (paged_triton._paged_attention, paged, dict(chunks, QUERIES=16, KEYS=32)),
        (host_memory._copy_words, {**pointers("i64", "dst", "src"), **numbers("count")}, dict(BLOCK=512)),
        (filters._filter_threshold, chosen, dict(INFINITY=filters.INFINITY_BITS, BLOCK=4096)),
        (decode_step._receive, receive, dict(HEAD=decode_step.HEAD, BLOCK=512)),
        (decode_step._describe, describe, dict(EMPTY=True, SEQUENCES_2=256, BLOCK=256)),
        (decode_step._largest_of_part, look, dict(BLOCK=2048)),
        (decode_step._keep_largest, keep, dict(PARTS=8, ROWS=64)),
        (drawing._sum_up, sums, dict(BLOCK=2048)),
        (drawing._draw, draws, dict(PARTS=16, BLOCK=2048)),
    ]


def expert_kernels(kind: str) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Like `kernels`, with the launch options. Shapes of Mixtral 8x7B; tiles of one token, of decodes, of a prefill."""
    route = {"logits": f"*{kind}", "weights": "*fp32", "experts": "*i32"}
    align = {**pointers(INT, "experts", "rows", "block_expert"), **numbers("total", "blocks")}
    lists = {**pointers(INT, "rows", "block_expert"), **numbers("total", "blocks")}
    made = [
        (fused_moe._route, route, dict(EXPERTS=8, EXPERTS_2=8, TOP_K=2, TOP_K_2=2, NORMALIZE=True), dict(num_warps=1)),
        (fused_moe._align, align, dict(EXPERTS=8, BINS=16, CHUNK=4096, BLOCK=128), {}),
    ]
    sums = dict(HIDDEN=4096, TOP_K=2, BLOCK=2048)
    sorted_rows = {**pointers(kind, "parts", "out"), "places": "*i64", "scales": "*fp32"}
    unsorted = dict(sums, SORTED=False, places=None, scales=None)
    made += [
        (fused_moe._combine, pointers(kind, "parts", "out"), unsorted, {}),
        (fused_moe._combine, sorted_rows, dict(sums, SORTED=True), {}),
    ]
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    products = {**pointers(kind, "x", "weight", "out"), **lists}
    for tiles in dict.fromkeys(fused_moe.choose_tiles(rows, 8, dtype) for rows in (2, 128, 256, 300, 16384)):
        sizes = dict(HIDDEN=4096, SIZE=14336, ROWS=tiles.rows)
        for kernel, tile, types, constants in (
            (fused_moe._gate_up, tiles.gate_up, products, dict(sizes, TOP_K=2)),
            (fused_moe._down, tiles.down, {**products, "scales": "*fp32"}, sizes),
        ):
            options = dict(num_warps=tile.warps, num_stages=tile.stages)
            made.append((kernel, types, dict(constants, COLUMNS=tile.columns, DEPTH=tile.depth), options))
    return made


def skinny_kernels() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Like `expert_kernels`, with every tile that a layer of Llama-3-8B has on a Hopper."""
    types = {**pointers("bf16", "x", "weight"), "out": "*fp32", **numbers("count", "outputs", "depth", "part")}
    sizes = ((6144, 4096), (4096, 4096), (4096, 14336))
    every = [skinny.choose_tiles(rows, *size, 132) for rows in (1, 32, 64) for size in sizes]
    made = []
    for tiles in dict.fromkeys(tiles for tiles in every if tiles is not None):
        constants = dict(ROWS=tiles.rows, COLUMNS=tiles.columns, DEPTH=tiles.depth, STAGES=tiles.stages)
        options = dict(num_warps=tiles.warps, num_stages=tiles.stages, launch_pdl=True)
        made.append((skinny._skinny, types, dict(constants, PREFETCHED=2, PDL=True), options))
    return made


def main() -> None:
    on_hopper = [(*parts, {}) for parts in kernels("bf16")] + expert_kernels("bf16") + skinny_kernels()
    on_ampere = [(*parts, {}) for parts in kernels("fp32")] + expert_kernels("fp32")
    on_ampere = [parts for parts in on_ampere if parts not in on_hopper]
    for capability, kind, every in ((80, "fp32", on_ampere), (90, "bf16", on_hopper)):
        target = GPUTarget("cuda", capability, 32)
        for kernel, types, constants, options in every:
            signature = {**types, **dict.fromkeys(constants, "constexpr")}
            places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
            # As at a real launch, where tensors start at multiples of 16 bytes: it decides how loads are made.
            aligned = {
                (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
                for name, kind_of in types.items()
                if kind_of.startswith("*")
            }
            made = triton.compile(ASTSource(kernel, signature, places, aligned), target=target, options=options)
            shared = made.metadata.shared
            assert shared <= SHARED_MEMORY[capability], f"{kernel.__name__} wants {shared} bytes of shared memory"
            print(capability, kind, kernel.__name__, len(made.asm["cubin"]), "bytes")


if __name__ == "__main__":
    main()
