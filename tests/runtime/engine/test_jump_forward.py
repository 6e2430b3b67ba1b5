"""Text that a grammar forces is taken without sampling it, and the output is what it would have been."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import xgrammar
from checkpoints import make_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from superinfer.embedded import model_path
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.engine.grammar_jump import LEAST, TAIL, Retokenizer
from superinfer.runtime.engine.grammar_worker import load_tokenizer_info
from superinfer.runtime.engine.model_executor import ModelExecutor, build_executor
from superinfer.runtime.kv.cache import KVCache
from superinfer.runtime.protocol import Grammar, SamplingParams
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.registry import build_scheduler
from superinfer.runtime.scheduler.sequence import Sequence
from superinfer.runtime.tokenization import Tokenizer

PROMPT = "<|im_start|>user\nMira Ruiz is 31 and lives in Oslo. As JSON.<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the embedded one's tokenizer: what it would say is not the subject here."""
    folder = tmp_path_factory.mktemp("small")
    make_checkpoint(folder, vocab_size=4096, max_position_embeddings=2048, eos_token_id=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_path() / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def executor(small_checkpoint: Path) -> Any:
    """It in this process, with a pool so small that sequences preempt each other."""
    config = EngineConfig(model=str(small_checkpoint), kv_tokens=480, max_batch_size=6, threads=1, dtype="float32")
    executor = build_executor(config)
    yield executor
    executor.close()


@pytest.fixture(scope="module")
def tokenizer(executor: ModelExecutor) -> Tokenizer:
    return Tokenizer(executor.path)


class Run:
    """Requests with these grammars, all at once. sequences: as they ended. updates: (sequence, tokens, logprobs) as
    they were told. steps: how many it took."""

    def __init__(
        self,
        executor: ModelExecutor,
        tokenizer: Tokenizer,
        grammars: list[Grammar],
        *,
        jumps: bool = True,
        depth: int = 1,
        prompt: str = PROMPT,
        **sampling: Any,
    ) -> None:
        limits = executor.limits
        bounds = SchedulerLimits(limits.num_slots, 64, limits.max_model_len)
        scheduler = build_scheduler("fcfs", KVCache(limits.num_blocks, limits.page_size), bounds)
        self.sequences, self.updates, self.steps = [], [], 0
        retokenizer = None
        for at, grammar in enumerate(grammars):
            executor.grammars.request(grammar).result(60)
            retokenizer = retokenizer or executor.grammars._retokenizer
            params = SamplingParams(**{"temperature": 0.0, "max_tokens": 200, "grammar": grammar, **sampling})
            self.sequences.append(
                Sequence(
                    id=at,
                    prompt=tokenizer.encode(prompt),
                    arrival=0.0,
                    max_tokens=params.max_tokens or 0,
                    sampling=params,
                    seed=at,
                    stop_ids=tuple(executor.eos_token_ids),
                )
            )
            scheduler.add(self.sequences[-1])
        executor.grammars._retokenizer = retokenizer if jumps else None
        waiting, now = 0, 0.0
        while True:
            now += 0.01
            plan = scheduler.plan(now)
            if plan is not None:
                executor.submit(plan)
                waiting, self.steps = waiting + 1, self.steps + 1
            elif not waiting:
                break
            if waiting and (plan is None or waiting >= depth):
                waiting -= 1
                for update in scheduler.commit(executor.collect(), now):
                    self.updates.append((update.sequence, list(update.token_ids), update.logprobs))
        executor.grammars._retokenizer = retokenizer
        self.preemptions = sum(sequence.preemptions for sequence in self.sequences)
        self.outputs = [sequence.tokens[sequence.num_prompt :].tolist() for sequence in self.sequences]
        self.texts = [tokenizer.decode(output) for output in self.outputs]


def schema_of(schema: dict[str, Any]) -> Grammar:
    return Grammar(kind="json_schema", source=json.dumps(schema))


def record(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


TEXTS = ["", "Oslo", "two words", "a_b-c.d", "straße €", 'say "hi"', "back\\slash", "ends with space ", "  ", "日本語"]
NAMES = ["id", "customer_name", "shipping address", "straße", 'q"uote', "x", "created_at_utc", "日本"]
leaves = st.one_of(
    st.sampled_from(TEXTS).map(lambda text: {"const": text}),
    st.lists(st.sampled_from(TEXTS), min_size=2, max_size=3, unique=True).map(lambda texts: {"enum": texts}),
    st.just({"type": "integer", "minimum": 0, "maximum": 120}),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.integers(1, 8).map(lambda most: {"type": "string", "maxLength": most}),
)


def _objects(values: Any) -> Any:
    return st.dictionaries(st.sampled_from(NAMES), values, min_size=1, max_size=3).map(lambda made: record(**made))


schemas = _objects(
    st.one_of(
        leaves,
        leaves,
        _objects(leaves),
        leaves.map(lambda leaf: {"type": "array", "items": leaf, "minItems": 2, "maxItems": 2}),
    )
)


def is_of(text: str, schema: Any) -> bool:
    """Whether a value is of one of the schemas made here."""

    def check(value: Any, schema: Any) -> bool:
        if "const" in schema:
            return bool(value == schema["const"])
        if "enum" in schema:
            return value in schema["enum"]
        match schema["type"]:
            case "object":
                inner = schema["properties"]
                return list(value) == list(inner) and all(check(value[name], inner[name]) for name in inner)
            case "array":
                return len(value) == 2 and all(check(item, schema["items"]) for item in value)
            case "integer":
                return type(value) is int and 0 <= value <= 120
            case "boolean":
                return type(value) is bool
            case "null":
                return value is None
            case _:
                return isinstance(value, str) and len(value) <= schema["maxLength"]

    return check(json.loads(text), schema)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(schemas, min_size=3, max_size=6), st.sampled_from([1, 2, 3]), st.sampled_from([0.0, 1.0]))
def test_outputs_of_random_schemas_are_right_and_do_not_depend_on_steps_planned_ahead(
    executor: ModelExecutor, tokenizer: Tokenizer, made: list[Any], depth: int, temperature: float
):
    grammars = [schema_of(schema) for schema in made]
    run = Run(executor, tokenizer, grammars, depth=depth, temperature=temperature)
    for sequence, text, schema in zip(run.sequences, run.texts, made, strict=True):
        assert sequence.finish_reason == "stop", text
        assert is_of(text, schema), (text, schema)
        assert sequence.report(1.0).output_tokens == sequence.num_output
    told: dict[int, list[int]] = {}
    for sequence, tokens, _ in run.updates:
        told.setdefault(sequence.id, []).extend(tokens)
    assert list(dict(sorted(told.items())).values()) == run.outputs
    one_by_one = Run(executor, tokenizer, grammars[:1], depth=1, temperature=temperature)
    assert one_by_one.outputs[0] == run.outputs[0]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.dictionaries(st.sampled_from(NAMES), st.sampled_from(TEXTS), min_size=2, max_size=4), min_size=3, max_size=5
    ),
    st.sampled_from([1, 2]),
)
def test_what_is_forced_is_the_same_text_with_and_without_jumps_in_fewer_steps(
    executor: ModelExecutor, tokenizer: Tokenizer, objects: list[dict[str, str]], depth: int
):
    made = [record(**{name: {"const": value} for name, value in one.items()}) for one in objects]
    grammars = [schema_of(schema) for schema in made]
    jumping = Run(executor, tokenizer, grammars, depth=depth)
    walking = Run(executor, tokenizer, grammars, depth=depth, jumps=False)
    assert jumping.texts == walking.texts and jumping.steps < walking.steps
    for one, text, output in zip(objects, jumping.texts, jumping.outputs, strict=True):
        assert json.loads(text) == one
        whole = tokenizer.encode(text)
        same = next((i for i, pair in enumerate(zip(whole, output, strict=False)) if pair[0] != pair[1]), len(whole))
        rest = text.removeprefix(tokenizer.decode(output[:same]))
        assert len(rest) <= 12, (text, rest)  # all is written as the tokenizer writes it, but the last word or two


