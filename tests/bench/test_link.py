"""`superinfer bench link` where there is no GPU, and what it makes of its numbers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from superinfer.bench.link import line, verdict
from superinfer.cli.main import app


class Row:
    def __init__(self, method, inward, outward, both, block_bytes=2 << 20, host_us=None, error=None):
        self.method, self.alone_in, self.alone_out = method, inward, outward
        self.both_in = self.both_out = both / 2
        self.block_bytes, self.host_us, self.error = block_bytes, host_us, error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    result = CliRunner().invoke(app, ["bench", "link"])
    assert result.exit_code == 1
    assert "torch sees no GPU" in capsys.readouterr().err + result.output


def test_the_best_method_is_picked_at_the_engines_block_size_and_held_against_whole_copies():
    rows = [
        Row("contiguous", 50.0, 40.0, 90.0),
        Row("engine", 49.0, 39.6, 88.2, host_us=0.4),
        Row("zero-copy kernel", 45.0, 30.0, 70.0),
        Row("batched", 49.0, 39.0, 200.0, error="failed"),
        Row("engine", 20.0, 20.0, 300.0, block_bytes=32 << 10),
    ]
    found = verdict(rows, 2 << 20)
    assert found["method"] == "engine" and found["at_once_gb_s"] == pytest.approx(88.2)
    assert found["engine_share_of_contiguous"] == pytest.approx({"in": 0.98, "out": 0.99, "at_once": 0.98})
    assert "98.0% in, 99.0% out, 98.0% at once" in found["text"]
    assert verdict([], 2 << 20)["method"] is None
    assert "0.40 µs" in line(rows[1]) and "88.2" in line(rows[1])


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from superinfer.bench.link_methods import KERNEL_WORDS, _copy_blocks
types = {"dsts": "*i64", "srcs": "*i64", "words": "i32", "WORDS": "constexpr"}
made = triton.compile(ASTSource(_copy_blocks, types, {(3,): KERNEL_WORDS}), target=GPUTarget("cuda", 90, 32))
print(len(made.asm["cubin"]))
"""


def test_the_zero_copy_kernel_compiles_for_hopper(tmp_path):
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr[-3000:]
