"""Constrained output through a real engine with the embedded model: text in, text of the wanted form out."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path

import psutil
import pytest
import zmq

import superinfer
from superinfer.errors import InvalidRequestError
from superinfer.runtime import protocol
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.engine import grammar_worker
from superinfer.runtime.engine.grammar import GrammarCompiler
from superinfer.runtime.launch import launch_engine
from superinfer.runtime.protocol import PROTOCOL_VERSION, Generate, Grammar, Hello, SamplingParams
from superinfer.runtime.slo import SLO
from superinfer.runtime.text import TextClient, TextRequest, TextResult

EMBEDDED = Path(superinfer.__file__).parent / "embedded"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMA = Grammar(kind="json_schema", source=json.dumps(PERSON))
PHONE = Grammar(kind="regex", source=r"\+[0-9]{2} [0-9]{3}-[0-9]{4}")


def tag(format: object) -> Grammar:
    return Grammar(kind="structural_tag", source=json.dumps(format))


@pytest.fixture(scope="module")
def embedded():
    """An engine whose pool is so small that sequences preempt each other."""
    with launch_engine(EngineConfig(kv_tokens=384, max_batch_size=8, max_batch_tokens=64, threads=1)) as engine:
        yield engine.address


def ask(prompt: str, grammar: Grammar | None = None, **params) -> TextRequest:
    params = {"max_tokens": 80, "temperature": 1.0, "seed": 1} | params
    return TextRequest(prompt=prompt, sampling=SamplingParams(grammar=grammar, **params))


def run(address: str, *requests: TextRequest, one_by_one: bool = False) -> list[TextResult]:
    async def all_at_once() -> list[TextResult]:
        async with await TextClient.connect(address) as client:
            if one_by_one:
                return [result for request in requests for result in await client.complete(request)]
            answers = await asyncio.gather(*(client.complete(request) for request in requests))
            return [result for results in answers for result in results]

    return asyncio.run(all_at_once())


def check_person(text: str) -> None:
    person = json.loads(text)
    assert list(person) == ["name", "age", "tags"]
    assert len(person["name"]) <= 12 and 0 <= person["age"] <= 150 and set(person["tags"]) <= {"a", "b"}


def test_output_is_what_the_grammar_says_and_ends_where_it_ends(embedded):
    hot = dict(temperature=2.0)  # left alone, the model would write anything
    schema, phone, either, anything = run(
        embedded,
        ask("Who?", SCHEMA, **hot),
        ask("Call", PHONE, **hot),
        ask("Yes?", Grammar(kind="ebnf", source='root ::= "yes" | "no"'), **hot),
        ask("{", Grammar(kind="json_object"), temperature=0, max_tokens=120),
    )
    check_person(schema.text)
    assert re.fullmatch(PHONE.source, phone.text)
    assert either.text in ("yes", "no")
    assert schema.finish_reason == phone.finish_reason == either.finish_reason == "stop"
    if anything.finish_reason == "stop":
        assert isinstance(json.loads(anything.text), dict)
    assert anything.text.startswith("{")


def test_a_long_bound_is_kept(embedded):
    schema = {"type": "array", "items": {"type": "string", "minLength": 101, "maxLength": 104}, "minItems": 1}
    (result,) = run(embedded, ask("Tell", Grammar(kind="json_schema", source=json.dumps(schema)), max_tokens=200))
    first, _ = json.JSONDecoder().raw_decode(result.text, 1)
    assert result.text.startswith('["') and 101 <= len(first) <= 104


@pytest.mark.slow
def test_long_texts_keep_their_bounds_through_preemptions_and_jumps(embedded):
    """The pool is smaller than what runs together: who comes back has its characters counted anew."""
    schema = {
        "type": "object",
        "properties": {
            "story": {"type": "string", "minLength": 190, "maxLength": 200},
            "summary_of_the_story": {"type": "string", "minLength": 110, "maxLength": 120},
        },
        "required": ["story", "summary_of_the_story"],
    }
    grammar = Grammar(kind="json_schema", source=json.dumps(schema))
    requests = [ask("Tell", grammar, seed=seed, max_tokens=320) for seed in range(6)]
    results = run(embedded, *requests)
    assert [r.text for r in results] == [r.text for r in run(embedded, *requests, one_by_one=True)]
    for result in results:
        told = json.loads(result.text)
        assert 190 <= len(told["story"]) <= 200 and 110 <= len(told["summary_of_the_story"]) <= 120


@pytest.mark.slow
def test_strangers_in_the_batch_and_preemptions_change_nothing(embedded):
    letters = Grammar(kind="regex", source="[a-z]{90,110}")
    constrained = [ask(f"Word {i}: " + "x " * 20 * i, letters, seed=i, max_tokens=120) for i in range(4)]
    free = [ask(f"Tell me {i} " + "y " * 20 * i, seed=i, max_tokens=60, ignore_eos=True) for i in range(4)]
    together = run(embedded, *constrained, *free)
    alone = run(embedded, *constrained, *free, one_by_one=True)
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert sum(r.report.preemptions for r in together[:4]) > 0, "the pool should have been too small for all"
    assert all(re.fullmatch(letters.source, result.text) for result in together[:4])


def test_every_continuation_of_n_is_constrained(embedded):
    results = run(embedded, ask("Number:", PHONE, n=4))
    assert all(re.fullmatch(PHONE.source, result.text) for result in results)
    assert len({result.text for result in results}) > 1


def test_max_tokens_may_cut_an_output_short(embedded):
    (result,) = run(embedded, ask("Who?", SCHEMA, max_tokens=3))
    assert result.finish_reason == "length" and result.text.startswith("{")


def test_a_stop_token_ends_an_output_only_where_the_grammar_may_end(embedded):
    letters = Grammar(kind="regex", source="[a-z]{2}[0-9]*")
    digit = 4  # some token; whatever it is, it may not come before the two letters
    (result,) = run(embedded, ask("x", letters, stop_token_ids=(digit,)))
    assert re.match("[a-z]{2}", result.text)


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (Grammar(kind="json_schema", source='{"type": "unheard-of"}'), "unheard-of"),
        (
            Grammar(kind="json_schema", source='{"type": "array", "uniqueItems": true}'),
            "'uniqueItems' is not supported",
        ),
        (Grammar(kind="json_schema", source="{not json"), "not JSON"),
        (Grammar(kind="regex", source="(a"), "parenthesis"),
        (Grammar(kind="ebnf", source="root ::= nobody"), "nobody"),
        (Grammar(kind="regex", source="a" * 200_000), "200000 characters"),
        (Grammar(kind="regex", source="[^\\s\\S]"), "cannot be used"),
        (Grammar(kind="regex", source=r"\\\Aab\Z"), r"\A in '\\\\\\Aab\\Z' is not supported"),
        (Grammar(kind="regex", source=r"[\d\B]"), r"\B in"),
        (Grammar(kind="regex", source=r"a(?<=a)b"), "'(?<=' in"),
        (
            Grammar(kind="json_schema", source='{"type": "string", "pattern": "^(?=a)ab$"}'),
            "json_schema.pattern: '(?=a'",
        ),
        (Grammar(kind="regex", source="(a*a*a*a*a*a*)*b"), "too ambiguous"),
        (tag({"type": "any_text"}), "structural_tag.type='any_text' is not supported"),
        (tag({"type": "or", "elements": []}), "structural_tag of type 'or' is empty"),
        (tag({"type": "or", "elements": [{"type": "token", "token": "<a>"}]}), "elements[0].token='<a>' is of the"),
        (tag({"type": "plus", "content": {"type": "regex"}}), "structural_tag.content.pattern is missing"),
        (tag({"type": "regex", "pattern": "a", "excludes": []}), "structural_tag.excludes is not supported"),
        (tag({"type": "optional", "content": {"type": "regex", "pattern": r"\Z"}}), r"content.pattern: \Z"),
        (
            tag({"type": "sequence", "elements": [{"type": "json_schema", "json_schema": {"not": {}}}]}),
            "structural_tag.elements[0].json_schema: keyword 'not' is not supported",
        ),
        (tag([]), "structural_tag=[] is no format"),
    ],
)
def test_a_wrong_grammar_is_refused_with_the_reason_and_harms_nobody(embedded, grammar, said):
    async def both() -> tuple[object, object]:
        async with await TextClient.connect(embedded) as client:
            return await asyncio.gather(
                client.complete(ask("a", grammar)), client.complete(ask("b", PHONE)), return_exceptions=True
            )

    refused, served = asyncio.run(both())
    assert isinstance(refused, InvalidRequestError) and said in str(refused)
    assert re.fullmatch(PHONE.source, served[0].text)


@pytest.mark.parametrize("params", [dict(ignore_eos=True), dict(min_tokens=3)])
def test_what_contradicts_a_grammar_is_refused(embedded, params):
    with pytest.raises(InvalidRequestError, match="contradicts a grammar"):
        run(embedded, ask("a", PHONE, **params))


def test_a_grammar_needs_a_source_and_json_object_takes_none():
    with pytest.raises(InvalidRequestError, match="needs a source"):
        Grammar(kind="regex")
    with pytest.raises(InvalidRequestError, match="takes no source"):
        Grammar(kind="json_object", source="{}")


def test_a_request_cancelled_or_expired_while_its_grammar_is_compiled_ends(embedded):
    slow = Grammar(kind="json_schema", source=json.dumps({"enum": [f"word{i}" * 3 for i in range(2000)]}))

    async def leave() -> None:
        async with await TextClient.connect(embedded) as client:
            task = asyncio.create_task(client.complete(ask("a", slow)))
            late = TextRequest(
                prompt="b", sampling=SamplingParams(grammar=slow), slo=SLO(deadline=0.02, on_miss="truncate")
            )
            hurried = asyncio.create_task(client.complete(late))
            await asyncio.sleep(0.01)
            task.cancel()
            assert (await hurried)[0].finish_reason == "deadline"
            (answer,) = await client.complete(ask("c", PHONE))  # the engine serves on
            assert re.fullmatch(PHONE.source, answer.text)
            stats = await client.client.stats()
            assert stats.running == stats.waiting == 0

    asyncio.run(leave())


def test_a_client_that_leaves_while_compiling_leaves_nothing_behind(embedded):
    slow = Grammar(kind="json_schema", source=json.dumps({"enum": [f"term{i}" * 3 for i in range(2000)]}))

    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 30_000
        socket.connect(embedded)
        socket.send(protocol.encode(Hello(version=PROTOCOL_VERSION)))
        socket.recv()
        socket.send(protocol.encode(Generate(request_id="x", prompt=[5], sampling=SamplingParams(grammar=slow))))
    until = time.monotonic() + 60

    async def health():
        async with await TextClient.connect(embedded) as client:
            return await client.client.stats()

    while (stats := asyncio.run(health())).cancelled == 0 or stats.waiting or stats.running:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_an_engine_with_nothing_to_do_makes_ready_for_a_first_grammar_and_does_so_again_where_that_is_lost():
    with launch_engine(EngineConfig(kv_tokens=384, max_batch_size=8, max_batch_tokens=64, threads=1)) as engine:
        until = time.monotonic() + 100
        while not (workers := psutil.Process(engine.pid).children()):  # nobody has asked for anything
            assert time.monotonic() < until
            time.sleep(0.05)
        for _ in range(2):
            (answer,) = run(engine.address, ask("a", PHONE))
            assert re.fullmatch(PHONE.source, answer.text)
            assert psutil.Process(engine.pid).children() == workers
        workers[0].kill()
        while workers[0].status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until
            time.sleep(0.01)
        (answer,) = run(engine.address, ask("a", Grammar(kind="regex", source="[a-f]{3}")))
        assert re.fullmatch("[a-f]{3}", answer.text)
        assert psutil.Process(engine.pid).children() != workers


def test_nobody_else_waits_while_a_grammar_is_compiled(embedded):
    async def both() -> tuple[str, str]:
        async with await TextClient.connect(embedded) as client:
            await client.complete(ask("a", PHONE))
            (worker,) = psutil.Process(client.info.pid).children()
            worker.suspend()
            try:
                held = asyncio.create_task(client.complete(ask("b", Grammar(kind="regex", source="[0-9]{7}"))))
                (free,) = await client.complete(ask("c", max_tokens=20))
                assert not held.done()
            finally:
                worker.resume()
            return (await held)[0].text, free.text

    constrained, free = asyncio.run(both())
    assert re.fullmatch("[0-9]{7}", constrained) and free


def test_a_grammar_that_is_too_ambiguous_is_refused_and_others_are_compiled(embedded):
    rules = [f"a{i} ::= a{i + 1} a{i + 1} | a{i + 1}" for i in range(60)]
    evil = Grammar(kind="ebnf", source="\n".join(["root ::= a0", *rules, 'a60 ::= "a"']))
    with pytest.raises(InvalidRequestError, match="simplify it"):
        run(embedded, ask("a", evil))
    (served,) = run(embedded, ask("c", PHONE))
    assert re.fullmatch(PHONE.source, served.text)


def test_a_grammar_that_hangs_the_compiler_is_given_up_and_others_are_compiled(monkeypatch):
    compiler, others = GrammarCompiler(str(EMBEDDED), 4096, (2,)), set(psutil.Process().children())
    try:
        compiler.request(PHONE).result(60)
        (worker,) = set(psutil.Process().children()) - others
        monkeypatch.setattr(grammar_worker, "COMPILE_S", 0.5)
        worker.suspend()
        with pytest.raises(InvalidRequestError, match=r"takes more than .* s; simplify it"):
            compiler.request(Grammar(kind="regex", source="[0-9]{7}")).result(60)
        monkeypatch.undo()
        compiler.request(Grammar(kind="regex", source="[0-9]{8}")).result(60)
        assert not worker.is_running()
    finally:
        compiler.close()
    assert set(psutil.Process().children()) <= others


def test_a_checkpoint_without_a_tokenizer_says_so(tmp_path):
    compiler = GrammarCompiler(str(tmp_path), 512, (2,))
    compiler.prepare()  # says nothing
    with pytest.raises(InvalidRequestError, match="tokenizer"):
        compiler.request(PHONE).result(60)
    compiler.close()


@pytest.mark.parametrize("source", ["abcdeé", "a[é]x", "ab?(é|ü)"])
def test_a_grammar_that_the_vocabulary_cannot_spell_ends_the_output_and_is_logged_once(tiny_config, capfd, source):
    """The model's tokens are ASCII characters."""
    with launch_engine(tiny_config) as engine:
        (result,) = run(engine.address, ask("a", Grammar(kind="regex", source=source)))
        (after,) = run(engine.address, ask("b", PHONE))
    assert result.finish_reason == "stop" and result.text and source.startswith(result.text[0])
    assert re.fullmatch(PHONE.source, after.text)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "ERROR" in line]
    assert "a grammar allows no token that the vocabulary has; the sequence ends there" in line


