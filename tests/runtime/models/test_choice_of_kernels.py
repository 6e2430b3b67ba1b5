"""Which kernel takes a product on a GPU, without one: stand-ins for the kernels note their names."""

from __future__ import annotations

import pytest
import torch

from superinfer.kernels import fused_moe, many_tma, moe_token, skinny, skinny_tma, wide_tma
from superinfer.runtime.models.layers import Linear
from superinfer.runtime.models.moe import SparseMLP


class OnGpu(torch.Tensor):
    """A tensor of host memory that says it is a GPU's."""

    @property
    def is_cuda(self) -> bool:
        return True


@pytest.fixture
def taken(monkeypatch) -> list[str]:
    """Names of the kernels that took a product, of a GPU with 132 multiprocessors."""
    names: list[str] = []

    def by_boxes(x, weight, cut, gated=False, routed=None):
        names.append("tensor copies")
        rows = len(x) if routed is None else len(routed.experts)
        if gated:
            return torch.zeros(rows, weight.shape[-2] // 2)
        return torch.zeros(cut.parts, 1 if routed is not None else rows, weight.shape[-2])

    def by_groups(x, weight, cut, gated=False):
        names.append("warpgroups")
        return torch.zeros(len(x), len(weight) // 2) if gated else torch.zeros(cut.parts, len(x), len(weight))

    def by_clusters(x, weight, cut):
        names.append("clusters")
        return torch.zeros(len(x), len(weight) // 2)

    def by_triton(x, weight, tiles):
        names.append("triton")
        return torch.zeros(tiles.parts, len(x), len(weight))

    monkeypatch.setattr(skinny_tma, "run", by_boxes)
    monkeypatch.setattr(wide_tma, "run", by_groups)
    monkeypatch.setattr(many_tma, "run", by_clusters)
    monkeypatch.setattr(skinny, "run", by_triton)
    monkeypatch.setattr(skinny, "_multiprocessors", lambda device: 132)
    for module in (skinny_tma, wide_tma, many_tma):
        monkeypatch.setattr(module, "multiprocessors_of", lambda device: 132)
    return names


def few(rows: int, depth: int = 4096) -> torch.Tensor:
    return torch.zeros(rows, depth, dtype=torch.bfloat16).as_subclass(OnGpu)


def linear(outputs: int, bias: bool = False) -> Linear:
    return Linear(4096, outputs, bias).to(torch.bfloat16)


@pytest.mark.parametrize(
    "rows,outputs,kernels",
    [
        (1, 4096, ["tensor copies"]),
        (32, 4096, ["tensor copies"]),
        (33, 4096, ["warpgroups"]),
        (64, 6144, ["warpgroups"]),
        (64, 2048, ["tensor copies"]),  # which warpgroups would have to cut into too many parts
        (112, 4096, ["warpgroups"]),
        (113, 4096, []),
        (8, 4100, []),  # no multiple of 16
    ],
)
def test_products_in_parts(taken, rows, outputs, kernels):
    found = linear(outputs).in_parts(few(rows))
    assert taken == kernels
    assert found.shape[-2:] == (rows, outputs) and found.dim() == (3 if kernels else 2)


@pytest.mark.parametrize(
    "rows,kernels",
    [
        (1, ["tensor copies"]),
        (48, ["tensor copies"]),
        (49, ["warpgroups"]),
        (128, ["warpgroups"]),
        (1024, ["clusters"]),
    ],
)
def test_gated_products(taken, rows, kernels):
    assert linear(28672).gated(few(rows)).shape == (rows, 14336)
    assert taken == kernels


def test_a_bias_is_for_no_kernel_of_few_rows(taken):
    assert linear(4096, bias=True).in_parts(few(4)).shape == (4, 4096)
    assert not taken


@pytest.mark.parametrize("tokens,kernels", [(1, 2), (2, 0)])
def test_the_experts_of_one_token(taken, monkeypatch, tokens, kernels):
    """Both products by tensor copies; more tokens go the way of all."""

    def route(logits, top_k, normalize):
        return torch.ones(len(logits), top_k), torch.zeros(len(logits), top_k, dtype=torch.int32)

    monkeypatch.setattr(moe_token, "route", route)
    monkeypatch.setattr(fused_moe, "moe_mlp", lambda x, *others: torch.zeros(len(x), 4096))
    experts = torch.nn.Module()
    experts.gate_up_proj, experts.down_proj = torch.empty(2, 28672, 4096), torch.empty(2, 4096, 14336)
    mlp = SparseMLP.__new__(SparseMLP)
    torch.nn.Module.__init__(mlp)
    mlp.gate, mlp.experts, mlp.top_k, mlp.normalize = linear(2), experts, 2, True
    assert mlp(few(tokens)).shape[-2:] == (tokens, 4096)
    assert taken == ["tensor copies"] * kernels
