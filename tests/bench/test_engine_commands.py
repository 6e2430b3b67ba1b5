"""`superinfer bench offline | latency | kernels`: what they write can be judged, what they cannot do they say."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from superinfer.bench.ceilings import Ceilings, decode_floor_s, in_dtype, prefill_floor_s, prefill_flops
from superinfer.bench.shapes import CONFIGS, engine_of_shape
from superinfer.bench.workload import Load, Span, make_load, prompts_of, workload_name
from superinfer.errors import InvalidRequestError
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.models.config import load_config
from superinfer.runtime.sim.shapes import SHAPES
from superinfer.runtime.sim.workload import Job
from superinfer.runtime.slo import SLO

Run = Callable[..., tuple[int, str, str]]
TINY = ("--load-format", "dummy", "--device", "cpu", "--threads", "1", "--kv-tokens", "4096")


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Run:
    """`superinfer bench ARGS` in this process, which has paid for its imports; engines are processes of their own."""

    def run(*arguments: str) -> tuple[int, str, str]:
        from superinfer.cli import main

        with pytest.raises(SystemExit) as ended:
            main(["bench", *arguments])
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return run


def test_offline_counts_every_token_and_records_where_it_ran(bench: Run, random_llama: Path, tmp_path: Path):
    out = tmp_path / "offline.json"
    sizes = ("--requests", "9", "--prompt-tokens", "5:30", "--output-tokens", "3:20", "--rounds", "2")
    tiers = ("--dram-tokens", "4096", "--policy", "lru")
    status, text, err = bench("offline", "--model", str(random_llama), *TINY, *tiers, *sizes, "--json", str(out))
    assert status == 0, err
    found = json.loads(out.read_text())
    assert len(found["rounds"]) == 2 and found["rounds"][0]["prompt_tokens"] != found["rounds"][1]["prompt_tokens"]
    for one in found["rounds"]:
        assert 9 * 3 <= one["output_tokens"] <= 9 * 20 and one["steps"] > 0
        assert one["output_tokens_per_s"] == pytest.approx(one["output_tokens"] / one["seconds"])
        assert {"rotations_out", "gbps_out", "overlap", "stall_s", "mirror_hit_rate"} <= one["tiers"].keys()
    assert found["ceilings"]["copy"] > 0 and all(floor > 0 for floor in found["floor_s"])
    assert found["command"].startswith("superinfer") and found["versions"]["torch"]
    assert "output tokens/s" in text and "second tier:" in text


def test_latency_measures_tpot_ttft_and_prefill(bench: Run, random_llama: Path, tmp_path: Path):
    out = tmp_path / "latency.json"
    sizes = ("--batch", "1,3", "--prompt-tokens", "8", "--output-tokens", "150", "--ttft", "16,64", "--prefill", "2x32")
    status, text, err = bench(
        "latency", "--model", str(random_llama), *TINY, *sizes, "--rounds", "2", "--json", str(out)
    )
    assert status == 0, err
    found = json.loads(out.read_text())
    assert [row["batch"] for row in found["tpot"]] == [1, 3]
    assert [row["prompt_tokens"] for row in found["ttft"]] == [16, 64]
    for row in found["tpot"]:
        assert len(row["rounds"]) == 2 and len(row["rounds"][0]["tpots_ms"]) == row["batch"]
        assert 0 < row["floor_ms"] < row["tpot_ms"] and row["share"] == row["floor_ms"] / row["tpot_ms"]
    assert (found["settings"]["shape"], found["settings"]["layers"]) == (str(random_llama), 2)
    (prefill,) = found["prefill"]
    assert 0 < prefill["share"] < 1 and f"{prefill['share']:.0%} of its roofline" in text
    assert prefill["tokens_per_s"] > 0 and len(prefill["rounds_tokens_per_s"]) == 2


def test_kernels_without_a_gpu_says_so_and_times_the_references_if_asked(bench: Run, tmp_path: Path):
    if not torch.cuda.is_available():
        status, _, err = bench("kernels")
        assert status == 1 and "--device cpu" in err
    out = tmp_path / "kernels.json"
    sizes = ("--tokens", "8", "--batch", "2", "--context", "20", "--prompt", "8", "--repeats", "2")
    asked = ("--device", "cpu", "--model", "embedded", "--dtype", "float32", *sizes, "--json", str(out))
    status, _, err = bench("kernels", *asked)
    assert status == 0, err
    found = json.loads(out.read_text())["kernels"]
    assert len(found) == 6
    for one in found:
        for name, timed in one["variants"].items():
            assert "error" not in timed, (one["kernel"], name, timed)
            assert len(timed["times_s"]) == 2 and timed["roofline_share"] > 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("offline", "--prompt-tokens", "9:3"), "9:3"),
        (("offline", "--requests", "0"), "requests=0"),
        (("offline", "--json", "/nowhere/x.json"), "/nowhere"),
        (("latency", "--batch", "65"), "--max-batch-size 64"),
        (("latency", "--prefill", "many"), "'many'"),
        (("latency", "--layers", "2"), "--layers"),
        (("serve", "--url", "http://127.0.0.1:9", "--rate", "0"), "--rate '0'"),
        (("serve", "--url", "http://127.0.0.1:9", "--workload", "azure"), "--trace FILE"),
        (("serve", "--url", "http://127.0.0.1:9"), "no server answers"),
        (("serve", "--url", "http://127.0.0.1:9", "--slo", "ttft=soon"), "soon"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(bench: Run, arguments: tuple[str, ...], named: str):
    status, _, err = bench(*arguments)
    assert status == (1 if named == "no server answers" else 2) and named in err and len(err.strip().splitlines()) == 1


def test_floors_of_llama_3_8b_are_those_of_its_published_sizes():
    roof, shape = Ceilings(copy=3e12, matmul=7.5e14), SHAPES["llama-3-8b"]
    assert decode_floor_s(shape, 1, 0, roof) == pytest.approx(15.0e9 / 3e12, rel=0.01)  # 15.0 GB of weights
    kv = 131072 * 592 * 128 / 3e12  # 128 KiB a token
    assert decode_floor_s(shape, 128, 592, roof) - decode_floor_s(shape, 128, 0, roof) == pytest.approx(kv)
    assert decode_floor_s(shape, 1024, 0, roof) == pytest.approx(1024 * 15.0e9 / 7.5e14, rel=0.01)
    products = 2048 * 2 * 6.77e9  # 31 layers of 218 M parameters, and keys and values of the last
    assert prefill_flops(shape, 2048) == pytest.approx(products + 2048 * 2048 / 2 * 524288 * 31 / 32, rel=0.003)
    assert in_dtype(shape, "float32").weight_bytes == 2 * shape.weight_bytes


def test_floors_of_a_mixture_count_the_experts_that_are_read_and_the_two_that_a_token_multiplies():
    roof, shape = Ceilings(copy=3e12, matmul=7.5e14), SHAPES["mixtral-8x7b"]
    expert, rest = 3 * 4096 * 14336, 4096 * 128 * 80  # parameters of a layer's expert, and of its attention
    head = 32000 * 4096
    assert decode_floor_s(shape, 1, 0, roof) == pytest.approx(2 * (32 * (2 * expert + rest) + head) / 3e12)
    assert decode_floor_s(shape, 128, 0, roof) == pytest.approx(2 * (32 * (8 * expert + rest) + head) / 3e12)
    kv = 4096 * 128 * 16  # all that the last layer needs of each token
    last = 2 * (2 * expert + rest - kv) + 2 * head
    products = 2 * (31 * (2 * expert + rest) + kv) * 2048 + last + 31 * 4 * 4096 * 2048 * 2049 / 2
    assert prefill_floor_s(shape, 16, 2048, roof) == pytest.approx(16 * products / 7.5e14)
    assert prefill_floor_s(shape, 1, 8, roof) == pytest.approx(shape.read_bytes(8) / 3e12)  # too few to be arithmetic's


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_named_shape_is_one_config_for_engine_and_floor(name: str):
    with engine_of_shape(EngineConfig(model=name), layers=3) as (config, shape):
        loaded = load_config(Path(config.model))
        assert config.load_format == "dummy"
        assert (loaded.num_layers, loaded.hidden_size, loaded.vocab_size) == (3, shape.hidden, shape.vocab)
        assert (loaded.num_kv_heads, loaded.head_dim) == (shape.kv_heads, shape.head_dim)
        experts = (loaded.moe.num_experts, loaded.moe.experts_per_token) if loaded.moe else (1, 1)
        assert experts == (shape.experts, shape.active_experts)
    assert not Path(config.model).exists()


def load(workload: str, **changes) -> Load:
    given = dict(
        workload=workload, trace=None, prompt_tokens=Span(5, 9), output_tokens=Span(2, 3), scale=1.0,
        arrivals="poisson", duration=20.0, seed=3, slos=((1.0, SLO(ttft=1.0)),),
    )  # fmt: skip
    return Load(**(given | changes))


def test_a_load_is_the_same_for_the_same_seed_and_has_the_lengths_asked_for():
    jobs = make_load(load("uniform"), 10.0)
    assert jobs == make_load(load("uniform"), 10.0) != make_load(load("uniform", seed=4), 10.0)
    assert {job.prompt_length for job in jobs} == set(range(5, 10)) and {job.output_length for job in jobs} == {2, 3}
    assert len(jobs) == pytest.approx(200, abs=60) and all(job.slo == SLO(ttft=1.0) for job in jobs)
    assert [len(p) for p in prompts_of(jobs, 100, 0)] == [job.prompt_length for job in jobs]


def test_scaling_keeps_what_prompts_share(tmp_path: Path):
    trace = tmp_path / "mooncake.jsonl"
    rows = [
        {"timestamp": at, "input_length": 1200, "output_length": 10, "hash_ids": [0, 1, 2 + at % 3]} for at in range(40)
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    assert workload_name("", trace) == "mooncake"
    jobs = make_load(load("mooncake", trace=trace, scale=0.1), 2.0)
    prompts = list(prompts_of(jobs, 1000, 5))
    assert {len(p) for p in prompts} == {120} and {job.output_length for job in jobs} == {1}
    assert len({tuple(p[:102]) for p in prompts}) == 1 and len({tuple(p) for p in prompts}) == 3


def test_prompts_of_different_requests_share_nothing():
    jobs = [Job(0.0, 50, 1, (-1 - number,), 50) for number in range(20)]
    prompts = list(prompts_of(jobs, 2000, 0))
    assert len({tuple(p[:4]) for p in prompts}) == 20
    assert list(prompts_of(jobs, 2000, 0)) == prompts != list(prompts_of(jobs, 2000, 1))
    assert all(10 <= token < 2000 for p in prompts for token in p)


def test_spans_are_read_or_refused():
    rng = random.Random(0)
    assert Span.parse("x", "7") == (7, 7) and rng.randint(*Span.parse("x", "3:3")) == 3
    for bad in ("", "0", "5:4", "a", "1:2:3", "-1"):
        with pytest.raises(InvalidRequestError, match="lengths"):
            Span.parse("lengths", bad)
