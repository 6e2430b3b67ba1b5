"""A process that compiles grammars, so that one of them can be given up: the library's calls cannot be interrupted.

`python -m superinfer.runtime.engine.grammar_worker PATH VOCAB_SIZE EOS,IDS` reads Grammars from stdin and answers
Compiled ones on stdout, each a msgpack frame behind its length (4 bytes). Its memory is limited, and an alarm ends it.

Besides compiling, it walks the grammar: some ambiguous ones compile in no time, and then take seconds per token.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import IO, Any

import msgspec
import numpy as np

from superinfer.errors import InvalidRequestError, UnsupportedError
from superinfer.runtime.engine.grammar_lengths import Bound, TokenLengths, with_signs, without_long
from superinfer.runtime.engine.grammar_rewrite import rewrite
from superinfer.runtime.engine.grammar_utf8 import IN_JSON, VALID, in_utf8, numbers_of_characters, readable
from superinfer.runtime.engine.structural_tag import Format, with_leaves
from superinfer.runtime.protocol import Grammar

READY = b"ready"
COMPILE_S = 10.0  # one grammar, on the wall
MEMORY_BYTES = 1 << 30  # beyond what the process has once it is ready
SLOW_CALL_S = 0.05  # CPU time of one call of the matcher: a step of the engine waits for it
WALK_TOKENS = 160
SPECIAL = b"\xff"  # stands for a special token's text: what no UTF-8 has
# How each kind of vocabulary writes it.
_WRITTEN = {"RAW": SPECIAL, "BYTE_FALLBACK": b"<0xFF>", "BYTE_LEVEL": "ÿ".encode()}
WALKS_S = 1.0  # CPU time of all walks; those of a large vocabulary are cut short


class CompiledFrame(msgspec.Struct):
    """Answer to a Grammar: the compiled form, serialized, and the bounds of its long texts (see `grammar_lengths`), or
    why there is none."""

    compiled: str = ""
    error: str = ""
    bounds: list[Bound] = []


def read_frame(stream: IO[bytes]) -> bytes | None:
    """None at the end."""
    head = stream.read(4)
    return stream.read(struct.unpack("<I", head)[0]) if len(head) == 4 else None


def write_frame(stream: IO[bytes], body: bytes) -> None:
    stream.write(struct.pack("<I", len(body)) + body)
    stream.flush()


def load_tokenizer_info(path: str, vocab_size: int, eos_token_ids: tuple[int, ...]) -> Any:
    """xgrammar's view of the checkpoint's vocabulary. Special tokens have a byte that no text has: only a grammar that
    names one by its id allows it.

    Raises UnsupportedError where the checkpoint has no tokenizer.json.
    """
    import xgrammar
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(os.path.join(path, "tokenizer.json"))
    except Exception as error:  # the library raises Exception itself
        raise UnsupportedError(f"grammars need the model's tokenizer.json, which cannot be read: {error}") from None
    found = xgrammar.TokenizerInfo._detect_metadata_from_hf(tokenizer.to_str())
    vocabulary = [b""] * vocab_size
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    for text, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        if token_id < vocab_size and token_id not in eos_token_ids:
            vocabulary[token_id] = _WRITTEN[found["vocab_type"].name] if token_id in special else text.encode()
    return xgrammar.TokenizerInfo(
        vocabulary,
        vocab_type=found["vocab_type"],
        vocab_size=vocab_size,
        stop_token_ids=list(eos_token_ids) or None,
        add_prefix_space=found["add_prefix_space"],
    )


def compile_grammar(compiler: Any, grammar: Grammar) -> Any:
    """Raises RuntimeError with the library's words."""
    return compiler.compile_grammar(_parsed(grammar))


def _parsed(grammar: Grammar) -> Any:
    from xgrammar import Grammar as Parsed

    match grammar.kind:
        case "structural_tag":
            tag = with_leaves(json.loads(grammar.source), _as_ebnf)
            return Parsed.from_structural_tag(json.dumps({"type": "structural_tag", "format": tag}))
        case "json_schema":
            schema = json.dumps(rewrite(json.loads(grammar.source)))
            parsed = Parsed.from_json_schema(schema, any_whitespace=False)
        case "json_object":
            parsed = Parsed.from_json_schema('{"type": "object"}', strict_mode=False, any_whitespace=False)
        case "regex":
            parsed = Parsed.from_regex(grammar.source)
        case "ebnf":
            parsed = Parsed.from_ebnf(grammar.source)
    is_json = grammar.kind in ("json_schema", "json_object")
    parsed = Parsed.deserialize_json(in_utf8(parsed.serialize_json(), IN_JSON if is_json else VALID))
    if is_json:
        parsed = Parsed.from_ebnf(with_signs(numbers_of_characters(str(parsed))))
    return parsed