def test_what_a_structural_tag_forces_is_taken_around_its_special_tokens_too(
    executor: ModelExecutor, tokenizer: Tokenizer
):
    marker = 1  # <|im_start|>
    call = {"type": "json_schema", "json_schema": record(customer_name={"const": "Mira"}, number={"enum": [1, 2]})}
    begun = {"type": "sequence", "elements": [{"type": "token", "token": marker}, call]}
    twice = {"type": "sequence", "elements": [begun, begun, {"type": "token", "token": marker}]}
    grammar = Grammar(kind="structural_tag", source=json.dumps(twice))
    jumping, walking = Run(executor, tokenizer, [grammar]), Run(executor, tokenizer, [grammar], jumps=False)
    assert jumping.steps < walking.steps
    for run in (jumping, walking):
        assert run.outputs[0][0] == marker and run.outputs[0].count(marker) == 3
        for text in run.texts[0].replace("}{", "}\n{").splitlines():
            assert json.loads(text)["customer_name"] == "Mira"


def test_preempted_sequences_end_as_if_they_had_not_been(executor: ModelExecutor, tokenizer: Tokenizer):
    long = record(**{f"field_number_{i}": {"type": "string", "maxLength": 6} for i in range(7)})
    grammars = [schema_of(long | {"title": str(i)}) for i in range(6)]
    for depth in (1, 2):
        together = Run(executor, tokenizer, grammars, depth=depth, temperature=1.0)
        assert together.preemptions > 0, "the pool should have been too small for all"
        for at, grammar in enumerate(grammars[:2]):
            alone = Run(executor, tokenizer, [grammar], temperature=1.0)
            if at == 0:  # the seeds are by place
                assert alone.outputs[0] == together.outputs[0]
        assert all(list(json.loads(text)) == list(long["properties"]) for text in together.texts)


