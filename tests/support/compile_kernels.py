"""Compiles every Triton kernel to machine code for Ampere (float32) and Hopper (bfloat16); needs no GPU.

Run as a process of its own: a kernel is either interpreted or compiled, decided when it is defined. Prints a line each.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from superinfer.kernels import filters, fused, paged_triton

INT = "i32"


def pointers(kind: str, *names: str) -> dict[str, str]:
    return {name: f"*{kind}" for name in names}


def numbers(*names: str) -> dict[str, str]:
    return {name: INT for name in names}


def kernels(kind: str) -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """(kernel, types of its arguments, constants) with activations of `kind`."""
    norm = {**pointers(kind, "x", "residual", "weight", "out"), "floor": "*fp32"}
    norm |= numbers("heads", "size", "token_step", "head_step")
    gate = {**pointers(kind, "gate_up", "out"), **numbers("size")}
    rope = {**pointers(kind, "qkv", "cos", "sin", "q_out", "cache"), "places": "*i32"}
    rope |= numbers("page", "qkv_row", "block_step", "value_step", "offset_step")
    heads = dict(SHARED=4, KV_HEADS=8, HEAD_DIM=128, HEADS_2=4)
    paged = {**pointers(kind, "q", "kv", "out"), "scale": "fp32"}
    paged |= pointers(INT, "qo_indptr", "kv_indptr", "kv_indices", "last_page_len")
    paged |= numbers("window", "page", "block_step", "value_step", "offset_step")
    chosen = {**pointers("fp32", "scaled", "out"), "top_k": "*i64", "top_p": "*fp64", **numbers("vocab")}
    return [
        (fused._rms_norm, norm, dict(ADD=True, BLOCK=4096)),
        (fused._rms_norm, norm, dict(ADD=False, BLOCK=128)),
        (fused._silu_and_mul, gate, dict(BLOCK=2048)),
        (fused._rope_and_store, rope, dict(heads, HALF_2=64)),
        (paged_triton._paged_attention, paged, dict(heads, DIM_2=128, QUERIES=4, KEYS=32)),
        (paged_triton._paged_attention, paged, dict(heads, DIM_2=128, QUERIES=16, KEYS=32)),
        (filters._filter_threshold, chosen, dict(INFINITY=filters.INFINITY_BITS, BLOCK=4096)),
    ]


def main() -> None:
    for capability, kind in ((80, "fp32"), (90, "bf16")):
        target = GPUTarget("cuda", capability, 32)
        for kernel, types, constants in kernels(kind):
            signature = {**types, **dict.fromkeys(constants, "constexpr")}
            places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
            made = triton.compile(ASTSource(kernel, signature, places), target=target)
            print(capability, kind, kernel.__name__, len(made.asm["cubin"]), "bytes")


if __name__ == "__main__":
    main()
