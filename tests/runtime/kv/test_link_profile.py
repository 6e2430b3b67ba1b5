"""What the link is, how fast, and what follows from it."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from stream_double import StreamDouble

from superinfer.runtime.kv.copy_batches import Places
from superinfer.runtime.kv.duplex import DuplexCache
from superinfer.runtime.kv.link_measure import measure_link, scattered
from superinfer.runtime.kv.link_profile import LinkProfile, link_kind
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.registry import build_scheduler

MIB = 1 << 20
PCIE_5 = LinkProfile("PCIe 5 x16", 2 * MIB, 53e9, 50e9, 47e9, 46e9)


def test_budgets_on_pcie_5_are_those_the_scheduler_was_tuned_with():
    assert (PCIE_5.max_waits, PCIE_5.mirror_blocks) == (8, 31)
    rotation = build_scheduler("lru", DuplexCache(10, 20, 16, link=PCIE_5), SchedulerLimits(4, 64, 160))._rotation
    assert (rotation.max_waits, rotation.mirror_blocks) == (8, 32)  # no fewer than without a profile
    rotation = build_scheduler("lru", DuplexCache(10, 20, 16), SchedulerLimits(4, 64, 160))._rotation
    assert (rotation.max_waits, rotation.mirror_blocks) == (8, 32)


def test_budgets_follow_the_link_within_bounds():
    fast = LinkProfile.symmetric("NVLink-C2C", 2 * MIB, 300e9)
    slow = LinkProfile.symmetric("as configured", 2 * MIB, 1e6)
    assert fast.max_waits == 50 and fast.mirror_blocks == 200
    assert (slow.max_waits, slow.mirror_blocks) == (1, 4)
    assert LinkProfile.symmetric("x", 1, 1e15).max_waits == 1024


def test_whether_to_load_is_known_before_the_first_load():
    rotation = build_scheduler("lru", DuplexCache(10, 20, 16, link=PCIE_5), SchedulerLimits(4, 64, 160))._rotation
    assert rotation.cost.block_s == pytest.approx(2 * MIB / 47e9)
    rotation.cost.token_s = 1e-6
    assert not rotation.cost.loads(blocks=1, tokens=16, queued=0)
    rotation.cost.token_s = 1e-5
    assert rotation.cost.loads(blocks=1, tokens=16, queued=0)


def test_one_line_says_it_all():
    assert PCIE_5.line() == (
        "link: PCIe 5 x16, 53 GB/s in, 50 out; at once 47 GB/s in, 46 out (93 in all); a step waits for at most 8 "
        "blocks of 2048 KiB, 31 are mirrored at a time"
    )


def test_the_kind_is_read_from_the_system(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    pci = "0000:1b:00.0"
    assert link_kind("NVIDIA GH200 480GB", pci, shares_page_tables=False, sysfs=tmp_path) == "NVLink-C2C"
    assert link_kind("a later one", pci, shares_page_tables=True, sysfs=tmp_path) == "NVLink-C2C"
    assert link_kind("NVIDIA H200", pci, shares_page_tables=False, sysfs=tmp_path) == "unknown link"
    (tmp_path / pci).mkdir()
    (tmp_path / pci / "max_link_speed").write_text("32.0 GT/s PCIe\n")
    (tmp_path / pci / "max_link_width").write_text("16\n")
    assert link_kind("NVIDIA H200", pci, shares_page_tables=False, sysfs=tmp_path) == "PCIe 5 x16"
    (tmp_path / pci / "max_link_width").write_text("255\n")  # what a slot that does not know says
    assert link_kind("NVIDIA H200", pci, shares_page_tables=False, sysfs=tmp_path) == "unknown link"


def test_nvml_is_asked_first_and_its_silence_is_no_failure(tmp_path, monkeypatch):
    nvml = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByPciBusId=lambda pci: pci,
        nvmlDeviceGetMaxPcieLinkGeneration=lambda gpu: 4,
        nvmlDeviceGetMaxPcieLinkWidth=lambda gpu: 8,
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert link_kind("NVIDIA L40", "x", shares_page_tables=False, sysfs=tmp_path) == "PCIe 4 x8"

    def fails():
        raise OSError("no driver")

    nvml.nvmlInit = fails
    assert link_kind("NVIDIA L40", "x", shares_page_tables=False, sysfs=tmp_path) == "unknown link"


def test_a_link_is_measured_through_the_device_that_uses_it():
    hbm, dram = np.zeros((20, 8), dtype=np.uint64), np.zeros((30, 8), dtype=np.uint64)
    device = StreamDouble(lazy=1.0)
    profile = measure_link(device, Places(hbm.ctypes.data, dram.ctypes.data, 64, 30), 20, 30, "double")
    assert profile.block_bytes == 64 and profile.kind == "double"
    # The double does one thing at a time, so both ways at once are slower than one alone.
    assert profile.in_alone > profile.in_both > 0 and profile.out_alone > profile.out_both > 0
    assert len(device.streams) == 1, "streams are to be given back"
    device.fails = 1.0
    with pytest.raises(RuntimeError, match="copies between the tiers fail"):
        measure_link(device, Places(hbm.ctypes.data, dram.ctypes.data, 64, 30), 20, 30, "double")
    with pytest.raises(RuntimeError, match="two blocks"):
        measure_link(device, Places(hbm.ctypes.data, dram.ctypes.data, 64, 30), 1, 30, "double")


def test_measured_blocks_are_all_different():
    ins, outs = scattered(10, 20, 25)
    assert len({copy.hbm for copy in [*ins, *outs]}) == len({copy.dram for copy in [*ins, *outs]}) == 20
    assert not any(copy.out for copy in ins) and all(copy.out for copy in outs)
