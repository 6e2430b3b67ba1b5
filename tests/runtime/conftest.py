"""Makes the helper modules beside the tests importable: `stepper` and `checkpoints`."""

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "engine"), str(HERE / "models")]


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread():
    """Small tensors: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
