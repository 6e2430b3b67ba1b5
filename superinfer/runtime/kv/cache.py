"""The paged KV cache's bookkeeping: a pool of blocks and a prefix tree over them. Pure Python; no torch.

A tree node is one full block of tokens under its parent, so a path from the root is a prefix; roots are kept apart by
`cache_salt`. Sequences that share a prefix hold the same blocks: nothing is copied. A block nobody holds stays in the
tree until its room is wanted; least recently released goes first.

Why the oldest idle node is always a leaf: who holds a node holds its ancestors, and releases them after it. So a node
becomes idle no earlier than its descendants, and the idle queue, kept in that order, has every child before its parent.
Each operation costs O(blocks touched).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

# Blocks compared at once on the way down: an 8k-token prompt is 31 hops rather than 500 lookups in cold memory.
LANE = 16
TOKEN_BYTES = 4  # a block's key is its token ids as int32 bytes: sliced and hashed faster than a tuple


class Node:
    """One cached block. `holders` counts the block tables whose prefix runs through it.

    block: its place, -1 when it has none here (with two tiers: it is in the other one).
    parent: None for a root, and once the node is forgotten.
    is_proven: the logits of a position that attends to this block were numbers.
    lane: the LANE nodes that follow along one path, and their keys in one; used while the last of them has a parent.
    """

    __slots__ = ("block", "children", "holders", "is_proven", "key", "lane", "parent")

    def __init__(self, key: bytes, block: int, parent: Node | None) -> None:
        self.key = key
        self.block = block
        self.parent = parent
        self.children: dict[bytes, Node] = {}
        self.holders = 0
        self.is_proven = True
        self.lane: tuple[bytes, list[Node]] | None = None


class BlockTable:
    """The blocks of one sequence, in order. The first `len(nodes)` are in the tree, or duplicates of what is there.

    pending: the (parent, key) of the block being computed now, so that others can wait for it; None when there is none.
    sent: how many of the blocks the executor has been told of.
    """

    __slots__ = ("blocks", "nodes", "pending", "root", "sent", "spare")

    def __init__(self, root: Node) -> None:
        self.root = root
        self.nodes: list[Node] = []
        self.blocks: list[int] = []
        self.spare: list[int] = []  # blocks of ours whose content another sequence had put in the tree before
        self.pending: tuple[Node, bytes] | None = None
        self.sent = 0


class KVCache:
    """Blocks 0 .. num_blocks - 1 of `page_size` tokens each."""

    def __init__(self, num_blocks: int, page_size: int, *, prefix_cache: bool = True) -> None:
        if num_blocks < 1 or page_size < 1:
            raise ValueError(f"num_blocks={num_blocks} and page_size={page_size} must be at least 1")
        self.num_blocks = num_blocks
        self.page_size = page_size
        self.prefix_cache = prefix_cache
        self._free = deque(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[Node, None] = OrderedDict()
        self._roots: dict[str, Node] = {}
        self._being_computed: dict[tuple[Node, bytes], BlockTable] = {}

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds, kept for their content."""
        return len(self._idle)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free) + len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def blocks_private(self, table: BlockTable) -> int:
        """What `num_available` gains when this table gives its blocks up."""
        return len(table.blocks) + len(table.spare) - sum(node.holders > 1 for node in table.nodes)

    # ------------------------------------------------------------------ lookup

    def open(self, salt: str) -> BlockTable:
        """An empty table for a sequence of this salt. `release` it in the end."""
        root = self._roots.get(salt)
        if root is None:
            root = self._roots[salt] = Node(salt.encode(), -1, None)
        root.holders += 1
        return self._new_table(root)

    def match(self, tokens: array[int], salt: str, limit: int) -> list[Node]:
        """The longest cached path of whole blocks within `tokens[:limit]`. Holds nothing yet."""
        if not self.prefix_cache:
            return []
        node: Node | None = self._roots.get(salt)
        if node is None:
            return []
        path: list[Node] = []
        data = tokens[: limit // self.page_size * self.page_size].tobytes()
        size = self.page_size * TOKEN_BYTES
        at, hop = 0, size * LANE
        while at < len(data):
            lane = node.lane
            if lane is not None and data[at : at + hop] == lane[0] and lane[1][-1].parent is not None:
                path += lane[1]
                node = lane[1][-1]
                at += hop
                continue
            node = node.children.get(data[at : at + size])
            if node is None:
                break
            path.append(node)
            at += size
        return path

    def num_held(self, path: Sequence[Node]) -> int:
        """How many blocks of a matched path somebody holds: the first ones, as who holds a node holds its ancestors."""
        return bisect_left(path, True, key=lambda node: node.holders == 0)

    def is_being_computed(self, tokens: array[int], salt: str, path: Sequence[Node]) -> bool:
        """Whether another sequence is computing the block of `tokens` that follows `path` right now."""
        if not self._being_computed:
            return False
        parent = path[-1] if path else self._roots.get(salt)
        return parent is not None and (parent, self._key(tokens, len(path))) in self._being_computed

    # ------------------------------------------------------------------ hold, grow, release

    def adopt(self, table: BlockTable, path: Sequence[Node]) -> None:
        """Begin an empty table with a matched path, sharing its blocks."""
        assert not table.blocks, "adopt needs an empty table"
        for node in path:
            self._hold(node)
            table.nodes.append(node)
            table.blocks.append(node.block)

    def allocate(self, table: BlockTable, count: int) -> list[int] | None:
        """Append `count` blocks to the table, evicting idle ones; None, and nothing changed, if there are too few."""
        if count > self.num_available:
            return None
        new = []
        for _ in range(count):
            if not self._free:
                self._evict()
            new.append(self._free.pop())
        table.blocks += new
        return new

    def announce(self, table: BlockTable, tokens: array[int]) -> None:
        """Tell that the block after the table's cached prefix is being computed, if it will be a whole one."""
        at = len(table.nodes)
        if not self.prefix_cache or (at + 1) * self.page_size > len(tokens):
            self._withdraw(table)
            return
        pending = (table.nodes[-1] if table.nodes else table.root, self._key(tokens, at))
        if table.pending == pending:
            return
        self._withdraw(table)
        if pending not in self._being_computed:
            self._being_computed[pending] = table
            table.pending = pending

    def commit(self, table: BlockTable, tokens: array[int], computed: int, *, is_proven: bool = True) -> None:
        """Put the table's blocks that are full and computed (the first `computed` tokens) into the tree. is_proven:
        logits of the last of these tokens, or of a later one, were numbers."""
        if not self.prefix_cache:
            return
        if is_proven:
            self.prove(table)
        for at in range(len(table.nodes), computed // self.page_size):
            parent = table.nodes[-1] if table.nodes else table.root
            key = self._key(tokens, at)
            node = parent.children.get(key)
            if node is None:
                node = parent.children[key] = self._new_node(key, table.blocks[at], parent)
                node.holders = 1
                node.is_proven = is_proven
            else:
                self._hold(node)
                if node.block < 0:  # cached in the other tier only: now here too
                    node.block = table.blocks[at]
                else:
                    table.spare.append(table.blocks[at])
            table.nodes.append(node)
            if len(table.nodes) % LANE == 0:
                self._lay_lane(table, tokens)
        if table.pending is not None and len(table.nodes) * self.page_size >= len(tokens):
            self._withdraw(table)

    def prove(self, table: BlockTable) -> None:
        """The logits of a position that attends to all of the table's blocks in the tree were numbers. So what is above
        a proven node always is."""
        for node in reversed(table.nodes):
            if node.is_proven:
                break
            node.is_proven = True

    def unproven(self, tokens: array[int], salt: str) -> tuple[int, Node] | None:
        """The first block of a cached prefix of `tokens` that is not proven, and its place; None where all are."""
        path = self.match(tokens, salt, len(tokens))
        return next(((at, node) for at, node in enumerate(path) if not node.is_proven), None)

    def forget(self, node: Node) -> None:
        """Take a node that nobody holds, and what is under it, out of the tree: no lookup finds them again."""
        parent = node.parent
        assert parent is not None, "the node is in no tree"
        del parent.children[node.key]
        stack = [node]
        while stack:
            gone = stack.pop()
            assert not gone.holders, "somebody holds what is to be forgotten"
            del self._idle[gone]
            self._give((gone.block,))
            gone.parent = None
            stack += gone.children.values()
            gone.children = {}
        self._drop_root(parent)

    def release(self, table: BlockTable) -> None:
        """Give up everything the table holds; it must not be used again. Cached blocks stay until room is wanted."""
        self._withdraw(table)
        self._give(table.blocks[len(table.nodes) :])
        self._give(table.spare)
        for node in reversed(table.nodes):
            self._unhold(node)
        table.nodes, table.blocks, table.spare = [], [], []
        table.root.holders -= 1
        self._drop_root(table.root)

    def clear(self) -> None:
        """Forget all cached content that nobody holds."""
        while self._idle:
            self._evict()

    # ------------------------------------------------------------------ inside: what a second tier does in another way

    def _new_table(self, root: Node) -> BlockTable:
        return BlockTable(root)

    def _new_node(self, key: bytes, block: int, parent: Node) -> Node:
        return Node(key, block, parent)

    def _give(self, blocks: Iterable[int]) -> None:
        self._free += blocks

    def _hold(self, node: Node) -> None:
        if node.holders == 0:
            del self._idle[node]
        node.holders += 1

    def _unhold(self, node: Node) -> None:
        node.holders -= 1
        if node.holders == 0:
            self._idle[node] = None

    # ------------------------------------------------------------------ inside

    def _key(self, tokens: array[int], at: int) -> bytes:
        return tokens[at * self.page_size : (at + 1) * self.page_size].tobytes()

    def _lay_lane(self, table: BlockTable, tokens: array[int]) -> None:
        """Join the table's last LANE nodes, unless the node above them leads another way already."""
        end = len(table.nodes)
        above = table.nodes[end - LANE - 1] if end > LANE else table.root
        if above.lane is None or above.lane[1][-1].parent is None:
            keys = tokens[(end - LANE) * self.page_size : end * self.page_size].tobytes()
            above.lane = keys, table.nodes[end - LANE :]

    def _evict(self) -> None:
        node, _ = self._idle.popitem(last=False)
        assert not node.children, "an idle node was older than its child"
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        node.parent = None
        self._free.append(node.block)
        self._drop_root(parent)

    def _drop_root(self, node: Node) -> None:
        """Forget a salt that nothing uses any more."""
        if node.parent is None and not node.children and node.holders == 0:
            self._roots.pop(node.key.decode(), None)

    def _withdraw(self, table: BlockTable) -> None:
        if table.pending is not None:
            self._being_computed.pop(table.pending, None)
            table.pending = None