def _as_ebnf(leaf: Format) -> Format:
    """A leaf of a structural tag as it is compiled where it is all that there is: the library's own way with one has
    none of what is mended here."""
    match leaf["type"]:
        case "json_schema":
            grammar = Grammar(kind="json_schema", source=json.dumps(leaf["json_schema"]))
        case "regex":
            grammar = Grammar(kind="regex", source=leaf["pattern"])
        case "grammar":
            grammar = Grammar(kind="ebnf", source=leaf["grammar"])
        case _:
            return leaf
    return {"type": "grammar", "grammar": readable(str(_parsed(grammar)))}


def new_matcher(compiled: Any, bounds: list[Bound], lengths: TokenLengths | None, stop_ids: Sequence[int]) -> Any:
    """A matcher at the beginning, which keeps the bounds of long texts. lengths: of the vocabulary; None where no
    grammar has any."""
    import xgrammar

    if not bounds or lengths is None:
        return xgrammar.GrammarMatcher(compiled, override_stop_tokens=list(stop_ids) or None)
    from superinfer.runtime.engine.grammar_matcher import CountingMatcher

    return CountingMatcher(compiled, bounds, lengths, stop_ids)


def walk(
    compiled: Any, vocab_size: int, stop_ids: tuple[int, ...], bounds: list[Bound], lengths: TokenLengths | None
) -> str:
    """Why the grammar cannot be used, or "". Follows it along tokens it allows: one kept up, then random ones."""

    mask = np.full((1, -(-vocab_size // 32)), -1, dtype=np.int32)
    rng, began = random.Random(0), time.thread_time()
    for way in range(4):
        matcher = new_matcher(compiled, bounds, lengths, stop_ids)
        last = -1
        for _ in range(WALK_TOKENS):
            if time.thread_time() - began > WALKS_S:
                return ""
            before = time.thread_time()
            matcher.fill_next_token_bitmask(mask, 0)
            if bounds:
                matcher.narrow(mask[0].view(np.uint32))
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab_size])
            allowed = allowed[~np.isin(allowed, stop_ids)]
            if not len(allowed):
                if last < 0 and not matcher.is_completed():
                    return "no text of this model's tokens matches it"
                break
            if way >= 2 or last not in allowed:
                last = int(allowed[rng.randrange(len(allowed))] if way else allowed[0])
            matcher.accept_token(last)
            if time.thread_time() - before > SLOW_CALL_S:
                return f"it is too ambiguous: a token takes more than {SLOW_CALL_S * 1e3:.0f} ms to check; simplify it"
    return ""


def plain_words(error: BaseException) -> str:
    """The library's message without its source files and times."""
    text = re.sub(r"\[[\d:]+\] \S+?:\d+: ", "", str(error)).strip()
    text = re.sub(r"^Check failed: \(.*?\) is \w+: ", "", text)
    return text[:400] or type(error).__name__


def answer(
    compiler: Any, grammar: Grammar, vocab_size: int, stop_ids: tuple[int, ...], lengths: Callable[[], TokenLengths]
) -> CompiledFrame:
    """Compile and walk. lengths: of the vocabulary, made when they are wanted."""
    try:
        marked, bounds = without_long(grammar)
        if bounds and lengths().meet_signs:
            marked, bounds = grammar, []
        compiled = compile_grammar(compiler, marked)
        why = walk(compiled, vocab_size, stop_ids, bounds, lengths() if bounds else None)
        return CompiledFrame(error=why) if why else CompiledFrame(compiled=compiled.serialize_json(), bounds=bounds)
    except MemoryError:
        return CompiledFrame(error="it needs too much memory; make it smaller")
    except Exception as error:  # whatever the library makes of a malformed grammar
        return CompiledFrame(error=plain_words(error))


def main() -> None:
    """Serve until stdin ends."""
    import xgrammar

    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the frames
    path, vocab_size = sys.argv[1], int(sys.argv[2])
    stop_ids = tuple(int(part) for part in sys.argv[3].split(",") if part)
    try:
        info = load_tokenizer_info(path, vocab_size, stop_ids)
    except InvalidRequestError as error:
        write_frame(out, str(error).encode())
        return
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    lengths = cache(lambda: TokenLengths(info.decoded_vocab))
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + MEMORY_BYTES,) * 2)
    write_frame(out, READY)
    while (frame := read_frame(sys.stdin.buffer)) is not None:
        signal.alarm(int(COMPILE_S) + 5)  # should whoever asked be gone
        reply = answer(compiler, msgspec.msgpack.decode(frame, type=Grammar), vocab_size, stop_ids, lengths)
        signal.alarm(0)
        write_frame(out, msgspec.msgpack.encode(reply))


def _data_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))


if __name__ == "__main__":
    main()
