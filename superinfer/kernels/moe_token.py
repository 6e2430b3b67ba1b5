"""The experts of one token on Hopper, by tensor copies (`skinny_tma`): as long as their weights take to be read.

Of two tokens and more several may go to one expert, whose weights would be read for each: those are `fused_moe`'s.
"""

from __future__ import annotations

import torch

from superinfer.kernels import skinny_tma
from superinfer.kernels.fused_moe import route
from superinfer.kernels.skinny_tma import Routed


def moe_parts(
    x: torch.Tensor, logits: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, top_k: int, normalize: bool
) -> torch.Tensor | None:
    """What `moe.moe_mlp` sums up, as float32 [parts, 1, hidden]; None where this is not the way to take, as for more
    tokens than one or for experts that are too narrow. All contiguous."""
    if len(x) != 1:
        return None
    wide, deep = skinny_tma.cut_for(x, gate_up, gated=True), skinny_tma.cut_for(x, down, gated=False)
    if wide is None or deep is None:
        return None
    scales, experts = (chosen[0] for chosen in route(logits, top_k, normalize))
    routed = Routed(experts, scales)
    activated = skinny_tma.run(x, gate_up, wide, gated=True, routed=routed)
    return skinny_tma.run(activated, down, deep, routed=routed)
