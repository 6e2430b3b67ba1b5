"""Jobs follow the published statistics and the traces, and a seed fixes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from superinfer.errors import InvalidRequestError
from superinfer.runtime.sim.workload import MOONCAKE_BLOCK, PUBLISHED, Job, as_turns, make_jobs
from superinfer.runtime.slo import SLO

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:54.6805900,10,5
"""
MOONCAKE = """{"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [0, 1]}
{"timestamp": 2000, "input_length": 1500, "output_length": 7, "hash_ids": [0, 1, 2]}
{"timestamp": 4000, "input_length": 600, "output_length": 9, "hash_ids": [0, 3]}
"""


@pytest.fixture
def azure(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    return path


@pytest.fixture
def mooncake(tmp_path):
    path = tmp_path / "mooncake.jsonl"
    path.write_text(MOONCAKE)
    return path


@pytest.mark.parametrize("workload", sorted(PUBLISHED))
def test_lengths_have_the_published_mean_and_deviation(workload):
    jobs = make_jobs(workload, rate=400, duration=60, seed=0)
    given = PUBLISHED[workload]
    for lengths, mean, std in (
        ([job.prompt_length for job in jobs], given.prompt_mean, given.prompt_std),
        ([job.output_length for job in jobs], given.output_mean, given.output_std),
    ):
        assert np.mean(lengths) == pytest.approx(mean, rel=0.05)
        assert np.std(lengths) == pytest.approx(std, rel=0.2)  # heavy tails: the deviation itself scatters
        assert min(lengths) >= 1


def test_arrivals_are_poisson_at_the_rate_and_within_the_duration():
    times = [job.at for job in make_jobs("lmsys", rate=50, duration=100, seed=3)]
    gaps = np.diff(times)
    assert len(times) == pytest.approx(5000, rel=0.05)
    assert times[0] >= 0 and times[-1] < 100
    assert gaps.min() >= 0
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.05)


