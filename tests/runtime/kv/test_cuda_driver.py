"""What is passed to CUDA's driver, against the real header's prototypes: a library of their names, on host memory."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from superinfer.runtime.kv.copies import BlockCopy, Copies
from superinfer.runtime.kv.copy_batches import Places
from superinfer.runtime.kv.cuda_driver import CudaDriver, CudaError
from superinfer.runtime.kv.duplex_cuda import CudaDuplex

triton = pytest.importorskip("triton", reason="triton brings the header of CUDA's driver")
pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")


@pytest.fixture(scope="module", params=["newer", "older"])
def library(request, tmp_path_factory):
    """CUDA 13's batched copy, and CUDA 12.8's."""
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    built = tmp_path_factory.mktemp("libcuda") / f"{request.param}.so"
    source = Path(__file__).parent / "fake_libcuda.c"
    options = ["-DOLDER"] if request.param == "older" else []
    subprocess.run(["gcc", "-shared", "-fPIC", *options, f"-I{include}", "-o", built, source], check=True)
    return ctypes.CDLL(str(built))


@pytest.fixture
def driver(library):
    library.fake_refuse.argtypes = (ctypes.c_uint64,)
    library.fake_refuse(0)
    library.fake_fail_batches(0)
    return CudaDriver(7, library=library)


def pools(blocks: int = 4, words: int = 8):
    numbers = np.random.default_rng(0)
    hbm, dram = (numbers.integers(0, 1 << 62, (blocks, words), dtype=np.uint64) for _ in range(2))
    return hbm, dram, Places(hbm.ctypes.data, dram.ctypes.data, words * 8, blocks)


def test_blocks_go_out_and_in_in_two_calls(driver, library):
    hbm, dram, places = pools()
    duplex = CudaDuplex(driver, places)
    wanted = hbm[[0, 2]].copy(), dram[1].copy()
    before = library.fake_batches()
    duplex.start(Copies.of([BlockCopy(1, True, 0, 0), BlockCopy(2, True, 2, 3), BlockCopy(3, False, 1, 1)]), [3])
    duplex.wait([1, 2, 3])
    copied, failed, use = duplex.report()
    assert (sorted(copied), failed) == ([1, 2, 3], [])
    assert np.array_equal(dram[[0, 3]], wanted[0]) and np.array_equal(hbm[1], wanted[1])
    assert library.fake_batches() == before + 2 and use.in_s > 0 and use.stall_s > 0
    assert driver.is_batched and driver.version >= (12, 8)
    duplex.close()
    assert library.fake_streams() == 0 and library.fake_events() == 0


def test_a_batch_that_fails_is_copied_one_by_one_and_only_the_bad_copy_fails(driver, library):
    hbm, dram, places = pools()
    duplex = CudaDuplex(driver, places)
    library.fake_refuse(int(dram[2].ctypes.data))
    duplex.start(Copies.of(BlockCopy(id, True, id, id ^ 1) for id in range(4)))
    duplex.wait(range(4))
    copied, failed, _ = duplex.report()
    assert (sorted(copied), failed) == ([0, 1, 2], [3])
    assert np.array_equal(dram[[1, 0, 3]], hbm[:3])
    assert driver.is_batched
    duplex.close()


def test_a_driver_that_cannot_batch_is_asked_once(driver, library):
    hbm, dram, places = pools()
    duplex = CudaDuplex(driver, places)
    library.fake_fail_batches(801)
    singles = library.fake_singles()
    duplex.start(Copies.of(BlockCopy(id, True, id, id ^ 1) for id in range(4)))
    duplex.wait(range(4))
    assert sorted(duplex.report()[0]) == [0, 1, 2, 3] and not driver.is_batched
    assert library.fake_singles() == singles + 4
    assert np.array_equal(dram, hbm[[1, 0, 3, 2]])
    duplex.close()


def test_memory_is_registered_and_given_back(driver, library):
    page = np.zeros(8192, dtype=np.uint8)
    driver.register(page.ctypes.data, 4096)
    assert library.fake_registered() == 1
    with pytest.raises(CudaError, match=r"\(712\)"):
        driver.register(page.ctypes.data, 4096)
    driver.unregister(page.ctypes.data)
    assert library.fake_registered() == 0


def test_an_attribute_is_read_from_the_device_asked_for(driver):
    assert driver.attribute(2, 100) == 1  # the header's PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES
    assert driver.attribute(1, 100) == driver.attribute(2, 99) == 0
    assert driver.pci_address(2) == "0000:2a:00.0"


def test_a_refusal_says_which_call_and_why(driver):
    with pytest.raises(CudaError, match=r"cuStreamWaitEvent failed with CUDA_ERROR_INVALID_VALUE \(1\)"):
        driver._library.cuStreamWaitEvent.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)
        driver._fail("cuStreamWaitEvent", driver._library.cuStreamWaitEvent(None, None, 1))
