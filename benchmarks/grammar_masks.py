"""What a grammar costs on the host, over a vocabulary of 128,256 tokens: compiling it, a mask, a token, a jump.

CPU time of single calls, along outputs drawn at random from what is allowed. Schemas are shown as the compiling
library has them and as the engine has them compiled (`grammar_rewrite`, `grammar_utf8`).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import xgrammar
from record import write

from superinfer.bench.constrained_schemas import Invoice, Team
from superinfer.bench.shapes import write_tokenizer
from superinfer.runtime.engine.constraints import Constraints
from superinfer.runtime.engine.grammar_jump import Retokenizer
from superinfer.runtime.engine.grammar_lengths import Bound, TokenLengths, without_long
from superinfer.runtime.engine.grammar_worker import compile_grammar, load_tokenizer_info, new_matcher
from superinfer.runtime.protocol import Grammar, SamplingParams
from superinfer.runtime.scheduler.plan import SlotInit

VOCAB, EOS = 128256, 2


def record(**properties: Any) -> dict[str, Any]:
    """A schema."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


SCHEMAS: dict[str, dict[str, Any]] = {
    "texts of any length": record(a={"type": "string"}, b={"type": "string"}),
    "texts of at most 24": record(a={"type": "string", "maxLength": 24}, b={"type": "string", "maxLength": 24}),
    "texts of at most 4,000": record(a={"type": "string", "maxLength": 4000}, b={"type": "string", "maxLength": 4000}),
    "numbers and choices": record(a={"type": "integer"}, b={"enum": ["red", "green", "blue"]}, c={"type": "boolean"}),
    "bench constrained, team": msgspec.json.schema(Team),
    "bench constrained, invoice": msgspec.json.schema(Invoice),
}


NOT_AS_THEY_ARE = {"texts of at most 4,000"}  # the library does not end in time


def compiled_by_the_engine(compiler: Any, schema: dict[str, Any]) -> tuple[Any, list[Bound]]:
    """As its worker does it."""
    marked, bounds = without_long(Grammar(kind="json_schema", source=json.dumps(schema)))
    return compile_grammar(compiler, marked), bounds


def compiled_as_it_is(compiler: Any, schema: dict[str, Any]) -> tuple[Any, list[Bound]]:
    """As the library does it."""
    return compiler.compile_json_schema(json.dumps(schema), any_whitespace=False), []


def measure(
    info: Any, lengths: TokenLengths, retokenizer: Retokenizer, schema: dict[str, Any], compiles: Any, outputs: int
) -> dict[str, Any]:
    """Milliseconds of each call."""
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    started = time.thread_time()
    compiled, bounds = compiles(compiler, schema)
    compile_s = time.thread_time() - started
    mask = xgrammar.allocate_token_bitmask(1, VOCAB)
    bits, words = mask.numpy().view(np.uint8), mask.numpy().view(np.uint32)
    rng = random.Random(0)
    calls: dict[str, list[float]] = {"mask": [], "token": [], "jump": []}
    for _ in range(outputs):
        matcher, tail = new_matcher(compiled, bounds, lengths, ()), []
        for _ in range(400):
            began = time.thread_time()
            matcher.fill_next_token_bitmask(mask, 0)
            if bounds:
                matcher.narrow(words[0])
            filled = time.thread_time()
            allowed = np.flatnonzero(np.unpackbits(bits[0], bitorder="little")[:VOCAB])
            tail.append(int(allowed[rng.randrange(len(allowed))]))
            before = time.thread_time()
            matcher.accept_token(tail[-1])
            accepted = time.thread_time()
            calls["mask"].append((filled - began) * 1e3)
            calls["token"].append((accepted - before) * 1e3)
            if matcher.is_terminated():
                break
            before = time.thread_time()
            text = matcher.find_jump_forward_string()
            if len(text) > 3:
                retokenizer.tokens(text, tail[-8:])
            calls["jump"].append((time.thread_time() - before) * 1e3)
    return {"compile_s": compile_s, **{name: _spread(values) for name, values in calls.items()}}


