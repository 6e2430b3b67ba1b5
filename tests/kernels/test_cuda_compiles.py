"""Every CUDA kernel is compiled for Hopper as the engine would there, on machines that have none."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("cuda.bindings", reason="cuda-bindings has no wheel for this platform")

from superinfer.kernels import many_tma, skinny_tma, wide_tma
from superinfer.kernels.nvrtc import CudaFailure, compiled
from superinfer.kernels.paged_hopper import FEW, MANY, compile_constants
from superinfer.kernels.warpgroup import made_for

MULTIPROCESSORS = 132
PRODUCTS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}  # Llama-3-8B
pytestmark = pytest.mark.slow


def code_of(source: str, constants: dict[str, int], made: tuple[tuple[str, str], ...] = ()) -> bytes:
    return compiled(source, tuple(constants.items()), made)


@pytest.mark.parametrize("geometry", [FEW, MANY])
@pytest.mark.parametrize("sizes", [(32, 8, 128), (14, 2, 64), (32, 32, 128), (5, 1, 128)])
def test_decode_attention(sizes, geometry):
    for page, half in ((16, False), (48, True)):
        assert b"decode_attention" in code_of("paged_hopper.cu", compile_constants(*sizes, page, half, geometry))


@pytest.mark.parametrize("rows", [1, 8, 32, 64])
@pytest.mark.parametrize("product", PRODUCTS)
def test_products_of_few_rows(product, rows):
    gated = product == "gate_up"
    cut = skinny_tma.choose_cut(rows, *PRODUCTS[product], MULTIPROCESSORS, gated)
    assert cut is not None
    for routed in [False, True] if rows == 1 else [False]:
        constants = skinny_tma.compile_constants(-(-rows // 8), cut, gated, False, routed)
        assert b"few_rows" in code_of("skinny_tma.cu", constants)


@pytest.mark.parametrize("rows", [49, 112])
@pytest.mark.parametrize("product", PRODUCTS)
def test_products_of_some_rows(product, rows):
    gated = product == "gate_up"
    cut = wide_tma.choose_cut(rows, *PRODUCTS[product], MULTIPROCESSORS, gated)
    assert cut is not None
    constants = wide_tma.compile_constants(-(-rows // 64), cut, gated, False)
    assert b"some_rows" in code_of("wide_tma.cu", constants, made_for(cut.columns))


@pytest.mark.parametrize("cut", many_tma.CUTS)
def test_gates_of_many_rows(cut):
    for half in (False, True):
        code = code_of("many_tma.cu", many_tma.compile_constants(cut, half), made_for(cut.columns))
        assert b"many_rows" in code


def test_what_does_not_compile_is_told_in_the_compiler_s_words():
    with pytest.raises(CudaFailure, match=re.compile("skinny_tma.cu does not compile.*EIGHTHS", re.DOTALL)):
        code_of("skinny_tma.cu", {})
