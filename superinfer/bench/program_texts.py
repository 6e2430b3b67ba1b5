"""The programs that `superinfer bench programs` runs: how long their prompts and answers are, and their texts.

Texts are made-up words, each one token of `shapes.write_tokenizer`, so that prompts are as long as they are said to be.
Both arms build the same prompts of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import NamedTuple

from superinfer.bench.shapes import filler_words
from superinfer.errors import InvalidRequestError

Sizes = dict[str, int]

FORKS = 4  # tree of thought: of three levels
TURNS = 6  # ReAct
TOOL_S = 0.005  # what its tool takes
DOCUMENTS = 16  # map-reduce
FIELDS = 8  # JSON extraction
MESSAGES = 4  # multi-turn chat
QUESTIONS, OPTIONS = 6, 5  # select
PLAIN = ("json_extraction", "select")  # prompts without a chat template
STEP = 0.05  # of scales that are chosen
MARGIN = 0.02  # of the context: texts differ
SAMPLE = 2000  # words

# Tokens of each part. `shared` is the same in all programs of a shape, as instructions and examples are.
SIZES: dict[str, Sizes] = {
    "tree_of_thought": {"shared": 128, "question": 192, "ask": 12, "plan": 24, "solution": 32, "verdict": 16},
    "react": {"shared": 512, "question": 48, "observation": 64, "thought": 40, "answer": 32},
    "map_reduce": {"shared": 64, "document": 256, "ask": 12, "note": 32, "answer": 64},
    "json_extraction": {"shared": 64, "document": 384, "field": 10},
    "chat": {"shared": 128, "message": 96, "answer": 64},
    "select": {"shared": 64, "document": 256, "question": 12, "option": 4},
}
SHAPES = tuple(SIZES)


def scaled(sizes: Sizes, scale: float) -> Sizes:
    """All lengths times `scale`, none below 2."""
    return {name: max(2, round(tokens * scale)) for name, tokens in sizes.items()}


class Weights(NamedTuple):
    """Tokens, by a model's tokenizer: of one made-up word on average, of what a chat template puts around a message,
    and of a field's name."""

    word: float
    message: int
    field: int


def longest(shape: str, sizes: Sizes, weights: Weights) -> int:
    """Tokens of the shape's longest prompt with its answer, nearly."""
    s = sizes
    match shape:
        case "tree_of_thought":
            answers, parts = s["plan"] + s["solution"] + s["verdict"], 8 * weights.message
            calls = [(s["shared"] + s["question"] + 3 * s["ask"], answers, parts)]
        case "react":
            words = s["shared"] + s["question"] + TURNS * s["observation"]
            calls = [(words, TURNS * s["thought"] + s["answer"], (3 + 2 * TURNS) * weights.message)]
        case "map_reduce":
            joint = (s["shared"] + s["ask"], DOCUMENTS * s["note"] + s["answer"], 3 * weights.message)
            calls = [(s["shared"] + s["document"], s["note"], 3 * weights.message), joint]
        case "json_extraction":
            calls = [(s["shared"] + s["document"], FIELDS * s["field"], FIELDS * weights.field)]
        case "chat":
            words, parts = s["shared"] + MESSAGES * s["message"], (1 + 2 * MESSAGES) * weights.message
            calls = [(words, MESSAGES * s["answer"], parts)]
        case "select":
            calls = [(s["shared"] + s["document"] + s["question"] + s["option"], 0, 0)]
        case _:
            raise ValueError(f"shape={shape!r} must be one of {', '.join(SHAPES)}")
    return max(math.ceil(words * weights.word) + answers + parts for words, answers, parts in calls)


def scale_for(shapes: Sequence[str], context: int, weights: Weights) -> float:
    """The largest scale, 1 at most, in steps of STEP, at which every call fits into `context` tokens, with MARGIN of
    them to spare. Raises InvalidRequestError where none does."""
    for steps in range(round(1 / STEP), 0, -1):
        scale = round(steps * STEP, 2)
        most = max(longest(shape, scaled(SIZES[shape], scale), weights) for shape in shapes)
        if most <= context * (1 - MARGIN):
            return scale
    raise InvalidRequestError(
        f"the model's context of {context} tokens is too short for {', '.join(shapes)}: at --scale {STEP} the longest "
        f"call has some {most}; give other --shapes, a larger --max-model-len, or a --scale of your own"
    )


def sample() -> str:
    """SAMPLE made-up words, to weigh them."""
    return _text("sample", SAMPLE)


def output_tokens(shape: str, sizes: Sizes) -> int:
    """That one program generates. A select generates none: it scores."""
    match shape:
        case "tree_of_thought":
            return FORKS * sizes["plan"] + FORKS**2 * sizes["solution"] + FORKS**3 * sizes["verdict"]
        case "react":
            return TURNS * sizes["thought"] + sizes["answer"]
        case "map_reduce":
            return DOCUMENTS * sizes["note"] + sizes["answer"]
        case "json_extraction":
            return FIELDS * sizes["field"]
        case "chat":
            return MESSAGES * sizes["answer"]
        case "select":
            return 0
        case _:
            raise ValueError(f"shape={shape!r} must be one of {', '.join(SHAPES)}")


@dataclass
class Tokens:
    """What calls came to, by what the server says. A scored option counts as prompt."""

    calls: int = 0
    prompt: int = 0
    cached: int = 0
    output: int = 0

    def __iadd__(self, other: Tokens) -> Tokens:
        self.calls += other.calls
        self.prompt += other.prompt
        self.cached += other.cached
        self.output += other.output
        return self


@dataclass(frozen=True)
class Texts:
    """One program's texts. sizes: in tokens. seed: names the program; `shared` alone does not depend on it."""

    shape: str
    sizes: Sizes
    seed: str

    @property
    def shared(self) -> str:
        """What all programs of this shape begin with."""
        return _shared(self.shape, self.sizes["shared"])

    def part(self, size: str, key: object = "") -> str:
        """Text of `sizes[size]` tokens. key: tells several of one size apart."""
        return _text(f"{self.shape} {self.seed} {size} {key}", self.sizes[size])

    def options(self, question: int) -> list[str]:
        """What a question may be answered with; no two begin with the same word."""
        first = random.Random(f"{self.seed} {question}").sample(_words(), OPTIONS)
        rest = self.sizes["option"] - 1
        return [f" {word}{_text(f'{self.seed} {question} {word}', rest)}" for word in first]


def field(number: int) -> str:
    """What stands before an extracted field, and behind the one before it."""
    return ('{"' if number == 0 else '", "') + f'field {number}": "'


@cache
def _words() -> tuple[str, ...]:
    return tuple(word.removeprefix("Ġ") for word in islice(filler_words(), 20_000))


@cache
def _shared(shape: str, tokens: int) -> str:
    return _text(f"{shape} shared", tokens)


def _text(seed: str, tokens: int) -> str:
    """Each word with a space before it, as the tokenizer has it."""
    return "".join(f" {word}" for word in random.Random(seed).choices(_words(), k=tokens))
