"""Batched sampling by slot: what one request asks for reaches its row, and no other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from superinfer.errors import InvalidRequestError
from superinfer.runtime.engine.sampling_state import SamplingState
from superinfer.runtime.protocol import Grammar, SamplingParams
from superinfer.runtime.scheduler.plan import SlotInit

VOCAB = 40


def state_of(*inits: SlotInit, slots: int = 8) -> SamplingState:
    state = SamplingState(slots, VOCAB, torch.device("cpu"))
    for init in inits:
        state.start(init)
    return state


def init(slot: int, seed: int = 0, prompt=(1,), output=(), stop_ids=(), **params) -> SlotInit:
    return SlotInit(slot, SamplingParams(**params), seed, prompt, output, stop_ids)


def tokens(state: SamplingState, logits: torch.Tensor, *slots: int) -> list[int]:
    return state.sample(logits, np.array(slots)).tokens.tolist()


def test_temperature_zero_is_argmax_with_ties_to_the_lowest_id():
    logits = torch.zeros(3, VOCAB)
    logits[0, [7, 3, 30]] = 2.0
    logits[1, 39] = 1.0
    state = state_of(init(0, temperature=0.0), init(1, temperature=0.0), init(2, temperature=0.0))
    assert tokens(state, logits, 0, 1, 2) == [3, 39, 0]


def test_top_k_of_one_is_greedy():
    logits = torch.zeros(1, VOCAB)
    logits[0, [9, 4]] = 2.0
    assert all(tokens(state_of(init(0, seed, top_k=1)), logits, 0) == [4] for seed in range(20))


def test_a_row_depends_on_its_own_request_alone():
    """Requests of every kind, alone and together, on other slots and in another order."""
    torch.manual_seed(1)
    logits = torch.randn(13, VOCAB) * 2
    kinds = [
        dict(temperature=0.0),
        dict(),
        dict(top_k=3),
        dict(top_p=0.7),
        dict(min_p=0.2),
        dict(temperature=1.7, top_k=20, top_p=0.9),
        dict(repetition_penalty=1.8, prompt=(1, 2, 3)),
        dict(frequency_penalty=0.5, presence_penalty=-0.3, output=(4, 4)),
        dict(min_tokens=3, stop_ids=(5, 6)),
        dict(temperature=0.3, seed=-1),
        dict(allowed_token_ids=(3, 4, 11, 12)),
        dict(bad_words=((3,), (4, 11), (12, 3, 4)), top_k=20),
        dict(bad_words=((5,),), temperature=0.0),
    ]
    requests = [lambda slot, i=i, kind=kind: init(slot, **{"seed": i, **kind}) for i, kind in enumerate(kinds)]
    alone = []
    for i, request in enumerate(requests):
        state = state_of(request(0), slots=1)
        alone.append([tokens(state, logits[[i]], 0)[0] for _ in range(12)])
    order = [3, 7, 1, 9, 12, 0, 2, 8, 5, 10, 4, 6, 11]
    state = state_of(*(request(order[i]) for i, request in enumerate(requests)), slots=13)
    rows = [6, 12, 2, 9, 0, 5, 1, 10, 8, 3, 7, 4, 11]
    together = [tokens(state, logits[rows], *(order[i] for i in rows)) for _ in range(12)]
    assert {i: list(column) for i, column in zip(rows, zip(*together, strict=True), strict=True)} == dict(
        enumerate(alone)
    )
    assert len(set(alone[1])) > 3  # an unfiltered row does draw different tokens step by step


def test_only_allowed_tokens_are_chosen():
    logits = torch.arange(VOCAB, dtype=torch.float32)[None].repeat(2, 1)
    state = state_of(init(0, temperature=0.0, allowed_token_ids=(3, 7, 3)), init(1, temperature=0.0))
    assert tokens(state, logits, 0, 1) == [7, VOCAB - 1]
    drawn = state_of(init(0, temperature=50.0, allowed_token_ids=(3, 7)))
    assert {tokens(drawn, logits[:1], 0)[0] for _ in range(40)} == {3, 7}


def test_the_last_token_of_a_bad_word_is_barred_behind_its_others():
    logits = torch.zeros(1, VOCAB)
    logits[0, 5:9] = torch.tensor([1.0, 2.0, 3.0, 4.0])  # 8, 7, 6, 5 in the order of their worth
    state = state_of(init(0, temperature=0.0, bad_words=((8, 8, 8), (8, 7), (6, 8, 8), (5,))))
    told = [tokens(state, logits, 0)[0] for _ in range(8)]
    #  8 8, then neither 8 nor 7; then 8, for 6 8 is no word; then neither 8 (6 8 8) nor 7 (8 7)
    assert told == [8, 8, 6, 8, 6, 8, 6, 8]
    for count in range(1, 8):  # who was preempted goes on the same
        again = state_of(
            init(0, temperature=0.0, output=tuple(told[:count]), bad_words=((8, 8, 8), (8, 7), (6, 8, 8), (5,)))
        )
        assert [tokens(again, logits, 0)[0] for _ in range(8 - count)] == told[count:]


def test_bad_words_of_one_slot_leave_the_others_as_they_are():
    logits = torch.zeros(3, VOCAB)
    logits[:, 0] = 9.0  # the token that stands for none in what is padded
    logits[:, 4] = 5.0
    state = state_of(init(0, temperature=0.0, bad_words=((4, 0),)), init(1, temperature=0.0))
    state.start(init(2, temperature=0.0, bad_words=((0,), (4, 4), (1, 2, 3, 4, 5))))
    assert tokens(state, logits, 0, 1, 2) == [0, 0, 4]
    assert tokens(state, logits, 2, 1, 0) == [1, 0, 0]
    state.release(2)
    state.start(init(2, temperature=0.0))
    assert tokens(state, logits, 0, 1, 2) == [0, 0, 0]


def test_limits_leave_logprobs_as_the_model_has_them():
    logits = torch.zeros(1, VOCAB)
    logits[0, 8] = 5.0
    plain = state_of(init(0, temperature=0.0, logprobs=2)).sample(logits, np.array([0]))
    for limit in (dict(allowed_token_ids=(3,)), dict(bad_words=((8,),))):
        found = state_of(init(0, temperature=0.0, logprobs=2, **limit)).sample(logits, np.array([0]))
        assert found.tokens.tolist() == [3 if "allowed_token_ids" in limit else 0]
        assert torch.equal(found.logprobs[1], plain.logprobs[1]) and torch.equal(found.logprobs[2], plain.logprobs[2])


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (dict(allowed_token_ids=()), "allowed_token_ids holds 0 ids; give 1 to 16384"),
        (dict(allowed_token_ids=tuple(range(20_000))), "allowed_token_ids holds 20000 ids"),
        (dict(allowed_token_ids=(-1,)), "allowed_token_ids: token id=-1"),
        (dict(bad_words=((1,),) * 513), "bad_words holds 513 sequences"),
        (dict(bad_words=((),)), "bad_words has one of 0 tokens"),
        (dict(bad_words=((1,) * 33,)), "bad_words has one of 33 tokens"),
        (dict(bad_words=((-3,),)), "bad_words: token id=-3"),
        (dict(bad_words=((3,),), allowed_token_ids=(3,)), "bad_words beside allowed_token_ids could leave no token"),
        (dict(bad_words=((3,),), grammar=Grammar(kind="json_object")), "bad_words contradicts a grammar"),
        (dict(allowed_token_ids=(3,), grammar=Grammar(kind="json_object")), "allowed_token_ids contradicts a grammar"),
    ],
)
def test_limits_that_cannot_hold_are_refused(params, said):
    with pytest.raises(InvalidRequestError, match=said):
        SamplingParams(**params)


def test_draws_over_many_seeds_follow_the_tempered_and_filtered_distribution():
    torch.manual_seed(2)
    row = torch.randn(VOCAB) * 2
    n = 20_000
    state = state_of(*(init(s, seed=s, temperature=1.4, top_k=12, top_p=0.9) for s in range(n)), slots=n)
    drawn = np.bincount(tokens(state, row.expand(n, -1), *range(n)), minlength=VOCAB)
    p = (row.double() / 1.4).softmax(0).numpy()
    ranked = np.argsort(-p)[:12]
    within = p[ranked] / p[ranked].sum()
    kept = ranked[: int((np.cumsum(within) - within < 0.9).sum())]
    expected = n * p[kept] / p[kept].sum()
    assert drawn[kept].sum() == n and 3 < len(kept) < 12
    chi_square = ((drawn[kept] - expected) ** 2 / expected).sum()
    assert chi_square < len(kept) - 1 + 5 * np.sqrt(2 * (len(kept) - 1))


def test_stop_ids_are_barred_until_min_tokens_are_out():
    logits = torch.zeros(3, VOCAB)
    logits[:, 5], logits[:, 6], logits[:, 7] = 9.0, 8.0, 7.0
    logits[1, 0] = 8.5  # not a stop id of the shorter list
    greedy = dict(temperature=0.0)
    state = state_of(
        init(0, stop_ids=(5, 6), min_tokens=2, **greedy),
        init(1, stop_ids=(5,), min_tokens=1, **greedy),
        init(2, stop_ids=(5, 6, 7), **greedy),
    )
    assert [tokens(state, logits, 0, 1, 2) for _ in range(3)] == [[7, 0, 5], [7, 5, 5], [5, 5, 5]]


def test_tokens_before_a_preemption_count_towards_min_tokens():
    logits = torch.zeros(1, VOCAB)
    logits[0, 5] = 9.0
    state = state_of(init(0, temperature=0.0, stop_ids=(5,), min_tokens=3, output=(1, 1)))
    assert [tokens(state, logits, 0) for _ in range(2)] == [[0], [5]]


def test_a_slot_forgets_its_last_request():
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 6] = 9.0, 8.9
    state = state_of(init(0, temperature=0.0, prompt=(5,), repetition_penalty=2.0, stop_ids=(6,), min_tokens=9))
    assert tokens(state, logits, 0) == [5]
    state.release(0)
    state.start(init(0, temperature=0.0, prompt=(4,), repetition_penalty=2.0))
    assert tokens(state, logits, 0) == [5]
    assert tokens(state, logits, 0) == [6]  # 5 was generated: halved


def test_penalties_see_the_tokens_as_they_are_generated():
    logits = torch.zeros(2, VOCAB)
    logits[:, 10], logits[:, 11], logits[:, 12] = 3.0, 2.5, 2.0
    state = state_of(init(0, temperature=0.0, frequency_penalty=0.4), init(1, temperature=0.0, presence_penalty=0.9))
    steps = [tokens(state, logits, 0, 1) for _ in range(5)]
    assert [a for a, _ in steps] == [10, 10, 11, 10, 11]
    assert [b for _, b in steps] == [10, 11, 10, 10, 10]


def test_counts_take_memory_only_while_a_live_slot_needs_them():
    state = state_of(init(0), init(1, temperature=0.0))
    assert state._output_counts is None
    state.start(init(2, presence_penalty=1.0))
    assert state._output_counts is not None
    state.release(0)
    assert state._output_counts is not None
    state.release(2)
    assert state._output_counts is None and state._prompt_seen is None


def test_sampling_leaves_the_models_logits_as_they_are():
    logits = torch.randn(2, VOCAB)
    before = logits.clone()
    state = state_of(init(0, repetition_penalty=2.0, logprobs=2), init(1, min_tokens=2, stop_ids=(3,)))
    state.sample(logits, np.array([0, 1]))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("seed", [2**64 - 1, -1, 2**63, -(2**63), 0])
def test_every_64_bit_seed_is_accepted(seed):
    logits = torch.zeros(1, VOCAB)
    found = [tokens(state_of(init(0, seed)), logits, 0) for _ in range(2)]
    assert found[0] == found[1]
    assert tokens(state_of(init(0, 2**64 - 1)), logits, 0) == tokens(state_of(init(0, -1)), logits, 0)


def test_stop_ids_outside_the_vocabulary_are_ignored():
    logits = torch.zeros(1, VOCAB)
    logits[0, 5] = 1.0
    state = state_of(init(0, temperature=0.0, stop_ids=(VOCAB, 10**6), min_tokens=5))
    assert tokens(state, logits, 0) == [5]
