"""How long the server takes from its start to a first token: on a machine that never compiled its kernels, and again.

Llama-3-8B's shape, random weights, `superinfer serve` as it comes. Caches of FlashInfer, Triton and the CUDA driver are
an empty folder of this run; FlashInfer must not be installed with compiled kernels (flashinfer-jit-cache).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from record import write

from superinfer.bench.shapes import write_shape

PORT = 8355
LIMIT_S = 500.0


def first_token_s(model: Path, environment: dict[str, str], log: Path) -> float:
    """Seconds from the start of a server to the first token of its first answer. Raises RuntimeError with the end of
    its log where none came."""
    command = [sys.executable, "-m", "superinfer", "serve", "--model", str(model), "--load-format", "dummy"]
    command += ["--model-name", "m", "--port", str(PORT)]
    body = json.dumps({"model": "m", "prompt": "one two three", "max_tokens": 1}).encode()
    with log.open("w") as said:
        begun = time.monotonic()
        server = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
        try:
            while time.monotonic() < begun + LIMIT_S and server.poll() is None:
                request = urllib.request.Request(
                    f"http://127.0.0.1:{PORT}/v1/completions", body, {"Content-Type": "application/json"}
                )
                try:
                    with urllib.request.urlopen(request, timeout=30) as answer:
                        json.load(answer)
                    return time.monotonic() - begun
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(0.1)
        finally:
            server.terminate()
            server.wait(60)
    raise RuntimeError(f"no answer from the server:\n{log.read_text()[-2000:]}")


def main() -> None:
    """Measure, print, write results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="h200-start")
    given = parser.parse_args()
    if importlib.util.find_spec("flashinfer_jit_cache") is not None:
        parser.error("flashinfer-jit-cache is installed: FlashInfer would find its kernels compiled; uninstall it")
    found: dict[str, Any] = {"cores": os.cpu_count(), "first_token_s": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, caches = folder / "model", folder / "caches"
        model.mkdir()
        write_shape("llama-3-8b", model, tokenizer=True)
        kept = {"FLASHINFER_WORKSPACE_BASE": "flashinfer", "TRITON_CACHE_DIR": "triton", "CUDA_CACHE_PATH": "driver"}
        environment = os.environ | {name: str(caches / place) for name, place in kept.items()}
        for start in ("never compiled", "compiled before"):
            seconds = first_token_s(model, environment, folder / "log")
            found["first_token_s"][start] = round(seconds, 1)
            print(f"{start:16} {seconds:6.1f} s to a first token", flush=True)
    print(f"written to {write(given.name, f'python benchmarks/gpu_start.py --name {given.name}', found)}")


if __name__ == "__main__":
    main()
