"""The paged KV cache's bookkeeping: a pool of blocks and a prefix tree over them. Pure Python; no torch.

A tree node is a run of full blocks of tokens under its parent, so a path from the root is a prefix; roots are kept
apart by `cache_salt`. Where two paths part, a node is cut in two: what happens to blocks happens to runs of them, in
slices. Sequences that share a prefix hold the same blocks: nothing is copied. A block nobody holds stays in the tree
until its room is wanted; least recently released goes first, of one run the last first.

Why the oldest idle node is always a leaf: who holds a node holds its ancestors, and releases them after it. So a node
becomes idle no earlier than its descendants, and the idle queue, kept in that order, has every child before its parent.
Each operation costs O(nodes touched), and copying the blocks' numbers.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from superinfer.runtime.kv.free_blocks import FreeBlocks

TOKEN_BYTES = 4  # a node's key is its token ids as int32 bytes: sliced, compared and hashed faster than a tuple


class Node:
    """Cached blocks, one under the other; other paths branch off at the end of the last one only.

    key: their tokens. start, end: how many blocks from the root its first one begins and its last one ends.
    blocks: their places (with two tiers: of the first ones, others are in DRAM only). parent: None for a root.
    children: by the key of their first block. holders: how many block tables have their prefix run through it.
    num_proven: of so many of its blocks, from the first on, logits of a position that attends to them were numbers.
    """

    __slots__ = ("blocks", "children", "end", "holders", "key", "num_proven", "parent", "start")

    def __init__(self, key: bytes, blocks: list[int], parent: Node | None, length: int) -> None:
        self.key = bytearray(key)
        self.blocks = blocks
        self.parent = parent
        self.children: dict[bytes, Node] = {}
        self.start: int = parent.end if parent is not None else 0
        self.end: int = self.start + length
        self.holders = 0
        self.num_proven = 0

    @property
    def length(self) -> int:
        """How many blocks."""
        return self.end - self.start

    def path(self) -> list[Node]:
        """The nodes from the root, which is not one of them, to this one."""
        nodes, node = [], self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        nodes.reverse()
        return nodes

    def split(self, length: int, page_bytes: int) -> Node:
        """Cut off the first `length` blocks: returns a new node of those, under which this one is from now on, as who
        holds it holds it to its end."""
        assert self.parent is not None and 0 < length < self.length
        size = length * page_bytes
        upper = type(self)(bytes(self.key[:size]), self.blocks[:length], self.parent, length)
        upper.holders = self.holders
        upper.num_proven = min(self.num_proven, length)
        self.num_proven -= upper.num_proven
        self.parent.children[bytes(self.key[:page_bytes])] = upper
        del self.key[:size], self.blocks[:length]
        upper.children[bytes(self.key[:page_bytes])] = self
        self.parent, self.start = upper, upper.end
        return upper


@dataclass(frozen=True, slots=True)
class Prefix:
    """A cached prefix of `length` blocks, that ends in `node` or above it. It holds nothing, and is good until blocks
    are given up."""

    node: Node
    length: int

    def __len__(self) -> int:
        return self.length

    def parts(self) -> list[tuple[Node, int]]:
        """Its nodes, from the root on, and how many blocks of each belong to it: of all but the last one all."""
        nodes = [node for node in self.node.path() if node.start < self.length]
        return [(node, min(node.end, self.length) - node.start) for node in nodes]


NO_PREFIX = Prefix(Node(b"", [], None, 0), 0)


class BlockTable:
    """The blocks of one sequence, in order. The first `num_cached` are in the tree, or duplicates of what is there.

    node: where in the tree they end. pending: the (parent, key) of the block being computed now, so that others can
    wait for it; None when there is none. sent: how many of the blocks the executor has been told of.
    """

    __slots__ = ("blocks", "node", "pending", "root", "sent", "spare")

    def __init__(self, root: Node) -> None:
        self.root = self.node = root
        self.blocks: list[int] = []
        self.spare: list[int] = []  # blocks of ours whose content another sequence had put in the tree before
        self.pending: tuple[Node, bytes] | None = None
        self.sent = 0

    @property
    def num_cached(self) -> int:
        """Blocks in the tree."""
        return self.node.end

    @property
    def prefix(self) -> Prefix:
        """What of it is in the tree."""
        return Prefix(self.node, self.node.end)


class KVCache:
    """Blocks 0 .. num_blocks - 1 of `page_size` tokens each."""

    def __init__(self, num_blocks: int, page_size: int, *, prefix_cache: bool = True) -> None:
        if num_blocks < 1 or page_size < 1:
            raise ValueError(f"num_blocks={num_blocks} and page_size={page_size} must be at least 1")
        self.num_blocks = num_blocks
        self.page_size = page_size
        self.prefix_cache = prefix_cache
        self._page_bytes = page_size * TOKEN_BYTES
        self._free = FreeBlocks(num_blocks)
        self._idle: OrderedDict[Node, None] = OrderedDict()
        self._num_idle = 0  # blocks of those
        self._roots: dict[str, Node] = {}
        self._being_computed: dict[tuple[Node, bytes], BlockTable] = {}

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds, kept for their content."""
        return self._num_idle

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free) + self._num_idle

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def blocks_private(self, table: BlockTable) -> int:
        """What `num_available` gains when this table gives its blocks up."""
        return len(table.blocks) + len(table.spare) - self.num_shared(table)

    def num_shared(self, table: BlockTable) -> int:
        """How many blocks of a table somebody else holds too: the first ones."""
        node = table.node
        while node.parent is not None and node.holders < 2:
            node = node.parent
        return node.end

    # ------------------------------------------------------------------ lookup

    def open(self, salt: str) -> BlockTable:
        """An empty table for a sequence of this salt. `release` it in the end."""
        root = self._roots.get(salt)
        if root is None:
            root = self._roots[salt] = self._new_node(salt.encode(), [], None, 0)
        root.holders += 1
        return self._new_table(root)

    def match(self, tokens: array[int], salt: str, limit: int) -> Prefix:
        """The longest cached prefix of whole blocks within `tokens[:limit]`."""
        node = self._roots.get(salt)
        if not self.prefix_cache or node is None:
            return NO_PREFIX
        data = tokens[: limit // self.page_size * self.page_size].tobytes()
        at = 0
        while at < len(data):
            child = node.children.get(data[at : at + self._page_bytes])
            if child is None:
                break
            node = child
            if not data.startswith(node.key, at):
                return Prefix(node, node.start + self._num_common(data, at, node))
            at += len(node.key)
        return Prefix(node, node.end)

    def num_held(self, prefix: Prefix) -> int:
        """How many blocks of a prefix somebody holds: the first ones, as who holds a node holds its ancestors."""
        node = prefix.node
        while node.parent is not None and not node.holders:
            node = node.parent
        return min(node.end, prefix.length)

    def is_being_computed(self, tokens: array[int], salt: str, prefix: Prefix) -> bool:
        """Whether another sequence is computing the block of `tokens` that follows `prefix` right now."""
        if not self._being_computed:
            return False
        parent = prefix.node if prefix.length else self._roots.get(salt)
        if parent is None or parent.end != prefix.length:
            return False  # nobody's blocks end within a node
        return (parent, self._key(tokens, prefix.length)) in self._being_computed

    # ------------------------------------------------------------------ hold, grow, release

    def adopt(self, table: BlockTable, prefix: Prefix) -> None:
        """Begin an empty table with a matched prefix, sharing its blocks."""
        for node in self._begin(table, prefix):
            self._hold(node)
            table.blocks += node.blocks

    def allocate(self, table: BlockTable, count: int) -> list[int] | None:
        """Append `count` blocks to the table, evicting idle ones; None, and nothing changed, if there are too few."""
        if count > self.num_available:
            return None
        new = self._take(count)
        table.blocks += new
        return new

    def announce(self, table: BlockTable, tokens: array[int]) -> None:
        """Tell that the block after the table's cached prefix is being computed, if it will be a whole one."""
        at = table.num_cached
        if not self.prefix_cache or (at + 1) * self.page_size > len(tokens):
            self._withdraw(table)
            return
        pending = (table.node, self._key(tokens, at))
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
        at, end, size = table.node.end, computed // self.page_size, self._page_bytes
        if end <= at:
            return
        if table.pending is not None:
            self._withdraw(table)  # what it has announced is there now
        data = tokens[at * self.page_size : end * self.page_size].tobytes()
        while data:
            child = table.node.children.get(data[:size])
            if child is None:
                self._put(table, data, table.blocks[at:end], is_proven)
                return
            common = self._num_common(data, 0, child)
            if common < child.length:
                child = self._split(child, common)
            self._hold(child)
            self._share(table, child, table.blocks[at : at + common])
            table.node = child
            at, data = at + common, data[common * size :]

    def prove(self, table: BlockTable) -> None:
        """The logits of a position that attends to all of the table's blocks in the tree were numbers. So what is above
        a proven block always is."""
        node: Node | None = table.node
        while node is not None and node.num_proven < node.end - node.start:
            node.num_proven = node.end - node.start
            node = node.parent

    def unproven(self, tokens: array[int], salt: str) -> Node | None:
        """Of a cached prefix of `tokens` the node that begins with its first block that is not proven; None where all
        are."""
        for node, length in self.match(tokens, salt, len(tokens)).parts():
            if node.num_proven < length:
                if node.num_proven:
                    self._split(node, node.num_proven)
                return node
        return None

    def forget(self, node: Node) -> None:
        """Take a node that nobody holds, and what is under it, out of the tree: no lookup finds them again."""
        self._detach(node)
        stack = [node]
        while stack:
            gone = stack.pop()
            assert not gone.holders, "somebody holds what is to be forgotten"
            del self._idle[gone]
            self._num_idle -= len(gone.blocks)
            self._give(gone.blocks)
            stack += gone.children.values()
            gone.children = {}

    def release(self, table: BlockTable) -> None:
        """Give up everything the table holds; it must not be used again. Cached blocks stay until room is wanted."""
        self._withdraw(table)
        self._give(table.blocks[table.num_cached :])
        self._give(table.spare)
        for node in reversed(table.node.path()):
            self._unhold(node)
        self._leave(table)

    def clear(self) -> None:
        """Forget all cached content that nobody holds."""
        self._give(self._evict(self._num_idle))

    # ------------------------------------------------------------------ inside: what a second tier does in another way

    def _new_table(self, root: Node) -> BlockTable:
        return BlockTable(root)

    def _new_node(self, key: bytes, blocks: list[int], parent: Node | None, length: int) -> Node:
        return Node(key, blocks, parent, length)

    def _give(self, blocks: Sequence[int]) -> None:
        self._free.give(blocks)

    def _take(self, count: int) -> list[int]:
        """So many blocks, of which there must be that many available."""
        free = self._free
        if count <= len(free):
            return free.take(count)
        taken = free.take(len(free))
        return taken + self._evict(count - len(taken))

    def _evict(self, count: int) -> list[int]:
        """So many blocks of idle nodes, the oldest first, for good."""
        gone: list[int] = []
        while len(gone) < count:
            node = next(iter(self._idle))
            assert not node.children, "an idle node was older than its child"
            left = max(0, len(node.blocks) - (count - len(gone)))
            gone += node.blocks[: left - 1 : -1] if left else node.blocks[::-1]
            if left:
                self._shorten(node, left)
            else:
                del self._idle[node]
                self._detach(node)
        self._num_idle -= count
        return gone

    def _hold(self, node: Node) -> None:
        if node.holders == 0:
            del self._idle[node]
            self._num_idle -= len(node.blocks)
        node.holders += 1

    def _unhold(self, node: Node) -> None:
        node.holders -= 1
        if node.holders == 0:
            self._idle[node] = None
            self._num_idle += len(node.blocks)

    def _share(self, table: BlockTable, node: Node, blocks: list[int]) -> None:
        """The table has computed what is cached already, in these blocks."""
        table.spare += blocks

    def _may_grow(self, node: Node) -> bool:
        """Whether more blocks of the only table that holds a node, which ends there, can be of the same node."""
        return True

    def _split(self, node: Node, length: int) -> Node:
        """See Node.split."""
        upper = node.split(length, self._page_bytes)
        if node in self._idle:
            self._idle[upper] = None
            self._renew(upper)
        return upper

    def _renew(self, node: Node) -> None:
        """What is idle of a path that ends with this node is the newest, each child before its parent."""
        for each in reversed(node.path()):
            if each in self._idle:
                self._idle.move_to_end(each)

    # ------------------------------------------------------------------ inside

    def _key(self, tokens: array[int], at: int) -> bytes:
        return tokens[at * self.page_size : (at + 1) * self.page_size].tobytes()

    def _num_common(self, data: bytes, at: int, node: Node) -> int:
        """How many blocks of a node, whose first one is the next of `data` at byte `at`, the data goes on with."""
        size, key = self._page_bytes, node.key
        same, most = 1, min(len(key), len(data) - at) // size
        while same < most:
            middle = (same + most + 1) // 2
            if data[at + same * size : at + middle * size] == key[same * size : middle * size]:
                same = middle
            else:
                most = middle - 1
        return same

    def _begin(self, table: BlockTable, prefix: Prefix) -> list[Node]:
        """The nodes of a prefix, cut where it ends, which an empty table is to hold from now on."""
        assert not table.blocks, "adopt needs an empty table"
        node = prefix.node
        while node.parent is not None and node.start >= prefix.length:
            node = node.parent
        assert prefix.length <= node.end, "the prefix has been given up since it was matched"
        if prefix.length < node.end:
            node = self._split(node, prefix.length - node.start)
        if prefix.length:
            table.node = node
        return node.path()

    def _put(self, table: BlockTable, key: bytes, blocks: list[int], is_proven: bool) -> None:
        """Blocks of a table that are new to the tree, behind those that are in it."""
        node = table.node
        if node.holders == 1 and not node.children and node.parent is not None and self._may_grow(node):
            node.key += key
            node.blocks += blocks
            node.end += len(blocks)
        else:
            child = self._new_node(key, blocks, node, len(blocks))
            node.children[key[: self._page_bytes]] = child
            child.holders = 1
            table.node = node = child
        if is_proven:
            node.num_proven = node.length

    def _shorten(self, node: Node, length: int) -> None:
        """Forget all but the first blocks of a node, which has nothing under it."""
        del node.blocks[length:], node.key[length * self._page_bytes :]
        node.end = node.start + length
        node.num_proven = min(node.num_proven, length)

    def _detach(self, node: Node) -> None:
        """Take it from under its parent."""
        parent = node.parent
        assert parent is not None, "the node is in no tree"
        del parent.children[bytes(node.key[: self._page_bytes])]
        self._drop_root(parent)

    def _leave(self, table: BlockTable) -> None:
        """The table holds nothing any more."""
        table.blocks, table.spare, table.node = [], [], table.root
        table.root.holders -= 1
        self._drop_root(table.root)

    def _drop_root(self, node: Node) -> None:
        """Forget a salt that nothing uses any more."""
        if node.parent is None and not node.children and node.holders == 0:
            self._roots.pop(node.key.decode(), None)

    def _withdraw(self, table: BlockTable) -> None:
        if table.pending is not None:
            self._being_computed.pop(table.pending, None)
            table.pending = None
