"""A benchmark's numbers as one JSON file with what is needed to judge them: device, date, commit, versions, command."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import superinfer
from superinfer.out_file import write_json

ROOT = Path(superinfer.__file__).parent.parent
PACKAGES = (
    "superinfer", "torch", "transformers", "pyzmq", "msgspec", "aiohttp", "triton", "flashinfer-python",
)  # fmt: skip


def write_record(path: Path, command: str, measured: dict[str, Any]) -> Path:
    """Write `measured` and where it was measured to `path`, what is not a finite number as null. Returns the path.

    Raises InvalidRequestError where the file cannot be written.
    """
    write_json(path, environment(command) | measured)
    return path


def environment(command: str) -> dict[str, Any]:
    """What every record says of the machine and the code."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        # An exported tree has no .git; whoever exported it says what it is.
        "commit": os.environ.get("SUPERINFER_COMMIT") or _git("rev-parse", "--short", "HEAD"),
        "changed_files": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "device": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version(), **_gpu()},
        "versions": _versions(),
    }


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
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    except OSError:  # no git here
        return ""


def cpu_name() -> str:
    """As the system names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
