"""Everything here needs a CUDA device, and is skipped, saying so, where there is none. `make gpu` runs it."""

import sys
from pathlib import Path

import pytest
import torch

RUNTIME = Path(__file__).parents[1] / "runtime"
sys.path[:0] = [str(RUNTIME / "engine"), str(RUNTIME / "models")]


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    here = Path(__file__).parent
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if here in item.path.parents:
            item.add_marker(skip)
