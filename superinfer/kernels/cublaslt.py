"""cuBLASLt through ctypes: matrix products with an algorithm of the caller's choice.

torch takes the library's first guess for every product and has no way to say otherwise. The library is the one that
torch has loaded. Names and numbers are those of NVIDIA's cublasLt.h, the same since CUDA 11.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any, NamedTuple

import torch

WORKSPACE_BYTES = 64 << 20  # for parts of sums
COMPUTE_FLOAT32, SCALE_FLOAT32 = 68, 0
TYPES = {torch.bfloat16: 14, torch.float16: 2}
TRANSPOSE_A, EPILOGUE, BIAS_POINTER = 3, 7, 8  # attributes of a product
ADD_BIAS = 4  # an epilogue
COLUMNS = 3  # attribute of a layout
MAX_WORKSPACE = 1  # attribute of a preference

_pointer, _int, _size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cublasLtCreate": (_pointer,),
    "cublasLtMatmulDescCreate": (_pointer, _int, _int),
    "cublasLtMatmulDescSetAttribute": (_pointer, _int, _pointer, _size),
    "cublasLtMatrixLayoutCreate": (_pointer, _int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64),
    "cublasLtMatrixLayoutSetAttribute": (_pointer, _int, _pointer, _size),
    "cublasLtMatmulPreferenceCreate": (_pointer,),
    "cublasLtMatmulPreferenceDestroy": (_pointer,),
    "cublasLtMatmulPreferenceSetAttribute": (_pointer, _int, _pointer, _size),
    "cublasLtMatmulAlgoGetHeuristic": (*(_pointer,) * 7, _int, _pointer, _pointer),
    "cublasLtMatmulAlgoCheck": (_pointer,) * 8,
    "cublasLtMatmul": (*(_pointer,) * 14, _size, _pointer),
}


class CublasError(RuntimeError):
    """A call failed. `code`: its cublasStatus_t."""

    def __init__(self, call: str, code: int) -> None:
        super().__init__(f"{call} failed with status {code}")
        self.code = code


class _Candidate(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", _size),
        ("state", _int),
        ("waves", ctypes.c_float),
        ("reserved", _int * 4),
    )


class Algorithm(NamedTuple):
    """How to compute a product. words: opaque, cublasLtMatmulAlgo_t."""

    words: tuple[int, ...]


class CublasLt:
    """The library on one device, with a workspace for the products of one stream."""

    def __init__(self, device: torch.device) -> None:
        """Raises OSError where torch has not loaded the library, CublasError where it cannot be used."""
        major = (torch.version.cuda or "").partition(".")[0]
        # Called with the GIL: to give it up for calls of microseconds costs more than they do.
        self._library = ctypes.PyDLL(f"libcublasLt.so.{major}", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.device = device
        self.handle = self.make("cublasLtCreate")

    def call(self, name: str, *arguments: Any) -> None:
        """Raises CublasError."""
        status = getattr(self._library, name)(*arguments)
        if status:
            raise CublasError(name, status)

    def make(self, name: str, *arguments: Any) -> int:
        """The handle that a function of the library makes. It is not given back: there are few, and they live as long
        as the engine."""
        made = ctypes.c_void_p()
        self.call(name, ctypes.byref(made), *arguments)
        assert made.value is not None
        return made.value

    def set(self, kind: str, handle: int, attribute: int, value: Any) -> None:
        """An attribute of what was made; `value` a ctypes number."""
        self.call(f"cublasLt{kind}SetAttribute", handle, attribute, ctypes.byref(value), ctypes.sizeof(value))

    @property
    def matmul(self) -> Any:
        return self._library.cublasLtMatmul

    @property
    def workspace(self) -> int:
        """Its address."""
        return self._workspace.data_ptr()


class Product:
    """x · weightᵀ + bias for one shape of weight: [outputs, depth], row after row, as x and the result are.

    The library counts by columns: there the weight is [depth, outputs] and transposed, x is [depth, rows] and the
    result [outputs, rows].
    """

    def __init__(self, library: CublasLt, outputs: int, depth: int, dtype: torch.dtype, bias: bool) -> None:
        """dtype: one of TYPES."""
        self._library, self.outputs, self.depth, self.dtype = library, outputs, depth, dtype
        self._operation = library.make("cublasLtMatmulDescCreate", COMPUTE_FLOAT32, SCALE_FLOAT32)
        library.set("MatmulDesc", self._operation, TRANSPOSE_A, ctypes.c_int(1))
        self._bias = ctypes.c_void_p(0) if bias else None
        if bias:
            library.set("MatmulDesc", self._operation, EPILOGUE, ctypes.c_int(ADD_BIAS))
        kind = TYPES[dtype]
        self._weight = library.make("cublasLtMatrixLayoutCreate", kind, depth, outputs, depth)
        self._x = library.make("cublasLtMatrixLayoutCreate", kind, depth, 1, depth)
        self._out = library.make("cublasLtMatrixLayoutCreate", kind, outputs, 1, outputs)
        self._rows = 1
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        self._scales = ctypes.addressof(self._one), ctypes.addressof(self._zero)

    def candidates(self, rows: int, most: int = 8) -> list[Algorithm]:
        """What the library proposes for `rows` rows, its first guess first."""
        self._set_rows(rows)
        library = self._library
        preference = library.make("cublasLtMatmulPreferenceCreate")
        library.set("MatmulPreference", preference, MAX_WORKSPACE, ctypes.c_uint64(WORKSPACE_BYTES))
        found, count = (_Candidate * most)(), ctypes.c_int()
        try:
            library.call(
                "cublasLtMatmulAlgoGetHeuristic", library.handle, self._operation, self._weight, self._x, self._out,
                self._out, preference, most, ctypes.byref(found), ctypes.byref(count),
            )  # fmt: skip
        finally:
            library.call("cublasLtMatmulPreferenceDestroy", preference)
        return [Algorithm(tuple(found[i].algorithm)) for i in range(count.value) if found[i].state == 0]

    def takes(self, rows: int, algorithm: Algorithm) -> bool:
        """Whether an algorithm, found for other rows, can do these."""
        self._set_rows(rows)
        library, needed = self._library, _Candidate()
        words = (ctypes.c_uint64 * 8)(*algorithm.words)
        try:
            library.call(
                "cublasLtMatmulAlgoCheck", library.handle, self._operation, self._weight, self._x, self._out, self._out,
                ctypes.byref(words), ctypes.byref(needed),
            )  # fmt: skip
        except CublasError:
            return False
        return needed.state == 0 and needed.workspace <= WORKSPACE_BYTES

    def run(
        self,
        words: ctypes.Array[ctypes.c_uint64],
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Enqueue the product on torch's current stream. words: of an Algorithm that takes len(x) rows. All contiguous;
        x: [rows, depth], weight: [outputs, depth], bias: [outputs], out: [rows, outputs], which is returned."""
        self._set_rows(len(x))
        library = self._library
        if self._bias is not None:
            assert bias is not None
            self._bias.value = bias.data_ptr()
            library.set("MatmulDesc", self._operation, BIAS_POINTER, self._bias)
        to = out.data_ptr()
        status = library.matmul(
            library.handle, self._operation, self._scales[0], weight.data_ptr(), self._weight, x.data_ptr(), self._x,
            self._scales[1], to, self._out, to, self._out, ctypes.addressof(words), library.workspace, WORKSPACE_BYTES,
            torch.cuda.current_stream(library.device).cuda_stream,
        )  # fmt: skip
        if status:
            raise CublasError("cublasLtMatmul", status)
        return out

    def _set_rows(self, rows: int) -> None:
        if rows != self._rows:
            for layout in (self._x, self._out):
                self._library.set("MatrixLayout", layout, COLUMNS, ctypes.c_uint64(rows))
            self._rows = rows
