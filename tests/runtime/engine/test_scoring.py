"""`select` on an engine: what its options share is computed once."""

from __future__ import annotations

import asyncio
from typing import Any

import superinfer as si
from superinfer.runtime.client import AsyncEngineClient
from superinfer.runtime.launch import EngineProcess


def test_options_of_a_select_compute_their_common_prompt_once(tiny_engine: EngineProcess):
    document = "".join(f" line {i} of the document." for i in range(30))  # a token is a character
    options = [f" answer {i}" for i in range(8)]

    @si.function
    def program(s: Any) -> None:
        s += document
        for branch in s.fork(3):
            branch += " Which?" + si.select("choice", options)

    async def prefilled() -> int:
        async with await AsyncEngineClient.connect(tiny_engine.address) as client:
            return (await client.stats()).prefill_tokens

    before = asyncio.run(prefilled())
    with si.RuntimeEndpoint(tiny_engine.address) as backend:
        page = backend.info.page_size
        assert program.run(backend=backend).error() is None
    computed = asyncio.run(prefilled()) - before
    rest = len(" Which? answer 0") + page  # of each: its own tokens, and those of the prompt's last block
    assert len(document) < computed <= len(document) + 3 * 8 * rest
