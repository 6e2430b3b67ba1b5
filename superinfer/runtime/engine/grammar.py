"""Grammars, compiled off the critical path of steps and cached. See docs/constrained.md.

A thread hands each new grammar to a worker process, which compiles and tries it under limits of time and memory, and is
killed when it does not keep to them (`grammar_worker`). What comes back is kept in a bounded cache, failures too.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, TYPE_CHECKING, NamedTuple, cast

import msgspec

from superinfer.errors import InvalidRequestError, QueueFullError, SuperinferError
from superinfer.runtime.engine import grammar_worker
from superinfer.runtime.engine.grammar_check import check_grammar
from superinfer.runtime.engine.grammar_jump import Retokenizer
from superinfer.runtime.engine.grammar_lengths import Bound, TokenLengths
from superinfer.runtime.engine.grammar_worker import CompiledFrame, read_frame, write_frame
from superinfer.runtime.protocol import Grammar

if TYPE_CHECKING:
    import xgrammar

CACHED = 128  # grammars kept, failures among them
MAX_WAITING = 64  # grammars not compiled yet
START_S = 120.0  # the worker imports torch; seconds on a busy machine


class Compiled(NamedTuple):
    """A grammar, and the bounds of its long texts, which are not in it (see `grammar_lengths`)."""

    grammar: xgrammar.CompiledGrammar
    bounds: list[Bound]


class GrammarCompiler:
    """Grammars of one vocabulary. For the engine's thread; the work is done elsewhere.

    path: folder of the checkpoint. vocab_size: of the logits. eos_token_ids: allowed where a grammar may end.
    jumps: whether text that a grammar forces is taken without sampling it; may be set until `prepare` or a request.
    """

    def __init__(self, path: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self.jumps = True
        self._retokenizer: Retokenizer | None = None
        self._vocabulary = (path, vocab_size, tuple(eos_token_ids))
        self._thread: ThreadPoolExecutor | None = None
        self._worker: _Worker | None = None
        self._closed = threading.Event()
        self._info: xgrammar.TokenizerInfo | None = None
        self._lengths: TokenLengths | None = None
        self._cache: OrderedDict[Grammar, Future[Compiled]] = OrderedDict()

    def request(self, grammar: Grammar) -> Future[Compiled]:
        """The grammar, once it is compiled; the future raises InvalidRequestError for one that cannot be used.

        Raises at once: InvalidRequestError or UnsupportedError (see `check_grammar`), QueueFullError.
        """
        found = self._cache.get(grammar)
        if found is None or _is_worth_another_try(found):
            check_grammar(grammar)
            if sum(not future.done() for future in self._cache.values()) >= MAX_WAITING:
                raise QueueFullError(f"{MAX_WAITING} grammars wait to be compiled; try again later")
            self._thread = self._thread or ThreadPoolExecutor(1, "grammar")
            found = self._cache[grammar] = self._thread.submit(self._compile, grammar)
        self._cache.move_to_end(grammar)
        for old in [key for key, future in self._cache.items() if future.done()][:-CACHED]:
            del self._cache[old]
        return found

    def prepare(self) -> None:
        """Have ready what the first grammar would wait for: the worker, and the library in this process. Returns at
        once. Where it cannot be had, that is for whoever brings a grammar to hear."""
        self._thread = self._thread or ThreadPoolExecutor(1, "grammar")
        self._thread.submit(self._ready)

    def matcher(self, grammar: Grammar, stop_ids: Sequence[int], output: Sequence[int] = ()) -> xgrammar.GrammarMatcher:
        """A matcher that has accepted `output`. Waits for a grammar that has fallen out of the cache.

        Raises RuntimeError for an output that the grammar does not take.
        """
        compiled = self.request(grammar).result()
        matcher = grammar_worker.new_matcher(compiled.grammar, compiled.bounds, self._lengths, stop_ids)
        for token_id in output:
            if not matcher.accept_token(token_id):
                raise RuntimeError(f"token {token_id} does not follow its grammar")
        return cast("xgrammar.GrammarMatcher", matcher)

    def forced(self, matcher: xgrammar.GrammarMatcher, tail: Sequence[int]) -> list[int]:
        """See Retokenizer. For a matcher of this compiler."""
        return self._retokenizer.forced(matcher, tail) if self._retokenizer is not None else []

    def close(self) -> None:
        """End the worker."""
        self._closed.set()
        if self._worker is not None:
            self._worker.kill()
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def _compile(self, grammar: Grammar) -> Compiled:
        """On the thread."""
        try:
            frame = self._ready().compile(grammar)
        except _WorkerGone as gone:
            frame = CompiledFrame(error=str(gone))
        if frame.error:
            raise InvalidRequestError(f"{grammar.kind} {grammar.source!r:.80} cannot be used: {frame.error}")
        import xgrammar

        info = self._vocabulary_info()
        if frame.bounds and self._lengths is None:
            self._lengths = TokenLengths(info.decoded_vocab)
        return Compiled(xgrammar.CompiledGrammar.deserialize_json(frame.compiled, info), frame.bounds)

    def _ready(self) -> _Worker:
        """On the thread: a worker that has started. What this process needs is made meanwhile."""
        if self._worker is not None and self._worker.alive:
            return self._worker
        worker = _Worker(*self._vocabulary, self._closed)
        try:
            self._vocabulary_info()
            worker.wait_ready()
        except BaseException:
            worker.kill()
            raise
        self._worker = worker
        return worker

    def _vocabulary_info(self) -> xgrammar.TokenizerInfo:
        """On the thread: the library's view of the vocabulary, made once; importing the library takes a second."""
        if self._info is None:
            info = grammar_worker.load_tokenizer_info(*self._vocabulary)
            if self.jumps:
                self._retokenizer = Retokenizer(self._vocabulary[0], info)
            self._info = info
        return self._info


