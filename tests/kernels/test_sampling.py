"""The sampler's parts against plain numpy and integer arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from superinfer.kernels import sampling

MASK = (1 << 64) - 1


def splitmix(state: int) -> int:
    """splitmix64's output function, in unbounded integers."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def test_splitmix_gives_the_published_sequence():
    """First outputs for seed 1234567, from the reference implementation (prng.di.unimi.it/splitmix64.c)."""
    states = [(1234567 + (i + 1) * 0x9E3779B97F4A7C15) & MASK for i in range(5)]
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [splitmix(s) for s in states] == published
    assert sampling._mix(np.array(states, dtype=np.uint64)).tolist() == published


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31))
def test_uniforms_are_the_hash_of_seed_and_counter(seed, counter):
    golden = 0x9E3779B97F4A7C15
    expected = splitmix((splitmix((seed + golden) & MASK) + (counter + 1) * golden) & MASK) >> 11
    found = sampling.uniform(np.array([seed], dtype=np.uint64), np.array([counter], dtype=np.uint64))
    assert found.item() == expected / 2**53


@pytest.mark.parametrize("along", ["seeds", "counters"])
def test_uniforms_are_uniform_and_uncorrelated(along):
    n, varying = 200_000, np.arange(200_000, dtype=np.uint64)
    fixed = np.full_like(varying, 7)
    u = sampling.uniform(varying, fixed) if along == "seeds" else sampling.uniform(fixed, varying)
    assert u.min() >= 0 and u.max() < 1
    counts = np.histogram(u, bins=100, range=(0, 1))[0]
    chi_square = ((counts - n / 100) ** 2 / (n / 100)).sum()
    assert 54 < chi_square < 162  # 99 degrees of freedom: 1e-4 on either side
    pairs = np.histogram2d(u[:-1], u[1:], bins=10, range=((0, 1), (0, 1)))[0]
    assert ((pairs - n / 100) ** 2 / (n / 100)).sum() < 162
    low_bits = (u * 2**53).astype(np.int64) & 0xFF
    assert abs(np.bincount(low_bits, minlength=256).std() - np.sqrt(n / 256)) < 6


# ---------------------------------------------------------------------------------------------- filters


def reference_filter(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """bool [vocab]: the tokens kept, one filter after the other, in float64. Ties at a boundary are kept."""
    kept = np.ones(len(logits), dtype=bool)
    order = np.argsort(-logits, kind="stable")
    if 0 < top_k < len(logits):
        kept &= logits >= logits[order[top_k - 1]]
    if top_p < 1:
        ranked = order[: top_k or None]
        p = np.exp(logits[ranked] - logits.max())
        p /= p.sum()
        before = np.cumsum(p) - p
        kept &= logits >= logits[ranked[np.flatnonzero(before < top_p)[-1]]]
    p = np.exp(logits - logits.max())
    return kept & (p >= min_p)


def kept_tokens(logits: np.ndarray, top_k, top_p, min_p) -> np.ndarray:
    scaled = sampling.temper(torch.from_numpy(logits), torch.ones(len(logits)))
    threshold = sampling.filter_threshold(
        scaled,
        scaled.exp().double(),
        torch.tensor(top_k),
        torch.tensor(top_p, dtype=torch.float64),
        torch.tensor(min_p, dtype=torch.float64),
    )
    return (scaled >= threshold[:, None]).numpy()


# Multiples of 1/4 have exact differences and plenty of ties; the odd offsets keep masses off the top_p boundaries.
grid = hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 400)), elements=st.integers(-40, 40)).map(
    lambda a: a / np.float32(4)
)


@settings(max_examples=150, deadline=None)
@given(grid, st.data())
def test_filters_keep_what_numpy_keeps_with_every_row_its_own_parameters(logits, data):
    rows = len(logits)
    top_k = data.draw(st.lists(st.one_of(st.just(0), st.integers(1, 450)), min_size=rows, max_size=rows))
    top_p = data.draw(st.lists(st.one_of(st.just(1.0), st.floats(0.0123, 0.9987)), min_size=rows, max_size=rows))
    min_p = data.draw(st.lists(st.one_of(st.just(0.0), st.floats(0.0011, 0.9)), min_size=rows, max_size=rows))
    found = kept_tokens(logits, top_k, top_p, min_p)
    for row in range(rows):
        # Masses exactly at the boundary may fall either way by rounding: both neighbours are right answers.
        near = [
            reference_filter(logits[row].astype(float), top_k[row], p, m)
            for p in (top_p[row] * (1 - 1e-6), min(top_p[row] * (1 + 1e-6), 1.0 if top_p[row] == 1 else 0.99999))
            for m in (min_p[row] * (1 - 1e-6), min_p[row] * (1 + 1e-6))
        ]
        assert any((found[row] == expected).all() for expected in near)


