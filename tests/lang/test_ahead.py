"""Calls that are sent before their turn, on a real engine: the same tokens, sooner; and nothing is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from slow_engine import SlowEngine

import superinfer as si
from superinfer.lang.backend import RuntimeEndpoint
from superinfer.lang.loop import language_loop
from superinfer.lang.prompt import keeps_answers
from superinfer.runtime.text import TextRequest


@pytest.fixture
def begun(endpoint: RuntimeEndpoint, monkeypatch: pytest.MonkeyPatch) -> list[TextRequest]:
    """Every request of this test, in the order they were sent. Those that are sent ahead and come too late are sent
    again: an answer here lasts for 60 ms."""
    return noting(endpoint, monkeypatch)


@pytest.fixture
def on_slow(slow: SlowEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[TextRequest]]:
    """The same, of programs that run on an engine on which nothing that is sent ahead comes too late: it stands still
    whenever the program does."""
    monkeypatch.setattr(slow.executor, "step_s", 0.01)
    with RuntimeEndpoint(slow.address) as backend:
        si.set_default_backend(backend)
        yield noting(backend, monkeypatch)
        si.set_default_backend(None)


def noting(backend: RuntimeEndpoint, monkeypatch: pytest.MonkeyPatch) -> list[TextRequest]:
    requests: list[TextRequest] = []
    begin = backend.begin

    def noted(request: TextRequest):
        requests.append(request)
        return begin(request)

    monkeypatch.setattr(backend, "begin", noted)
    return requests


def says(name: str, tokens: int = 40, **options):
    return si.gen(name, max_tokens=tokens, temperature=0, ignore_eos=True, **options)


def idle(endpoint: RuntimeEndpoint) -> bool:
    health = language_loop().run(endpoint.client.client.health())
    return health.running + health.waiting == 0


@si.function
async def fields(s, waits):
    """Answers with constant texts between them."""
    s += "A document about lamps.\n"
    for number in range(4):
        s += f"field {number}: "
        s += says(f"field {number}")
        if waits:
            await s.get(f"field {number}")


@si.function
async def tree(s, waits):
    """Forks of forks, inside a chat."""
    s += si.user("A question") + si.assistant(says("plan"))
    if waits:
        await s.get("plan")
    made = [s]
    for i, branch in enumerate(s.fork(2)):
        branch += si.user(f"branch {i}") + si.assistant(says("solution"))
        if waits:
            await branch.get("solution")
        for j, leaf in enumerate(branch.fork(2)):
            leaf += si.user(f"leaf {j}") + si.assistant(says("verdict"))
            made.append(leaf)
        made.append(branch)
    return made


def test_constant_texts_go_with_the_call_before(endpoint, begun):
    state = fields.run(False)
    assert any(request.after for request in begun)
    ahead, meta = state.text(), [state.get_meta_info(f"field {n}") for n in range(4)]
    begun.clear()
    state = fields.run(True)
    assert not any(request.after for request in begun)
    assert state.text() == ahead
    waited = [state.get_meta_info(f"field {n}") for n in range(4)]
    for name in ("prompt_tokens", "completion_tokens", "finish_reason"):
        assert [m[name] for m in meta] == [m[name] for m in waited]
    assert idle(endpoint)


def test_each_text_goes_on_from_the_call_before_it(on_slow):
    fields.run(False).text()
    assert [bool(request.after) for request in on_slow] == [False, True, True, True]
    assert len({request.after for request in on_slow}) == 4


def test_forks_go_with_the_call_before_them_as_a_group(on_slow):
    assert all(len(state.text()) > 40 for state in tree.run(False).ret_value)
    assert len(on_slow) == 7 and sum(not request.after for request in on_slow) == 1
    groups = [request.hints.group for request in on_slow if request.hints is not None and request.hints.group]
    assert len(groups) == 6 and len(set(groups)) == 3


def test_forks_that_go_with_the_call_before_them_get_the_same_answers(endpoint, begun):
    ahead = [state.text() for state in tree.run(False).ret_value]
    assert any(request.after for request in begun)
    begun.clear()
    assert [state.text() for state in tree.run(True).ret_value] == ahead
    assert not any(request.after for request in begun)
    assert idle(endpoint)


def test_a_call_goes_on_from_the_tokens_of_the_answer_before_it(endpoint):
    @si.function
    async def two(s):
        s += si.user("A question") + si.assistant(says("one", 40))
        await s.get("one")
        s += si.user("Go on") + si.assistant(says("two", 4))
        await s.get("two")

    meta = two.run().get_meta_info("two")
    shared = meta["prompt_tokens"] - len(endpoint.encode("<|end|><|user|>Go on<|end|><|assistant|>", special=False))
    assert meta["cached_tokens"] >= (shared - 1) // 16 * 16  # whatever bytes the random model wrote


def test_what_a_program_reads_or_cuts_is_not_sent_ahead(endpoint, begun):
    @si.function
    async def cut(s):
        s += "Text. " + says("one", stop="\n") + " and " + says("two", dtype=None) + si.select("three", ["a", "b"])
        s += " then " + says("four")

    cut.run()
    assert not begun[0].after and not begun[1].after  # a stop string may cut the first
    assert not begun[2].after  # which option is chosen is not known
    assert len(begun) == 3


def test_a_call_with_a_promise_is_sent_at_its_turn(endpoint, begun):
    @si.function
    async def promised(s):
        s += "Text. " + says("one") + " and " + says("two", slo=si.SLO(deadline=5.0)) + " so " + says("three")

    promised.run()
    assert [bool(request.after) for request in begun] == [False, False, True]
    begun.clear()
    fields.run(False, deadline=20.0)
    assert not any(request.after for request in begun)


def test_an_answer_that_is_cut_by_eos_is_gone_on_from(endpoint):
    @si.function
    async def program(s, waits):
        s += "Text. " + si.gen("one", max_tokens=40, temperature=1.0, top_k=200)
        if waits:
            await s.get("one")
        s += " and " + says("two")

    for _ in range(3):
        state = program.run(False)
        assert state["two"]
        assert state.text().endswith(" and " + state["two"])


def test_where_the_answer_before_fails_the_rest_is_told(endpoint):
    @si.function
    async def too_long(s):
        s += "Text. " + says("one", 100_000) + " and " + says("two")

    with pytest.warns(RuntimeWarning, match="100000"):
        state = too_long.run()
    assert isinstance(state.error(), si.InvalidRequestError)
    with pytest.raises(si.InvalidRequestError, match="100000"):
        state["two"]
    assert idle(endpoint)


def test_an_engine_that_knows_the_answer_no_more_is_sent_the_whole_prompt(endpoint, begun, monkeypatch):
    real = endpoint.begin
    fields_whole = fields.run(True).text()

    def forgotten(request):
        if request.after:
            request = TextRequest(**{**request_fields(request), "after": "somebody else"})
        return real(request)

    def request_fields(request):
        return {name: getattr(request, name) for name in TextRequest.__dataclass_fields__}

    monkeypatch.setattr(endpoint, "begin", forgotten)
    begun.clear()
    assert fields.run(False).text() == fields_whole
    assert sum(request.after == "somebody else" for request in begun) == 3


def test_a_full_engine_is_sent_each_call_at_its_turn(talking_llama, endpoint):
    config = {"kv_tokens": 4096, "max_batch_tokens": 128, "max_batch_size": 16, "max_queue": 2, "threads": 1}
    with si.Runtime(model=str(talking_llama), **config) as small:
        assert fields.run(False, backend=small).text() == fields.run(True, backend=endpoint).text()


def test_cancelling_takes_back_what_was_sent_ahead(slow, monkeypatch):
    begun = []

    @si.function
    async def long(s):
        s += "Text. " + says("one", 900) + " and " + says("two", 900)
        for i, branch in enumerate(s.fork(2)):
            branch += f"branch {i}" + says("three", 900)

    async def cancelled():
        task = asyncio.create_task(long.arun(backend=backend))
        while len(begun) < 4:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises((asyncio.CancelledError, si.RequestCancelledError)):
            await task
        async with asyncio.timeout(10):  # left alone they would take three times as long
            while not await asyncio.to_thread(idle, backend):
                await asyncio.sleep(0.01)

    with RuntimeEndpoint(slow.address) as backend:
        begin = backend.begin
        monkeypatch.setattr(backend, "begin", lambda request: begun.append(request) or begin(request))
        asyncio.run(cancelled())
        assert not backend.client.client._streams


def test_a_template_that_drops_reasoning_is_known_by_what_it_shows(endpoint):
    def drops(messages, **_):
        return "".join(f"<{m['role']}>{m['content'].rpartition('</think>')[2]}" for m in messages)

    assert not keeps_answers(drops)
    assert keeps_answers(endpoint.render_chat)


def test_with_such_a_template_each_prompt_is_made_of_its_text(endpoint, begun, monkeypatch):
    monkeypatch.setitem(endpoint.__dict__, "keeps_answers", False)
    chats = [state.text() for state in tree.run(False).ret_value]
    assert not any(request.after for request in begun)
    assert len(begun) == 7 and len(chats) == 7
    begun.clear()
    fields.run(False)  # without roles there is no template
    assert sum(bool(request.after) for request in begun) == 3
