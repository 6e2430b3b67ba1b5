"""Paged attention in plain torch: the reference for every other backend, and what CPU engines run.

The cache is block-first, `[num_blocks, layers, 2, page, kv_heads, head_dim]` (2: key, value), and contiguous. Seen as
`[rows, kv_heads · head_dim]`, the key of token offset o of block b in layer l is row
`((b · layers + l) · 2) · page + o`, its value `page` rows further. Views that start at a layer's first row therefore
let one index tensor, made once per step for layer 0, address every layer, and keys and values are gathered in one go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from superinfer.kernels.rope import apply_rope


def layer_views(cache: torch.Tensor) -> list[torch.Tensor]:
    """Per layer, the rows that a layer-0 row index addresses.

    cache: contiguous [num_blocks, layers, 2, page, kv_heads, head_dim].
    Returns views [rows, kv_heads · head_dim]; row `block · layers · 2 · page + offset` is that token's key in that
    layer, `page` rows further lies its value.
    """
    _, layers, _, page, kv_heads, head_dim = cache.shape
    rows = cache.view(-1, kv_heads * head_dim)
    return [rows[2 * layer * page :] for layer in range(layers)]


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Consecutive query tokens answered by one attention call: `sequences` × `queries` of them.

    Either many sequences with one query each (decode) or one sequence with many (a prefill chunk).

    index: [2 · sequences · context] int64 cache rows of the tokens attended to, all keys, then all values; where a
        sequence is shorter than the group's context it repeats a row of its own, so that masked positions never read
        a foreign or unwritten row.
    mask: additive, -inf where not attended, broadcast to [sequences, 1, queries, context]; None: attend to all, or
        causally when `causal`.
    """

    sequences: int
    queries: int
    context: int
    index: torch.Tensor
    mask: torch.Tensor | None = None
    causal: bool = False


def group_attention(
    q: torch.Tensor, rows: torch.Tensor, group: AttentionGroup, kv_heads: int, scale: float
) -> torch.Tensor:
    """softmax(q kᵀ · scale + mask) v for one group.

    q: [sequences · queries, heads, head_dim]. rows: a layer's view from `layer_views`.
    Returns [sequences · queries, heads · head_dim].

    Query heads that share a KV head are never matched by copies of it: a decode treats them as queries of one head,
    a prefill chunk as heads over a stride-0 view.
    """
    tokens, heads, head_dim = q.shape
    shared = heads // kv_heads
    kv = rows.index_select(0, group.index).view(2, group.sequences, group.context, kv_heads, head_dim)
    k, v = kv.transpose(2, 3)
    q = q.view(tokens, kv_heads, shared, head_dim)
    if group.queries == 1:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask, scale=scale)
        return out.reshape(tokens, heads * head_dim)
    over = (kv_heads, shared, group.context, head_dim)
    out = F.scaled_dot_product_attention(
        q.permute(1, 2, 0, 3),
        k[0].unsqueeze(1).expand(over),
        v[0].unsqueeze(1).expand(over),
        attn_mask=group.mask,
        is_causal=group.causal,
        scale=scale,
    )
    return out.permute(2, 0, 1, 3).reshape(tokens, heads * head_dim)


class PagedAttention:
    """One step's attention for all layers: where new tokens go in the cache, and who attends to what."""

    def __init__(
        self,
        views: list[torch.Tensor],
        kv_heads: int,
        key_index: torch.Tensor,
        value_index: torch.Tensor,
        groups: Sequence[list[AttentionGroup]],
    ) -> None:
        """views: `layer_views` of the cache. key_index, value_index: [tokens] int64 rows this step's tokens are
        written to. groups: by layer, in the order of the tokens; layers that see alike share a list."""
        self._views = views
        self._kv_heads = kv_heads
        self._key_index = key_index
        self._value_index = value_index
        self._groups = groups

    def rotate_and_attend(
        self, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Rotate queries and keys, then `attend`.

        qkv: [tokens, heads + 2 · kv_heads, head_dim]. cos, sin: from `rope_angles`. Returns like `attend`.
        """
        rotated = qkv.shape[1] - self._kv_heads
        heads = rotated - self._kv_heads
        qk = apply_rope(qkv[:, :rotated], cos, sin)
        return self.attend(layer, qk[:, :heads], qk[:, heads:].flatten(1), qkv[:, rotated:].flatten(1), scale)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Store k and v of this step's tokens, then attend.

        q: [tokens, heads, head_dim]. k, v: [tokens, kv_heads · head_dim]. Returns [tokens, heads · head_dim].
        """
        rows = self._views[layer]
        rows.index_copy_(0, self._key_index, k)
        rows.index_copy_(0, self._value_index, v)
        groups = self._groups[layer]
        if len(groups) == 1:
            return group_attention(q, rows, groups[0], self._kv_heads, scale)
        parts = zip(q.split([group.sequences * group.queries for group in groups]), groups, strict=True)
        return torch.cat([group_attention(part, rows, group, self._kv_heads, scale) for part, group in parts])
