"""How `select` decides among its choices, given the log probability of each choice's tokens.

A method is called with keyword arguments only. `input_token_logprobs[i]` and `unconditional_token_logprobs[i]` hold
one (log probability, token id, text) for each token of choice i; the first unconditional one is None (nothing stands
before it).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from superinfer.runtime.choices import TokenScore


@dataclass(frozen=True)
class ChoicesDecision:
    """The choice made, and what is worth knowing of how."""

    decision: str
    meta_info: dict[str, Any] = field(default_factory=dict)


class ChoicesSamplingMethod(ABC):
    """Base of the choice methods; subclass it for one of your own."""

    @property
    def requires_unconditional_logprobs(self) -> bool:
        """Whether each choice is to be scored without the prompt too."""
        return False

    @abstractmethod
    def __call__(
        self,
        *,
        choices: Sequence[str],
        normalized_prompt_logprobs: Sequence[float],
        input_token_logprobs: Sequence[Sequence[TokenScore]],
        output_token_logprobs: Sequence[Sequence[TokenScore]],
        unconditional_token_logprobs: Sequence[Sequence[TokenScore]] | None = None,
    ) -> ChoicesDecision:
        """Decide. Ties go to the choice named first."""


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _values(scores: Sequence[TokenScore]) -> list[float]:
    return [score[0] or 0.0 for score in scores]


def _best(choices: Sequence[str], values: Sequence[float]) -> str:
    return choices[max(range(len(values)), key=values.__getitem__)]


class TokenLengthNormalized(ChoicesSamplingMethod):
    """The highest mean log probability per token."""

    def __call__(
        self,
        *,
        choices: Sequence[str],
        normalized_prompt_logprobs: Sequence[float],
        input_token_logprobs: Sequence[Sequence[TokenScore]],
        output_token_logprobs: Sequence[Sequence[TokenScore]],
        unconditional_token_logprobs: Sequence[Sequence[TokenScore]] | None = None,
    ) -> ChoicesDecision:
        return ChoicesDecision(_best(choices, normalized_prompt_logprobs))


class GreedyTokenSelection(ChoicesSamplingMethod):
    """Token by token, only the likeliest stay; a choice that has ended goes on with its mean."""

    def __call__(
        self,
        *,
        choices: Sequence[str],
        normalized_prompt_logprobs: Sequence[float],
        input_token_logprobs: Sequence[Sequence[TokenScore]],
        output_token_logprobs: Sequence[Sequence[TokenScore]],
        unconditional_token_logprobs: Sequence[Sequence[TokenScore]] | None = None,
    ) -> ChoicesDecision:
        scored = [_values(scores) for scores in input_token_logprobs]
        longest = max(len(values) for values in scored)
        matrix = [values + [mean(values)] * (longest - len(values)) for values in scored]
        remaining = list(range(len(choices)))
        for column in range(longest):
            best = max(matrix[i][column] for i in remaining)
            remaining = [i for i in remaining if matrix[i][column] == best]
        return ChoicesDecision(choices[remaining[0]], {"greedy_logprob_matrix": matrix})


class UnconditionalLikelihoodNormalized(ChoicesSamplingMethod):
    """The highest mean gain in log probability that the prompt brings over the choice standing alone."""

    @property
    def requires_unconditional_logprobs(self) -> bool:
        return True

    def __call__(
        self,
        *,
        choices: Sequence[str],
        normalized_prompt_logprobs: Sequence[float],
        input_token_logprobs: Sequence[Sequence[TokenScore]],
        output_token_logprobs: Sequence[Sequence[TokenScore]],
        unconditional_token_logprobs: Sequence[Sequence[TokenScore]] | None = None,
    ) -> ChoicesDecision:
        if unconditional_token_logprobs is None:
            raise ValueError("unconditional_likelihood_normalized needs unconditional_token_logprobs")
        gains = [
            mean([given - alone for given, alone in zip(_values(with_prompt), _values(without), strict=True)])
            for with_prompt, without in zip(input_token_logprobs, unconditional_token_logprobs, strict=True)
        ]
        return ChoicesDecision(_best(choices, gains), {"normalized_unconditional_prompt_logprobs": gains})


token_length_normalized = TokenLengthNormalized()
greedy_token_selection = GreedyTokenSelection()
unconditional_likelihood_normalized = UnconditionalLikelihoodNormalized()