def test_the_same_seed_gives_the_same_jobs_and_another_gives_others():
    first, again, other = (make_jobs("sharegpt", rate=5, duration=20, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_azure_lengths_come_from_the_trace(azure):
    jobs = make_jobs("azure", rate=10, duration=10, seed=0, trace=azure)
    assert {(job.prompt_length, job.output_length) for job in jobs} == {(374, 44), (396, 109), (10, 5)}
    assert all(len(job.prompt()) == job.prompt_length for job in jobs)
    assert len({job.prompt()[0] for job in jobs}) == len(jobs)  # nothing is shared


def test_mooncake_prompts_share_exactly_the_blocks_whose_ids_are_equal(mooncake):
    jobs = make_jobs("mooncake", rate=10, duration=5, seed=0, trace=mooncake)
    by_length = {job.prompt_length: job.prompt() for job in jobs}
    assert by_length[1500][:1000] == by_length[1000]
    assert by_length[600][:MOONCAKE_BLOCK] == by_length[1000][:MOONCAKE_BLOCK]
    assert by_length[600][MOONCAKE_BLOCK] != by_length[1000][MOONCAKE_BLOCK]


def test_a_next_turn_has_the_prompt_and_the_answer_before_it_in_its_own():
    first, second, short, again = as_turns(
        [
            Job(0.0, 1100, 110, (1, 2, 3), 512),
            Job(1.0, 1800, 7, (1, 2, 4, 5), 512),
            Job(2.0, 1150, 7, (1, 2, 9), 512),  # too short to have that answer in it
            Job(3.0, 2700, 7, (1, 2, 4, 5, 6, 7), 512),
        ]
    )
    prompt = second.prompt()
    assert prompt == first.prompt() + [first.answer] * 110 + [4] * (1536 - 1210) + [5] * (1800 - 1536)
    assert short.prompt() == [1] * 512 + [2] * 512 + [9] * 126
    assert again.prompt()[:1800] == prompt
    answers = {job.answer for job in (first, second, short, again)}
    assert len(answers) == 4 and not answers & set(range(10))


def test_prompts_that_begin_alike_are_not_turns_unless_half_of_them_and_two_blocks_are_the_same():
    jobs = [
        Job(0.0, 600, 10, (1, 2), 512),
        Job(1.0, 1100, 10, (1, 3, 4), 512),  # one block
        Job(2.0, 2700, 10, (1, 3, 5, 6, 7, 8), 512),  # two of six
        Job(3.0, 2000, 10, (1, 3, 9, 10), 512),  # two of four
    ]
    turned = as_turns(jobs)
    assert [job.prompt() == turn.prompt() for job, turn in zip(jobs, turned, strict=True)] == [True, True, True, False]
    assert turned[3].prompt()[1024:1110] == [4] * 76 + [turned[1].answer] * 10


def test_what_a_block_holds_is_settled_by_the_first_prompt_that_has_it():
    jobs = [
        Job(0.0, 1100, 10, (1, 2, 3), 512),
        Job(1.0, 1600, 10, (1, 2, 4, 5), 512),
        Job(2.0, 1200, 10, (1, 2, 6), 512),  # behind the same blocks something else
        Job(3.0, 1600, 10, (1, 2, 4, 7), 512),
    ]
    _, second, _, last = as_turns(jobs)
    assert last.prompt()[:1536] == second.prompt()[:1536]


def test_turns_of_a_trace_share_as_much_as_its_ids_say_and_answers_beside(mooncake):
    arguments = {"rate": 10, "duration": 5, "seed": 0, "trace": mooncake}
    plain, turns = make_jobs("mooncake", **arguments), make_jobs("mooncake", **arguments, turns=True)
    assert [job._replace(answer=0, filled=None) for job in turns] == plain
    with pytest.raises(InvalidRequestError, match="workload 'lmsys' follow no answers"):
        make_jobs("lmsys", rate=1, duration=1, seed=0, turns=True)


def test_a_traces_own_times_are_stretched_to_the_rate(mooncake):
    jobs = make_jobs("mooncake", rate=0.75, duration=3.0, seed=0, trace=mooncake, arrivals="trace")
    assert [job.at for job in jobs] == sorted(job.at for job in jobs)
    assert all(0 <= job.at <= 3.0 for job in jobs)
    with pytest.raises(InvalidRequestError, match="lasts"):
        make_jobs("mooncake", rate=0.75, duration=60, seed=0, trace=mooncake, arrivals="trace")


def test_classes_are_drawn_by_their_shares():
    interactive, batch = SLO.interactive(), SLO(deadline=60.0)
    jobs = make_jobs("lmsys", rate=100, duration=50, seed=0, slos=[(3, interactive), (1, batch)])
    assert sum(job.slo == interactive for job in jobs) / len(jobs) == pytest.approx(0.75, abs=0.03)
    assert {job.slo for job in jobs} == {interactive, batch}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"workload": "poems"}, "'poems' is unknown"),
        ({"workload": "azure"}, "--trace"),
        ({"workload": "sharegpt", "trace": Path("azure.csv")}, "reads no trace; with --trace give azure"),
        ({"workload": "sharegpt", "arrivals": "trace"}, "no times of its own"),
        ({"workload": "sharegpt", "arrivals": "bursty"}, "poisson or trace"),
        ({"workload": "sharegpt", "rate": 0.0}, "above 0"),
        ({"workload": "sharegpt", "max_tokens": -1}, "max_tokens=-1 must be above 0"),
        ({"workload": "sharegpt", "duration": float("nan")}, "above 0"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_reason(given, message):
    with pytest.raises(InvalidRequestError, match=message):
        make_jobs(**({"rate": 1.0, "duration": 1.0, "seed": 0} | given))


@pytest.mark.parametrize(
    ("workload", "text", "message"),
    [
        ("azure", "a,b\n1,2\n", "not an Azure trace"),
        ("azure", "", "is empty"),
        ("azure", "\udcff\udcfe", "is no text of a trace"),
        ("azure", AZURE + "soon,1,2\n", "not an Azure trace"),
        ("mooncake", MOONCAKE + "{}\n", "line 4"),
        (
            "mooncake",
            '{"timestamp": 0, "input_length": 900, "output_length": 5, "hash_ids": [0]}',
            "1 hash_ids for 900",
        ),
        (
            "mooncake",
            '{"timestamp": NaN, "input_length": 300, "output_length": 5, "hash_ids": [0]}',
            "line 1 .*timestamp nan",
        ),
        ("mooncake", "", "empty"),
        ("mooncake", "\udcff\udcfe", "is no text of a trace"),
    ],
)
def test_a_malformed_trace_is_refused_by_name(tmp_path, workload, text, message):
    path = tmp_path / "trace"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(InvalidRequestError, match=message):
        make_jobs(workload, rate=1, duration=1, seed=0, trace=path)


def test_a_traces_own_times_must_be_in_order(tmp_path):
    path = tmp_path / "trace"
    path.write_text("".join(reversed(MOONCAKE.splitlines(keepends=True))))
    with pytest.raises(InvalidRequestError, match="request 2 of the trace came before the one above it"):
        make_jobs("mooncake", rate=0.75, duration=3.0, seed=0, trace=path, arrivals="trace")


def test_a_missing_trace_is_refused(tmp_path):
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        make_jobs("azure", rate=1, duration=1, seed=0, trace=tmp_path / "nowhere.csv")
