"""What an engine expects a step to take before it has run one: from the device's profile and the model's shape."""

from __future__ import annotations

import logging

from superinfer.errors import InvalidRequestError
from superinfer.runtime.scheduler.cost import StepCost, StepRates
from superinfer.runtime.sim.hardware import profile_of_device
from superinfer.runtime.sim.shapes import shape_of

log = logging.getLogger("superinfer.engine")


def seed_cost(device: str, path: str, captured: int = 0) -> StepCost:
    """device: "cpu" or "cuda". path: folder of the checkpoint. captured: see StepRates; 0: no step is.

    An unknown machine or model costs accuracy, no more: the first steps correct it.
    """
    rates = _rates(device, path)
    return StepCost(rates._replace(captured=captured) if captured else rates)


def _rates(device: str, path: str) -> StepRates:
    name, memory_bytes = "cpu", 0.0
    if device != "cpu":
        import torch

        properties = torch.cuda.get_device_properties(0)
        name, memory_bytes = properties.name, float(properties.total_memory)
    profile = profile_of_device(name, memory_bytes)
    try:
        if profile is not None:
            return StepRates.seed(profile, shape_of(path))
        log.info("no hardware profile for %s: step times are learnt from nothing", name)
    except InvalidRequestError as error:
        log.info("step times are learnt from nothing: %s", error)
    return StepRates.unknown()