def _is_worth_another_try(future: Future[Compiled]) -> bool:
    """Whether it failed for a reason that does not lie in the grammar."""
    error = future.exception() if future.done() and not future.cancelled() else None
    return error is not None and not isinstance(error, InvalidRequestError)


class _WorkerGone(Exception):
    """The worker was killed: says what the grammar did."""


class _Worker:
    """One worker process."""

    def __init__(self, path: str, vocab_size: int, eos_token_ids: tuple[int, ...], closed: threading.Event) -> None:
        """Start it."""
        command = [sys.executable, "-m", grammar_worker.__name__, path, str(vocab_size)]
        self._process = subprocess.Popen(
            [*command, ",".join(map(str, eos_token_ids))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C in a terminal is for the parent to handle
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in: IO[bytes] = self._process.stdin
        self._out: IO[bytes] = self._process.stdout
        self._closed = closed

    @property
    def alive(self) -> bool:
        """Whether it runs: the machine may have ended it, for its memory."""
        return self._process.poll() is None

    def wait_ready(self) -> None:
        """Raises InvalidRequestError for a model that takes no grammars, SuperinferError where it does not start."""
        ready = self._wait(START_S)
        if ready is None:
            raise SuperinferError("the process that compiles grammars did not start; see the engine's log")
        if ready != grammar_worker.READY:
            raise InvalidRequestError(ready.decode())

    def compile(self, grammar: Grammar) -> CompiledFrame:
        """Raises _WorkerGone for a grammar that is too much for it, SuperinferError where it is not its fault."""
        try:
            write_frame(self._in, msgspec.msgpack.encode(grammar))
        except OSError:
            self.kill()
            raise SuperinferError("the process that compiles grammars had ended; try again") from None
        frame = self._wait(grammar_worker.COMPILE_S)
        if frame is not None:
            return msgspec.msgpack.decode(frame, type=CompiledFrame)
        ended = self._process.poll() is not None
        self.kill()
        if ended:
            raise _WorkerGone("compiling it needs more memory than is allowed; make it smaller")
        raise _WorkerGone(f"compiling it takes more than {grammar_worker.COMPILE_S:.0f} s; simplify it")

    def _wait(self, timeout: float) -> bytes | None:
        """The next frame; None when it does not come in time, or not at all."""
        waited = 0.0
        while waited < timeout and not self._closed.is_set():
            if select.select([self._out], [], [], 0.25)[0]:
                return read_frame(self._out)
            waited += 0.25
        return None

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()
        self._in.close()
        self._out.close()