class Compiled:
    """In place of the engine's compiler: one grammar, compiled before."""

    vocab_size = VOCAB

    def __init__(self, compiled: Any, retokenizer: Retokenizer) -> None:
        self._compiled, self._retokenizer = compiled, retokenizer

    def matcher(self, *_: Any) -> xgrammar.GrammarMatcher:
        return xgrammar.GrammarMatcher(self._compiled)

    def forced(self, matcher: xgrammar.GrammarMatcher, tail: Any) -> list[int]:
        return self._retokenizer.forced(matcher, tail)


def measure_steps(info: Any, retokenizer: Retokenizer, schema: dict[str, Any], batch: int, jumps: bool) -> Any:
    """What `Constraints.mask` takes of the host in a step of `batch` rows, but for applying the mask, which is the
    device's. Sequences that have ended begin anew."""
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    grammars: Any = Compiled(compiled_by_the_engine(compiler, schema)[0], retokenizer)
    constraints = Constraints(batch, torch.device("cpu"), grammars, torch.from_numpy)
    sampling, rng = SamplingParams(grammar=Grammar(kind="json_object")), random.Random(0)
    slots, logits = np.arange(batch), torch.empty(batch, 1)
    for slot in range(batch):
        constraints.start(SlotInit(slot, sampling, 0, (), (), (EOS,)), jumps=jumps)
    times, picked = [], [0] * batch
    for _ in range(200):
        began = time.thread_time()
        constraints.mask(logits, slots, slots)
        times.append((time.thread_time() - began) * 1e3)
        assert constraints._bitmask is not None
        bits = constraints._bitmask.numpy().view(np.uint8)
        for slot in range(batch):
            allowed = np.flatnonzero(np.unpackbits(bits[slot], bitorder="little")[:VOCAB])
            picked[slot] = int(allowed[rng.randrange(len(allowed))])
        ended = [slot for slot in range(batch) if picked[slot] == EOS]
        going = np.array([slot for slot in range(batch) if picked[slot] != EOS])
        constraints.sampled(slots, going, lambda: picked)
        for slot in ended:
            constraints._read()
            constraints.start(SlotInit(slot, sampling, 0, (), (), (EOS,)), jumps=jumps)
    return _spread(times)


def _spread(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {"calls": len(values), "p50_ms": cuts[49], "p90_ms": cuts[89], "p99_ms": cuts[98], "max_ms": max(values)}


def main() -> None:
    """Measure, print, write results/grammar-masks.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outputs", type=int, default=12, help="of each schema")
    parser.add_argument("--batch", type=int, default=64, help="rows of the steps that are timed")
    parser.add_argument("--name", default="grammar-masks", help="of the result file")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    steps: dict[str, Any] = {}
    applied = xgrammar.apply_token_bitmask_inplace
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), VOCAB)
        info = load_tokenizer_info(folder, VOCAB, (EOS,))
        retokenizer, lengths = Retokenizer(folder, info), TokenLengths(info.decoded_vocab)
        for name, schema in SCHEMAS.items():
            for how, compiles in (("as it is", compiled_as_it_is), ("rewritten", compiled_by_the_engine)):
                if how == "as it is" and name in NOT_AS_THEY_ARE:
                    continue
                made = measure(info, lengths, retokenizer, schema, compiles, arguments.outputs)
                found[f"{name}, {how}"] = made
                times = ", ".join(
                    f"{call} {made[call]['p50_ms']:.3f} / {made[call]['p90_ms']:.3f} / {made[call]['max_ms']:.2f} ms"
                    for call in ("mask", "token", "jump")
                )
                print(f"{name}, {how}: compiled in {made['compile_s']:.2f} s; p50 / p90 / max: {times}", flush=True)
        xgrammar.apply_token_bitmask_inplace = lambda *_, **__: None
        for name in list(SCHEMAS)[-2:]:
            for jumps in (False, True):
                how = f"{name}, {'jumps' if jumps else 'no jumps'}"
                steps[how] = made = measure_steps(info, retokenizer, SCHEMAS[name], arguments.batch, jumps)
                print(f"step of {arguments.batch}, {how}: p50 {made['p50_ms']:.2f} p90 {made['p90_ms']:.2f} ms")
        xgrammar.apply_token_bitmask_inplace = applied
    measured = {"vocabulary": VOCAB, "schemas": found, "step": steps}
    print(f"written to {write(arguments.name, 'python benchmarks/grammar_masks.py', measured)}")


if __name__ == "__main__":
    main()