def test_flat_rows_need_more_than_the_first_candidates():
    """Kept: half of 1000 almost equal tokens, far more than TOP_CANDIDATES; beside it a row that needs one."""
    flat = np.linspace(0, -1e-3, 1000, dtype=np.float32)
    peaked = np.linspace(0, -5000, 1000, dtype=np.float32)
    kept = kept_tokens(np.stack((flat, peaked)), [0, 0], [0.5, 0.5], [0.0, 0.0])
    assert abs(kept[0].sum() - 500) <= 1 and kept[0, 0] and not kept[0, -1]
    assert kept[1].sum() == 1


def test_small_temperatures_do_not_overflow():
    scaled = sampling.temper(torch.tensor([[88.0, 90.0, -90.0]]), torch.tensor([1e-5]))
    assert torch.isfinite(scaled.exp()).all() and scaled.exp()[0].tolist() == [0.0, 1.0, 0.0]


# ------------------------------------------------------------------------------------------------- draw


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(np.float64, st.integers(1, 50), elements=st.one_of(st.just(0.0), st.floats(1e-6, 1.0))),
    st.floats(0, 1, exclude_max=True),
)
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(weights, u):
    if not weights.any():
        weights[-1] = 1.0
    found = sampling.draw(torch.from_numpy(weights)[None], torch.tensor([u], dtype=torch.float64)).item()
    cumulative = np.cumsum(weights)
    assert weights[found] > 0
    assert cumulative[found] > u * cumulative[-1]
    assert found == 0 or cumulative[found - 1] <= u * cumulative[-1] or weights[:found].sum() == 0


def test_the_largest_uniform_never_draws_a_filtered_token():
    weights = torch.tensor([[0.1, 0.7, 0.2, 0.0, 0.0]] * 200, dtype=torch.float64) * torch.rand(200, 1).double()
    drawn = sampling.draw(weights, torch.full((200,), 1 - 2.0**-53, dtype=torch.float64))
    assert (drawn == 2).all()


def test_draws_follow_the_distribution():
    weights = torch.tensor([0.5, 0.0, 0.25, 0.15, 0.07, 0.03], dtype=torch.float64)
    n = 100_000
    seeds = np.arange(n, dtype=np.uint64)
    drawn = sampling.draw(weights.expand(n, -1), torch.from_numpy(sampling.uniform(seeds, np.zeros_like(seeds))))
    counts = np.bincount(drawn.numpy(), minlength=6)
    expected = weights.numpy() * n
    assert counts[1] == 0
    live = expected > 0
    assert ((counts - expected)[live] ** 2 / expected[live]).sum() < 23.5  # 4 degrees of freedom: 1e-4


# -------------------------------------------------------------------------------- penalties and logprobs


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_penalties_follow_their_definitions(seed):
    rng = np.random.default_rng(seed)
    rows, vocab = 3, 17
    logits = rng.normal(size=(rows, vocab)).astype(np.float32)
    prompt = rng.random((rows, vocab)) < 0.3
    counts = rng.integers(0, 4, (rows, vocab)) * (rng.random((rows, vocab)) < 0.4)
    repetition, frequency, presence = rng.uniform(0.5, 2, rows), rng.uniform(-2, 2, rows), rng.uniform(-2, 2, rows)
    found = sampling.penalize(
        torch.from_numpy(logits),
        torch.from_numpy(prompt),
        torch.from_numpy(counts).int(),
        *(torch.from_numpy(p).float() for p in (repetition, frequency, presence)),
    )
    for row in range(rows):
        for token in range(vocab):
            value = logits[row, token]
            if prompt[row, token] or counts[row, token]:
                value = value / repetition[row] if value > 0 else value * repetition[row]
            value -= frequency[row] * counts[row, token] + presence[row] * (counts[row, token] > 0)
            assert found[row, token].item() == pytest.approx(value, abs=1e-5)


def test_the_repetition_penalty_is_transformers_own():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, ids = torch.randn(2, 30), torch.tensor([[1, 5, 5, 9], [0, 2, 3, 29]])
    seen = torch.zeros(2, 30, dtype=torch.bool).scatter_(1, ids, True)
    none = torch.zeros(2)
    found = sampling.penalize(logits, seen, torch.zeros(2, 30, dtype=torch.int32), torch.full((2,), 1.7), none, none)
    assert torch.equal(found, RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone()))


def test_token_logprobs_are_a_log_softmax():
    logits, tokens = torch.randn(4, 50), torch.tensor([3, 0, 49, 7])
    chosen, ids, values = sampling.token_logprobs(logits, tokens, 5)
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(chosen, expected.gather(1, tokens[:, None]).squeeze(1))
    torch.testing.assert_close(values, expected.topk(5).values)
    assert torch.equal(ids, expected.topk(5).indices)
