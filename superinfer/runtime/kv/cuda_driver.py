"""`CopyDevice` on CUDA's driver, called through ctypes: no package of its own, and no GIL while it copies.

Addresses and sizes go to the driver as the numpy arrays they are in, so a batch of copies costs one call, not a list
of Python numbers. The library comes with the GPU's driver, so what it offers is what can be used.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import numpy as np

log = logging.getLogger("superinfer.engine")

NOT_READY = 600
STREAM_NON_BLOCKING = 1
SOURCE_IN_STREAM_ORDER = 1
PREFER_OVERLAP_WITH_COMPUTE = 1
HOST_PORTABLE, HOST_MAPPED = 1, 2
_UNSUPPORTED = (801, 803)  # CUDA_ERROR_NOT_SUPPORTED, _SYSTEM_DRIVER_MISMATCH

_handle, _address, _bytes = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDriverGetVersion": (ctypes.POINTER(ctypes.c_int),),
    "cuCtxGetCurrent": (ctypes.POINTER(_handle),),
    "cuCtxSetCurrent": (_handle,),
    "cuStreamCreate": (ctypes.POINTER(_handle), ctypes.c_uint),
    "cuStreamDestroy_v2": (_handle,),
    "cuStreamSynchronize": (_handle,),
    "cuStreamWaitEvent": (_handle, _handle, ctypes.c_uint),
    "cuEventCreate": (ctypes.POINTER(_handle), ctypes.c_uint),
    "cuEventDestroy_v2": (_handle,),
    "cuEventRecord": (_handle, _handle),
    "cuEventQuery": (_handle,),
    "cuEventElapsedTime": (ctypes.POINTER(ctypes.c_float), _handle, _handle),
    "cuMemcpyAsync": (_address, _address, _bytes, _handle),
    "cuMemHostRegister_v2": (_handle, _bytes, ctypes.c_uint),
    "cuMemHostUnregister": (_handle,),
    "cuDeviceGet": (ctypes.POINTER(ctypes.c_int), ctypes.c_int),
    "cuDeviceGetAttribute": (ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int),
    "cuDeviceGetPCIBusId": (ctypes.c_char_p, ctypes.c_int, ctypes.c_int),
    "cuGetErrorName": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
}
_BATCH = (_handle, _handle, _handle, _bytes, _handle, _handle, _bytes)


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _CopyAttributes(ctypes.Structure):
    """CUmemcpyAttributes. The hints are for managed memory alone."""

    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source_hint", _Location),
        ("destination_hint", _Location),
        ("flags", ctypes.c_uint),
    )


def _address_of(array: np.ndarray) -> int:
    """What `array.ctypes.data` says, in a third of the time; TypeError unless the array is contiguous and writable."""
    return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]


class CudaError(RuntimeError):
    """A call of the driver failed. `code`: its CUresult."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call} failed with {name} ({code})")
        self.code = code


