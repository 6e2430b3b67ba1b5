"""Token ids of texts that were used last, as many as fit in so many bytes. Pure Python."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

ENTRY_BYTES = 400  # of an entry, beside its texts and ids: its place in the dictionary, links, and the list's head
ID_BYTES = 36  # of an id: the number, and the list's reference to it


class RecentTexts(Generic[K]):
    """Ids by key; the least recently used go first. Keys are equal where their texts are. Safe to use from several
    threads; each call takes the same time however many are kept."""

    def __init__(self, most: int) -> None:
        """most: bytes, of all that is kept. An entry that alone takes more than an eighth is not."""
        self._most = most
        self._known: OrderedDict[K, tuple[int, list[int]]] = OrderedDict()  # bytes, ids
        self._held = 0
        self._lock = threading.Lock()

    def get(self, key: K) -> list[int] | None:
        """The ids, not to be changed; None where they are not known."""
        with self._lock:
            found = self._known.get(key)
            if found is None:
                return None
            self._known.move_to_end(key)
            return found[1]

    def put(self, key: K, texts: Sequence[str], ids: list[int]) -> None:
        """Keep the ids. texts: those that the key is made of."""
        size = ENTRY_BYTES + sum(map(sys.getsizeof, texts)) + ID_BYTES * len(ids)
        if size > self._most // 8:
            return
        with self._lock:
            self._held += size - self._known.pop(key, (0, ids))[0]
            self._known[key] = size, ids
            while self._held > self._most:
                self._held -= self._known.popitem(last=False)[1][0]
