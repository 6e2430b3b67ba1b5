"""Host arrays on their way to the device: a step's arrays lie in pinned memory until the step is over."""

from __future__ import annotations

import numpy as np
import torch

from superinfer.runtime.engine.marker import Marker

PART_BYTES = 4 << 20
PARTS = 3  # one more than steps that may be under way
ALIGNMENT = 16


class HostStage:
    """Sends small arrays to a device by a kernel that reads pinned memory: see `kernels.host_memory` for why.

    Each step fills a part of its own; a part is filled again when its step is over.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parts: list[torch.Tensor] = []
        self._over = [Marker(device) for _ in range(PARTS)]
        self._at = self._used = 0
        if device.type == "cuda":
            self._parts = [torch.empty(PART_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(PARTS)]
            for word in (np.uint8, np.int32, np.int64):  # compiles the kernel for each now, not during a step
                self.to_device(np.zeros(1, dtype=word))

    def next_step(self) -> None:
        """What is sent from now on belongs to a new step. Waits for the step three before, which is over by then."""
        if not self._used:
            return
        self._over[self._at].record()
        self._at = (self._at + 1) % PARTS
        self._over[self._at].wait()
        self._used = 0

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        """A copy of `array` on the device, valid for work that is given to the stream from now on."""
        array = np.ascontiguousarray(array)
        tensor = torch.from_numpy(array)
        if not self._parts:
            return tensor
        size = tensor.nbytes
        if not size:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        if self._used + size > PART_BYTES:  # the copy engine's queue, rather than waiting for memory
            return tensor.pin_memory().to(self._device, non_blocking=True)
        from superinfer.kernels import host_memory  # needs triton, which comes with CUDA builds of torch

        held = self._parts[self._at][self._used : self._used + size]
        held.numpy()[:] = array.reshape(-1).view(np.uint8)  # torch would wake its threads for a mask's megabyte
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        out = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        host_memory.copy(out, held)
        return out
