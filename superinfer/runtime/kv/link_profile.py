"""What is known of the link between the tiers, and the budgets that follow from it. Pure Python; no torch.

The kind is read from the system (NVML where its Python package is installed, else Linux's /sys), the speed is measured
at start (`link_measure`). On a CPU both come from the settings.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("superinfer.engine")

# What a step of 10 ms may wait for copies: 3 %. 8 blocks of 2 MiB over PCIe 5.
STEP_WAIT_S = 0.35e-3
# Copies out under way up to which blocks are mirrored, as time on the link: what a step of 512 prompt tokens makes of
# blocks takes 1.4 ms of PCIe 5.
MIRROR_S = 1.4e-3
MOST_BLOCKS = 1024

NVLINK_C2C = "NVLink-C2C"
C2C_DEVICES = ("GH200", "GB200", "GB300")
_GENERATION = {"2.5": 1, "5.0": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """Bytes/s each way, alone and beside the other way, with blocks of `block_bytes` scattered in both pools."""

    kind: str
    block_bytes: int
    in_alone: float
    out_alone: float
    in_both: float
    out_both: float

    @classmethod
    def symmetric(cls, kind: str, block_bytes: int, bytes_per_s: float) -> LinkProfile:
        """Of a link whose directions are equal and do not share."""
        return cls(kind, block_bytes, bytes_per_s, bytes_per_s, bytes_per_s, bytes_per_s)

    @property
    def block_in_s(self) -> float:
        """Seconds to load a block while others leave."""
        return self.block_bytes / self.in_both

    @property
    def block_out_s(self) -> float:
        """Seconds to copy a block out while others come."""
        return self.block_bytes / self.out_both

    @property
    def max_waits(self) -> int:
        """Copies that one step may wait for."""
        return min(MOST_BLOCKS, max(1, round(STEP_WAIT_S / self.block_in_s)))

    @property
    def mirror_blocks(self) -> int:
        """Copies out under way up to which blocks are mirrored in the background."""
        return min(MOST_BLOCKS, max(4, round(MIRROR_S / self.block_out_s)))

    def line(self) -> str:
        """All of it for a person."""
        alone, both = (self.in_alone, self.out_alone), (self.in_both, self.out_both)
        rates = [f"{inward / 1e9:.3g} GB/s in, {outward / 1e9:.3g} out" for inward, outward in (alone, both)]
        return (
            f"link: {self.kind}, {rates[0]}; at once {rates[1]} ({sum(both) / 1e9:.3g} in all); a step waits for at "
            f"most {self.max_waits} blocks of {self.block_bytes >> 10} KiB, {self.mirror_blocks} are mirrored at a time"
        )


def link_kind(name: str, pci: str, *, shares_page_tables: bool, sysfs: Path = Path("/sys/bus/pci/devices")) -> str:
    """What joins a GPU to host memory: "NVLink-C2C", "PCIe 5 x16", or "unknown link".

    name: of the GPU. pci: its address, 0000:1b:00.0. shares_page_tables: CUDA's PageableMemoryAccessUsesHostPageTables,
    which only a coherent link has.
    """
    if shares_page_tables or any(device in name for device in C2C_DEVICES):
        return NVLINK_C2C
    found = _pcie_from_nvml(pci) or _pcie_from_sysfs(sysfs / pci)
    return f"PCIe {found[0]} x{found[1]}" if found else "unknown link"


def _pcie_from_nvml(pci: str) -> tuple[int, int] | None:
    """Generation and width, the most that GPU and slot agree on: at rest the link is slowed down."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByPciBusId(pci.encode())
        return pynvml.nvmlDeviceGetMaxPcieLinkGeneration(gpu), pynvml.nvmlDeviceGetMaxPcieLinkWidth(gpu)
    except Exception as error:  # a library without a driver, a virtual machine that hides the slot
        log.info("NVML says nothing of the PCIe link: %s", error)
        return None


def _pcie_from_sysfs(device: Path) -> tuple[int, int] | None:
    try:
        speed = (device / "max_link_speed").read_text().split()[0]
        width = int((device / "max_link_width").read_text())
    except (OSError, ValueError, IndexError):
        return None
    generation = _GENERATION.get(speed)
    return (generation, width) if generation and 0 < width <= 32 else None
