"""How likely each of some choices is behind a prompt: what `select` decides by, in a program and in the HTTP server."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from superinfer.errors import InvalidRequestError
from superinfer.runtime.protocol import Hints, RequestReport, TokenLogprob
from superinfer.runtime.slo import SLO

if TYPE_CHECKING:
    from superinfer.runtime.text import TextClient

TokenScore = tuple[float | None, int, str | None]


@dataclass(frozen=True)
class Scorer:
    """An engine and its model's tokenizer. slo_class, cache_salt: of all that is scored."""

    text: TextClient
    slo_class: str = ""
    cache_salt: str = ""

    def piece(self, token_id: int) -> str:
        """Text of one token, special or not."""
        return self.text.tokenizer.piece(token_id)

    async def score(
        self, prompt: Sequence[int], start: int, *, slo: SLO | None, program: str, hints: Hints
    ) -> tuple[list[TokenLogprob], RequestReport]:
        """Log probability of each of `prompt[start:]` given all before it; `start` >= 1."""
        return await self.text.score(
            prompt,
            start,
            slo=slo,
            slo_class=self.slo_class,
            cache_salt=self.cache_salt,
            program=program,
            hints=hints,
        )


@dataclass
class ScoredChoices:
    """(log probability, token id, text) of each choice's tokens, from the border that all share on. Tokens with which
    several choices begin have the same in each.

    alone: the same without the prompt, where that was asked for; the first of each has no probability.
    reports: of all that was scored.
    """

    with_prompt: list[list[TokenScore]] = field(default_factory=list)
    alone: list[list[TokenScore]] | None = None
    reports: list[RequestReport] = field(default_factory=list)


class Bordered(NamedTuple):
    """Token ids of the prompt with each choice, and the position from which they are compared."""

    tokens: list[list[int]]
    start: int


async def score_choices(
    scorer: Scorer,
    choices: Bordered,
    *,
    alone: bool,
    slo: SLO | None = None,
    program: str = "",
    keep_s: float | None = None,
) -> ScoredChoices:
    """Score all choices at once: the prompt is computed once for all. keep_s: see Hints. Raises what `score` raises."""
    tokens, start = choices
    asks = [(ids, start) for ids in tokens]
    if alone:
        asks += [(ids[start:], 1) for ids in tokens if len(ids) - start > 1]
    # They share the prompt: whoever comes first computes it for all.
    hints = Hints(group=uuid.uuid4().hex, keep_s=keep_s)
    tasks = [asyncio.ensure_future(scorer.score(ids, at, slo=slo, program=program, hints=hints)) for ids, at in asks]
    try:
        answers = await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:  # one that failed makes the others useless
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
    piece = scorer.piece
    scored = ScoredChoices(_agreed([_scores(items, piece) for items, _ in answers[: len(tokens)]]))
    scored.reports = [report for _, report in answers]
    if alone:
        rest = iter(answers[len(tokens) :])
        scored.alone = []
        for ids in tokens:
            first: list[TokenScore] = [(None, ids[start], piece(ids[start]))]
            scored.alone.append(first + (_scores(next(rest)[0], piece) if len(ids) - start > 1 else []))
        scored.alone = _agreed(scored.alone)
    return scored


class _Shared:
    """What all choices that begin with the same tokens have in common."""

    __slots__ = ("further", "score")

    def __init__(self, score: TokenScore | None = None) -> None:
        self.score = score
        self.further: dict[int, _Shared] = {}


def _agreed(scored: list[list[TokenScore]]) -> list[list[TokenScore]]:
    """The same, with one number for each token that several choices begin with: an engine that scores them side by side
    rounds differently for each, which must not decide between them."""
    root, agreed = _Shared(), []
    for scores in scored:
        at, own = root, []
        for score in scores:
            at = at.further.setdefault(score[1], _Shared(score))
            assert at.score is not None
            own.append(at.score)
        agreed.append(own)
    return agreed


def _scores(items: Sequence[TokenLogprob], piece: Callable[[int], str]) -> list[TokenScore]:
    return [(item.logprob, item.token_id, piece(item.token_id)) for item in items]


def at_border(scorer: Scorer, text: str, choices: Sequence[str], *, special: bool) -> Bordered:
    """The choices behind the prompt `text`. special: see Tokenizer.encode.

    A tokenizer may merge the end of the prompt with the beginning of a choice. All choices are scored from the last
    token border that they share with the prompt alone, so that the same text is weighed in each.
    Raises InvalidRequestError where no token stands before them.
    """
    prompt, tokens = scorer.text.tokenizer.encode_each(text, choices, special=special)
    start = min(_common(prompt, ids) for ids in tokens)
    start = min(start, *(len(ids) - 1 for ids in tokens))  # a choice that ends inside a merged token is one token
    if start < 1:
        raise InvalidRequestError("select() stands at the very beginning; give the model some text to choose by")
    return Bordered(tokens, start)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
