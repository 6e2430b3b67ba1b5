"""Writes the figures of the README from the files in `results/`, so that none is typed by hand.

python benchmarks/readme.py            # rewrite the README's section
python benchmarks/readme.py --check    # fail if it is not what the results say
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from readme_rooflines import rooflines
from readme_vllm import beside_vllm

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures: written by `python benchmarks/readme.py` from benchmarks/results -->\n", "<!-- end -->"


def cpu_throughput() -> str:
    """CPU engine against transformers, both on the embedded model."""
    found = _read("cpu-throughput")
    median, ratio = found["median"], found["ratio_to_transformers"]
    machine = f"{found['device']['cpu']} with {found['device']['cores']} cores"
    return f"""Output tokens/s on {machine}, embedded model in float32, medians of {found["settings"]["rounds"]}
rounds that alternate in one run (`{found["command"]}`, `results/cpu-throughput.json`):

| | tokens/s | against transformers |
| --- | --- | --- |
| transformers `generate`, one request after another | {median["transformers"]:.0f} | 1 |
| superinfer, 1 request | {median["engine_1"]:.0f} | {ratio["engine_1"]:.2f} × |
| superinfer, 16 concurrent requests | {median["engine_16"]:.0f} | {ratio["engine_16"]:.2f} × |
"""


def section() -> str:
    """All figures, as they stand between the markers."""
    return f"\n{cpu_throughput()}{beside_vllm()}{rooflines()}\n"


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def main() -> int:
    """Exit status 1 with --check where the README differs from the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if the README differs")
    given = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END, 1)[1]
    wanted = f"{head}{BEGIN}{section()}{END}{tail}"
    if given.check:
        if wanted != text:
            print("README.md is not what benchmarks/results say; run `python benchmarks/readme.py`", file=sys.stderr)
        return int(wanted != text)
    readme.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