class CudaDriver:
    """Implements `CopyDevice`. To be made by the thread that computes, with its device chosen (by torch, say).

    compute_stream: handle of the stream that the model runs on; 0 is the default one. batched: False copies one by one.
    """

    def __init__(self, compute_stream: int = 0, *, batched: bool = True, library: Any = None) -> None:
        """Raises OSError where there is no NVIDIA driver, CudaError where no device has been chosen."""
        self._library = ctypes.CDLL("libcuda.so.1") if library is None else library
        # The same library, called without giving up the GIL: for calls of a microsecond, that costs more than they do,
        # and a thread that gave it up may wait long to get it back.
        self._quick = ctypes.PyDLL(self._library._name)
        for name, arguments in _SIGNATURES.items():
            for calls in (self._library, self._quick):
                function = getattr(calls, name)
                function.argtypes, function.restype = arguments, ctypes.c_int
        context = ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuCtxGetCurrent", ctypes.byref(context))
        if not context.value:
            raise CudaError("cuCtxGetCurrent", 201, "no context: initialise the device first")
        self._context = context.value
        self._compute_stream = compute_stream
        self._attributes = _CopyAttributes(SOURCE_IN_STREAM_ORDER, flags=PREFER_OVERLAP_WITH_COMPUTE)
        self._first = ctypes.c_size_t(0)
        self._kinds = ctypes.addressof(self._attributes), ctypes.addressof(self._first), 1
        self._elapsed = ctypes.c_float()  # milliseconds; one for all, as one thread asks
        self._elapsed_at = ctypes.byref(self._elapsed)
        self._batch = self._find_batch() if batched else None

    @property
    def version(self) -> tuple[int, int]:
        """Of CUDA, the newest that the driver knows."""
        number = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(number))
        return number.value // 1000, number.value % 1000 // 10

    def attribute(self, ordinal: int, number: int) -> int:
        """A CUdevice_attribute of a GPU."""
        device, value = ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        self._call("cuDeviceGetAttribute", ctypes.byref(value), number, device)
        return value.value

    def pci_address(self, ordinal: int) -> str:
        """Of a GPU, as Linux writes it: 0000:1b:00.0."""
        device, text = ctypes.c_int(), ctypes.create_string_buffer(32)
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        self._call("cuDeviceGetPCIBusId", text, len(text), device)
        return text.value.decode().lower()

    @property
    def is_batched(self) -> bool:
        """Whether many copies go to the driver in one call."""
        return self._batch is not None

    def _find_batch(self) -> Any:
        """The driver's batched copy, as a function of (dsts, srcs, sizes, count, attributes, firsts, kinds, stream).

        CUDA 13 dropped one argument of CUDA 12.8's, where to say which copy failed, under a new name.
        """
        if hasattr(self._library, "cuMemcpyBatchAsync_v2"):
            newer = self._library.cuMemcpyBatchAsync_v2
            newer.argtypes, newer.restype = (*_BATCH, _handle), ctypes.c_int
            return newer
        if hasattr(self._library, "cuMemcpyBatchAsync"):
            older = self._library.cuMemcpyBatchAsync
            older.argtypes, older.restype = (*_BATCH, _handle, _handle), ctypes.c_int
            failed_at = ctypes.c_size_t()
            return lambda *arguments: older(*arguments[:-1], ctypes.addressof(failed_at), arguments[-1])
        return None

    def use(self) -> None:
        """See CopyDevice."""
        self._call("cuCtxSetCurrent", self._context)

    def compute_stream(self) -> int:
        """See CopyDevice."""
        return self._compute_stream

    def new_stream(self) -> int:
        """See CopyDevice. Does not wait for the default stream."""
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), STREAM_NON_BLOCKING)
        return stream.value or 0

    def new_event(self) -> int:
        """See CopyDevice."""
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), 0)
        return event.value or 0

    def free(self, streams: list[int], events: list[int]) -> None:
        """See CopyDevice."""
        for event in events:
            self._library.cuEventDestroy_v2(event)
        for stream in streams:
            self._library.cuStreamDestroy_v2(stream)

    def record(self, event: int, stream: int) -> None:
        """See CopyDevice."""
        code = self._quick.cuEventRecord(event, stream)
        if code:
            self._fail("cuEventRecord", code)

    def wait(self, stream: int, event: int) -> None:
        """See CopyDevice."""
        code = self._quick.cuStreamWaitEvent(stream, event, 0)
        if code:
            self._fail("cuStreamWaitEvent", code)

    def reached(self, event: int) -> bool:
        """See CopyDevice."""
        code = self._quick.cuEventQuery(event)
        if code and code != NOT_READY:
            self._fail("cuEventQuery", code)
        return bool(code == 0)

    def seconds(self, earlier: int, later: int) -> float:
        """See CopyDevice."""
        code = self._quick.cuEventElapsedTime(self._elapsed_at, earlier, later)
        if code:
            self._fail("cuEventElapsedTime", code)
        return self._elapsed.value / 1000

    def copy(self, stream: int, dsts: np.ndarray, srcs: np.ndarray, sizes: np.ndarray) -> list[int]:
        """See CopyDevice."""
        if self._batch is not None:
            code = self._batch(*map(_address_of, (dsts, srcs, sizes)), len(dsts), *self._kinds, stream)
            if code == 0:
                return []
            log.warning("a batch of %d copies failed with %s: copying one by one", len(dsts), self._name(code))
            if code in _UNSUPPORTED:
                self._batch = None  # it would fail each time
        return self.copy_singly(stream, dsts, srcs, sizes)

    def copy_singly(self, stream: int, dsts: np.ndarray, srcs: np.ndarray, sizes: np.ndarray) -> list[int]:
        """Like `copy`, one call each."""
        failed = []
        for at, (dst, src, size) in enumerate(zip(dsts.tolist(), srcs.tolist(), sizes.tolist(), strict=True)):
            code = self._library.cuMemcpyAsync(dst, src, size, stream)
            if code:
                log.error("a copy of %d bytes failed with %s", size, self._name(code))
                failed.append(at)
        return failed

    def synchronize(self, stream: int) -> None:
        """See CopyDevice."""
        self._call("cuStreamSynchronize", stream)

    def register(self, address: int, size: int) -> None:
        """Pin host memory, [address, address + size), for copies that do not wait. Raises CudaError."""
        self._call("cuMemHostRegister_v2", address, size, HOST_PORTABLE | HOST_MAPPED)

    def unregister(self, address: int) -> None:
        """Undo `register`."""
        self._call("cuMemHostUnregister", address)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            self._fail(name, code)

    def _fail(self, call: str, code: int) -> None:
        raise CudaError(call, code, self._name(code))

    def _name(self, code: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorName(code, ctypes.byref(text))
        return text.value.decode() if text.value else "an unknown error"