@pytest.mark.parametrize("depth", [1, 2])
def test_max_tokens_holds_within_a_forced_text(executor: ModelExecutor, tokenizer: Tokenizer, depth: int):
    grammar = Grammar(kind="regex", source="one two three four five six seven eight nine ten")
    whole = Run(executor, tokenizer, [grammar]).outputs[0]
    for most in range(1, 9):
        run = Run(executor, tokenizer, [grammar], depth=depth, max_tokens=most)
        assert run.outputs == [whole[:most]] and run.sequences[0].finish_reason == "length"


def test_a_request_for_logprobs_gets_one_for_each_token(executor: ModelExecutor, tokenizer: Tokenizer):
    grammar = schema_of(record(customer_name={"const": "Mira"}, age={"type": "integer"}))
    asked = Run(executor, tokenizer, [grammar], logprobs=1)
    found = [item.token_id for _, _, logprobs in asked.updates for item in logprobs]
    assert found == asked.outputs[0]
    # Beside one that jumps, too.
    both = [schema_of({"title": "free", **record(shipping_address={"const": "Main Street 5"})}), grammar]
    assert Run(executor, tokenizer, both, logprobs=0).outputs[1] == asked.outputs[0]


def test_penalties_count_every_token(executor: ModelExecutor, tokenizer: Tokenizer):
    grammar = schema_of(record(customer_name={"type": "string", "maxLength": 12}, b={"type": "string", "maxLength": 9}))
    with_jumps = Run(executor, tokenizer, [grammar], repetition_penalty=1.5, frequency_penalty=1.0)
    without = Run(executor, tokenizer, [grammar], repetition_penalty=1.5, frequency_penalty=1.0, jumps=False)
    assert with_jumps.outputs == without.outputs


