"""Requests that go on from others: held until those have ended, then made whole. Pure Python.

A program often knows what it will say behind an answer before that is written. Sent ahead, its next call begins in the
step after the answer's last token: no message goes to the program and back, and no text is tokenized meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import msgspec

from superinfer.runtime.protocol import Generate
from superinfer.runtime.scheduler.sequence import Sequence


class Followers:
    """Held requests, by client and request id."""

    def __init__(self) -> None:
        self._held: dict[bytes, dict[str, Generate]] = {}
        self._after: dict[tuple[bytes, str], list[str]] = {}
        self._without: dict[tuple[bytes, str], set[int]] = {}  # continuations that were cancelled meanwhile
        self._count = 0

    def __len__(self) -> int:
        """Sequences that are held."""
        return self._count

    def get(self, client: bytes, request_id: str) -> Generate | None:
        """One that is held."""
        return self._held.get(client, {}).get(request_id)

    def hold(self, client: bytes, request: Generate) -> None:
        """Keep it until `take` or `drop`."""
        self._held.setdefault(client, {})[request.request_id] = request
        self._after.setdefault((client, request.after), []).append(request.request_id)
        self._count += request.sampling.n

    def take(self, client: bytes, request_id: str) -> list[tuple[Generate, Collection[int]]]:
        """Those that directly follow a request, in the order they came in, each with the continuations that are not to
        begin; no longer held."""
        if not self._count:
            return []
        found: list[tuple[Generate, Collection[int]]] = []
        for follower in self._after.pop((client, request_id), ()):
            without = self._without.get((client, follower), ())
            request = self._remove(client, follower)
            if request is not None:
                found.append((request, without))
        return found

    def drop(self, client: bytes, request_id: str) -> Iterator[Generate]:
        """All that follow a request, directly or not; no longer held."""
        for request, _ in self.take(client, request_id):
            yield request
            yield from self.drop(client, request.request_id)

    def cancel(self, client: bytes, request_id: str, index: int | None = None) -> list[int] | None:
        """The continuations of a held request that will not begin now, all or only `index`; None if it is not held.
        Once none is left it is no longer held. Those after it stay, to be dropped."""
        request = self.get(client, request_id)
        if request is None:
            return None
        without = self._without.setdefault((client, request_id), set())
        ended = [at for at in range(request.sampling.n) if at not in without and index in (None, at)]
        if len(without) + len(ended) < request.sampling.n:
            without.update(ended)
            self._count -= len(ended)
            return ended
        self._remove(client, request_id)
        siblings = self._after[client, request.after]
        siblings.remove(request_id)
        if not siblings:
            del self._after[client, request.after]
        return ended

    def forget(self, client: bytes) -> None:
        """Drop all of a client that has gone."""
        for request_id, request in list(self._held.get(client, {}).items()):
            self._remove(client, request_id)
            self._after.pop((client, request.after), None)

    def _remove(self, client: bytes, request_id: str) -> Generate | None:
        held = self._held.get(client, {})
        request = held.pop(request_id, None)
        if request is not None:
            self._count -= request.sampling.n - len(self._without.pop((client, request_id), ()))
            if not held:
                del self._held[client]
        return request


def whole(follower: Generate, sequence: Sequence) -> Generate:
    """The request as if sent now: behind all tokens of a sequence that has ended."""
    tokens = sequence.tokens.tolist()
    if sequence.finish_reason == "stop":
        tokens.pop()  # it ended the output and is no part of it
    return msgspec.structs.replace(follower, prompt=tokens + follower.prompt, after="")
