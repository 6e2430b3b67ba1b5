"""CUDA kernels written in this folder's `.cu` files: compiled at start by NVRTC, launched through the driver."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cuda.bindings import driver, nvrtc

FOLDER = Path(__file__).parent
ARCHITECTURE = "sm_90a"


class CudaFailure(RuntimeError):
    """A call of CUDA's driver or compiler failed."""


def checked(answer: tuple[Any, ...]) -> Any:
    """What a call of cuda.bindings returned beside its status. Raises CudaFailure."""
    status, *values = answer
    if status:
        raise CudaFailure(f"{type(status).__name__}: {status.name}")
    return values[0] if len(values) == 1 else values


@functools.cache
def compiled(source: str, constants: tuple[tuple[str, int], ...], made: tuple[tuple[str, str], ...] = ()) -> bytes:
    """Machine code for ARCHITECTURE of a file of this folder. made: names and texts of headers that are no files.
    Raises CudaFailure with the compiler's words."""
    headers = {header.name: header.read_bytes() for header in sorted(FOLDER.glob("*.cuh"))}
    headers |= {name: text.encode() for name, text in made}
    texts, names = list(headers.values()), [name.encode() for name in headers]
    text = (FOLDER / source).read_bytes()
    program = checked(nvrtc.nvrtcCreateProgram(text, source.encode(), len(headers), texts, names))
    try:
        options = [f"--gpu-architecture={ARCHITECTURE}", "-std=c++17", *(f"-D{name}={n}" for name, n in constants)]
        encoded = [option.encode() for option in options]
        if nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)[0]:
            log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
            checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise CudaFailure(f"{source} does not compile: {log.decode(errors='replace')}")
        code = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
        checked(nvrtc.nvrtcGetCUBIN(program, code))
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


class CudaKernel:
    """A compiled kernel, loaded on the current device. Launches start while the kernel in front runs (see `launch`)."""

    def __init__(
        self, source: str, name: str, constants: Mapping[str, int], threads: int, most_shared: int,
        made: tuple[tuple[str, str], ...] = (),
    ) -> None:  # fmt: skip
        """most_shared: bytes of a launch, at most. made: see `compiled`. Raises CudaFailure where it cannot be compiled
        or loaded."""
        torch.cuda.current_stream()  # the device's context exists from here on
        code = np.frombuffer(compiled(source, tuple(constants.items()), made), dtype=np.uint8)
        self._module = checked(driver.cuModuleLoadData(code.ctypes.data))
        self._function = checked(driver.cuModuleGetFunction(self._module, name.encode()))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(self._function, limit, most_shared))
        config = driver.CUlaunchConfig()
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [early], 1
        self._config = config

    def launch(self, grid: tuple[int, int] | tuple[int, int, int], shared: int, places: int) -> None:
        """In the current stream; may be captured. shared: bytes. places: address of the addresses of the arguments."""
        self._config.gridDimX, self._config.gridDimY, self._config.gridDimZ = (*grid, 1)[:3]
        self._config.sharedMemBytes = shared
        self._config.hStream = torch.cuda.current_stream().cuda_stream
        checked(driver.cuLaunchKernelEx(self._config, self._function, places, 0))


class Arguments:
    """A kernel's arguments: tensor maps of 128 bytes, then words of 8, of which it takes the lower 4 if it wants 4."""

    def __init__(self, count: int, maps: int = 0) -> None:
        """count: of words."""
        self.maps = np.zeros((maps, 16), dtype=np.uint64)
        self.words = np.zeros(count, dtype=np.uint64)
        map_places = self.maps.ctypes.data + 128 * np.arange(maps, dtype=np.uint64)
        word_places = self.words.ctypes.data + 8 * np.arange(count, dtype=np.uint64)
        self._places = np.concatenate([map_places, word_places])
        self.places: int = self._places.ctypes.data
