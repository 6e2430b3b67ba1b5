"""Mixture of experts (Shazeer et al. 2017; Jiang et al. 2024): each token goes through the few feed-forward blocks that
its router picks. In plain torch: the reference, and what CPU engines run."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def route(logits: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Which experts each token goes to, and with what weights.

    logits: [tokens, experts], any float type. normalize: weights of a token are scaled to sum to 1.
    Returns (weights [tokens, top_k] float32, experts [tokens, top_k] int64), the most probable first.
    """
    weights, experts = logits.float().softmax(dim=-1).topk(top_k, dim=-1)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, experts


def moe_mlp(
    x: torch.Tensor, logits: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, top_k: int, normalize: bool
) -> torch.Tensor:
    """The weighted sum of the gated feed-forward blocks that `route` picks for each token.

    x: [tokens, hidden]. logits: the router's, [tokens, experts]. gate_up: [experts, 2 n, hidden], an expert's gate rows
    before its up rows. down: [experts, hidden, n]. Returns [tokens, hidden] in x's dtype.
    """
    if x.is_cuda:
        from superinfer.kernels import fused_moe  # needs triton, which comes with CUDA builds of torch

        return fused_moe.moe_mlp(x, logits, gate_up, down, top_k, normalize)
    weights, experts = route(logits, top_k, normalize)
    # Rows are (token, choice) pairs. Sorted by expert, each expert's are one slice: as few products as experts in use.
    order = experts.flatten().argsort(stable=True)
    counts = experts.flatten().bincount(minlength=len(down)).tolist()
    rows = x.index_select(0, order // top_k)
    results = []
    for expert, part in enumerate(rows.split(counts)):
        if len(part):
            gate, up = F.linear(part, gate_up[expert]).chunk(2, dim=-1)
            results.append(F.linear(F.silu(gate).mul_(up), down[expert]))
    # Back in the tokens' order before summing, so that a token's sum does not depend on who else is in the batch.
    scattered = torch.empty(len(order), x.shape[1], dtype=x.dtype).index_copy_(0, order, torch.cat(results))
    summed = (scattered.view(-1, top_k, x.shape[1]) * weights.unsqueeze(-1)).sum(dim=1)
    return summed.to(x.dtype)


def moe_parts(
    x: torch.Tensor, logits: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, top_k: int, normalize: bool
) -> torch.Tensor:
    """Like `moe_mlp`; or, on a GPU for one token where it is quicker, float32 [parts, 1, hidden] for who adds them up.

    `moe_mlp` rounds what each expert gives to x's dtype before the sum; parts are not rounded.
    """
    if x.is_cuda:
        from superinfer.kernels import moe_token  # needs triton, which comes with CUDA builds of torch

        parts = moe_token.moe_parts(x, logits, gate_up, down, top_k, normalize)
        if parts is not None:
            return parts
    return moe_mlp(x, logits, gate_up, down, top_k, normalize)