def test_a_logit_bias_makes_a_token_certain_or_impossible(embedded):
    greedy = dict(temperature=0.0, max_tokens=1, ignore_eos=True)
    (free,) = run(embedded, ask("2 + 2 =", **greedy))
    (first,) = free.token_ids
    (barred,) = run(embedded, ask("2 + 2 =", logit_bias=((first, -100.0),), **greedy))
    assert barred.token_ids != [first]
    (forced,) = run(embedded, ask("2 + 2 =", logit_bias=((7, 100.0), (9, 1.0)), **greedy))
    assert forced.token_ids == [7]
    with pytest.raises(InvalidRequestError, match="logit_bias token id 99999"):
        run(embedded, ask("a", logit_bias=((99999, 1.0),)))
    with pytest.raises(InvalidRequestError, match="logit_bias of token 3"):
        ask("a", logit_bias=((3, 101.0),))


def test_a_logit_bias_holds_for_tokens_that_a_grammar_would_force(embedded):
    sentence = Grammar(
        kind="regex", source="The weather in Oslo is always sunny and warm in the morning(!|, and in the evening)"
    )
    (free,) = run(embedded, ask("Say it.", sentence, temperature=0.0))
    barred = tuple((token_id, -100.0) for token_id in free.token_ids[4:] if token_id > 258)  # of several bytes
    assert barred
    (other,) = run(embedded, ask("Say it.", sentence, temperature=0.0, logit_bias=barred))
    assert re.fullmatch(sentence.source, other.text) and re.fullmatch(sentence.source, free.text)
    assert not {token_id for token_id, _ in barred} & set(other.token_ids)
