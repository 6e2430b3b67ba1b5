"""Where a benchmark's numbers go: one JSON file with what is needed to judge them."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("superinfer", "torch", "transformers", "pyzmq", "msgspec", "triton", "flashinfer-python")


def write(name: str, command: str, measured: dict[str, Any]) -> Path:
    """Write `results/<name>.json`: `measured` with device, date, commit, versions and the command that made it."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        # An exported tree has no .git; whoever exported it says what it is.
        "commit": os.environ.get("SUPERINFER_COMMIT") or _git("rev-parse", "--short", "HEAD"),
        "changed_files": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "device": {"cpu": _cpu_name(), "cores": os.cpu_count(), "python": platform.python_version(), **_gpu()},
        "versions": _versions(),
        **measured,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _versions() -> dict[str, str]:
    """Of the packages that are installed; superinfer itself may run from its source tree."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _gpu() -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    name, driver = text.strip().split(", ")
    return {"gpu": name, "driver": driver}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