@pytest.mark.slow
def test_the_cuda_executor_gives_the_same_outputs_with_steps_under_way(
    small_checkpoint: Path, executor: ModelExecutor, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    """Its host side, on the CPU: what two steps in flight see of each other's tokens is in its hands."""
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    from plain_kernels import use_plain_kernels

    from superinfer.kernels.paged import TorchAttention
    from superinfer.runtime.engine.cuda_attention import StepAttention
    from superinfer.runtime.engine.cuda_executor import CudaExecutor
    from superinfer.runtime.models.loader import load_model

    use_plain_kernels(monkeypatch)
    model = load_model(small_checkpoint)
    scale = model.config.head_dim**-0.5
    cuda = CudaExecutor(
        model,
        executor.limits,
        StepAttention(lambda _: TorchAttention(scale), TorchAttention(scale)),
        max_batch_tokens=256,
        model_name="tiny",
        path=str(small_checkpoint),
        graphs=False,
    )
    try:
        grammars = [schema_of(record(name={"const": "Mira"}, kind={"enum": ["first", "second"]}))]
        expected = Run(executor, tokenizer, grammars, prompt="Who?")
        found = Run(cuda, tokenizer, grammars, depth=cuda.depth, prompt="Who?")
        assert found.outputs == expected.outputs and found.steps < len(found.outputs[0])

        # A forced text is told with the token in front of it, and computed by the very next plan: planning ahead costs
        # a step behind the prompt, whose text is forced before any token is told, and one behind the end.
        text = schema_of(record(shipping_address={"type": "string", "maxLength": 4}, customer_name={"const": "Mira"}))
        at_once, ahead = Run(executor, tokenizer, [text]), Run(cuda, tokenizer, [text], depth=cuda.depth)
        assert ahead.outputs == at_once.outputs and ahead.steps == at_once.steps + 2

        words = Grammar(kind="regex", source="one two three four five six seven eight nine ten")
        whole = Run(executor, tokenizer, [words]).outputs[0]
        for most in range(1, 9):
            run = Run(cuda, tokenizer, [words], depth=cuda.depth, max_tokens=most)
            assert run.outputs == [whole[:most]] and run.sequences[0].finish_reason == "length"

        long = record(**{f"field_number_{i}": {"type": "string", "maxLength": 6} for i in range(7)})
        many = [schema_of(long | {"title": str(i)}) for i in range(6)]
        together = Run(cuda, tokenizer, many, depth=cuda.depth, temperature=1.0)
        assert together.preemptions > 0, "the pool should have been too small for all"
        assert together.outputs == Run(executor, tokenizer, many, temperature=1.0).outputs
    finally:
        cuda.close()


# ---------------------------------------------------------------------------- retokenization


@pytest.fixture(scope="module")
def retokenizer(executor: ModelExecutor) -> Retokenizer:
    return Retokenizer(executor.path, load_tokenizer_info(executor.path, executor.limits.vocab_size, (2, 0)))


words = st.text(st.sampled_from("ab c_d\"':,.{}[]0123 \né日😀"), min_size=0, max_size=24)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words, words, words)
def test_tokens_of_a_forced_text_are_those_of_the_whole_whatever_follows(
    retokenizer: Retokenizer, tokenizer: Tokenizer, before: str, forced: str, after: str
):
    tail = tokenizer.encode(before)
    found = retokenizer.tokens(forced, tail[-TAIL:]) if forced else []
    assert forced.startswith(tokenizer.decode(found, skip_special=False))
    # Up to where the text begins, tokens may be others than the tokenizer's: they have been given out.
    whole = tokenizer.encode(before + forced + after)
    if found and whole[: len(tail)] == tail and len(tail) <= TAIL:
        assert whole[len(tail) : len(tail) + len(found)] == found


def test_a_word_begun_before_is_not_torn(retokenizer: Retokenizer, tokenizer: Tokenizer):
    assert retokenizer.tokens('"customer_name": "', []) == tokenizer.encode('"customer_name": "')[:-1]
    tail = tokenizer.encode("st")
    assert tokenizer.encode("start") != [*tail, *tokenizer.encode("art")], "the example needs a merge across the border"
    assert retokenizer.tokens("art of it", tail) == []


def test_a_text_too_short_is_left_to_sampling(executor: ModelExecutor, retokenizer: Retokenizer):
    info = load_tokenizer_info(executor.path, executor.limits.vocab_size, (2, 0))
    compiled = xgrammar.GrammarCompiler(info, max_threads=1).compile_regex("abc")
    matcher = xgrammar.GrammarMatcher(compiled)
    assert retokenizer.forced(matcher, []) == [] and LEAST > 1
    assert matcher.accept_string("abc"), "the matcher has not moved"
