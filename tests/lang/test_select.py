"""select: the three methods against scores worked out by hand, and the border between prompt and choice."""

from __future__ import annotations

import pytest
from scripted_client import MERGED, ScriptedClient

import superinfer as si

# Log probabilities of single-character tokens after the prompt "p:".
TABLE = {"a": -1.0, "b": -2.0, "c": -0.5, "d": -3.0, "e": -0.2}


def pick(choices: list[str], method: object = None, prompt: str = "p:") -> si.ProgramState:
    @si.function
    def program(s):
        s += prompt
        s += si.select("x", choices, **({"choices_method": method} if method else {}))

    return program.run()


def test_the_default_takes_the_best_mean_per_token(model: ScriptedClient) -> None:
    model.logprob = lambda before, token: TABLE[token]
    state = pick(["ab", "d", "cbe"])
    # ab: (-1 - 2) / 2 = -1.5; d: -3; cbe: (-0.5 - 2 - 0.2) / 3 = -0.9
    assert state["x"] == "cbe"
    assert state.text() == "p:cbe"
    meta = state.get_meta_info("x")
    assert meta["normalized_prompt_logprobs"] == pytest.approx([-1.5, -3.0, -0.9])
    assert meta["input_token_logprobs"][1] == [(-3.0, ord("d"), "d")]
    assert meta["finish_reason"] == "scored"


def test_greedy_selection_goes_token_by_token(model: ScriptedClient) -> None:
    model.logprob = lambda before, token: TABLE[token]
    # First tokens: a -1, c -0.5, c -0.5: "ae" is out although its mean, -0.6, is the best. Then b -2 against d -3.
    state = pick(["ae", "cb", "cd"], si.greedy_token_selection)
    assert state["x"] == "cb"
    # "c" alone goes on with its own mean -0.5, better than "cb" at the second token.
    assert pick(["cb", "c"], si.greedy_token_selection)["x"] == "c"


def test_rounding_of_what_choices_share_does_not_decide_between_them(model: ScriptedClient) -> None:
    rounded = iter([0.0, -1e-7, -2e-7])
    model.logprob = lambda before, token: TABLE[token] + (next(rounded) if token == "c" else 0.0)
    assert pick(["cd", "cb", "ca"], si.greedy_token_selection)["x"] == "ca"
    rounded = iter([0.0, -1e-7, -2e-7])
    meta = pick(["cd", "cb", "ca"]).get_meta_info("x")
    assert {scores[0] for scores in meta["input_token_logprobs"]} == {(-0.5, ord("c"), "c")}


def test_unconditional_likelihood_is_subtracted(model: ScriptedClient) -> None:
    def logprob(before: str, token: str) -> float:
        with_prompt = before.startswith("p:")
        return {("b", True): -1.0, ("b", False): -4.0, ("d", True): -0.5, ("d", False): -0.6}.get(
            (token, with_prompt), -1.0
        )

    model.logprob = logprob
    # ab: ((-1 - 0) + (-1 + 4)) / 2 = 1.0; ad: ((-1 - 0) + (-0.5 + 0.6)) / 2 = -0.45
    state = pick(["ad", "ab"], si.unconditional_likelihood_normalized)
    assert state["x"] == "ab"
    meta = state.get_meta_info("x")
    assert meta["normalized_unconditional_prompt_logprobs"] == pytest.approx([-0.45, 1.0])
    assert [score[0] for score in meta["unconditional_token_logprobs"][1]] == [None, -4.0]
    assert pick(["ad", "ab"])["x"] == "ad"


def test_all_choices_are_scored_at_once_after_the_shared_prompt(model: ScriptedClient) -> None:
    model.token_s = 0.02
    pick(["a", "b", "c", "d"])
    assert model.most_open == 4
    assert len(model.groups) == 1 and "" not in model.groups  # the scheduler is told that they belong together
    assert {(tuple(ids[:start]), start) for ids, start, _ in model.scored} == {((1, ord("p"), ord(":")), 3)}


def test_a_token_across_the_border_makes_all_choices_start_before_it(model: ScriptedClient) -> None:
    model.tokenizer.merges = [":a"]
    model.logprob = lambda before, token: {":a": -0.1, ":": -0.4, "b": -1.0}[token]
    state = pick(["a", "b"])
    assert [(ids[start:], start) for ids, start, _ in model.scored] == [([MERGED], 2), ([ord(":"), ord("b")], 2)]
    assert state["x"] == "a"
    assert state.get_meta_info("x")["normalized_prompt_logprobs"] == pytest.approx([-0.1, -0.7])


def test_gen_with_choices_is_select(model: ScriptedClient) -> None:
    model.logprob = lambda before, token: -1.0 if token in "True" else -2.0

    @si.function
    def program(s):
        s += "p:" + si.gen("x", choices=["Fa", "Tr"], temperature=0)

    state = program.run()
    assert (state["x"], state.text()) == ("Tr", "p:Tr")
    assert not model.requests


def test_a_tie_goes_to_the_first_choice(model: ScriptedClient) -> None:
    assert pick(["b", "a"])["x"] == "b"


def test_a_method_of_ones_own_decides(model: ScriptedClient) -> None:
    from superinfer.lang.choices import ChoicesDecision, ChoicesSamplingMethod

    class Last(ChoicesSamplingMethod):
        def __call__(self, *, choices, **scores) -> ChoicesDecision:
            return ChoicesDecision(choices[-1], {"mine": len(scores["input_token_logprobs"])})

    state = pick(["a", "b"], Last())
    assert (state["x"], state.get_meta_info("x")["mine"]) == ("b", 2)


def test_one_failed_score_fails_the_select(model: ScriptedClient) -> None:
    def logprob(before: str, token: str) -> float:
        if token == "b":
            raise si.QueueFullError("full")
        return -1.0

    model.logprob = logprob
    with pytest.warns(RuntimeWarning, match="full"):
        state = pick(["a", "b"])
    with pytest.raises(si.QueueFullError):
        state["x"]
