"""The page at `/` in a headless browser, and the events behind it."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest
from own_time import pass_time
from slow_engine import slow_engine

from superinfer.errors import RequestCancelledError
from superinfer.runtime.client import AsyncEngineClient, EngineClient, new_request_id
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import EngineProcess, launch_engine
from superinfer.runtime.protocol import Generate, SamplingParams
from superinfer.runtime.server import live
from superinfer.runtime.slo import SLO

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# A request is late or not, and somewhere: what must hold for all cards that are drawn at one moment.
ALL_CARDS_LIE_IN_THEIR_LANES = """() => {
  const lane = {waiting: "waiting", computing: "computing", rotated: "memory", loading: "memory"}
  return [...document.querySelectorAll(".card:not(.old)")].every(card => {
    const box = document.querySelector(`[data-lane=${lane[card.dataset.state]}] .room`).getBoundingClientRect()
    const at = card.getBoundingClientRect()
    return at.left >= box.left - 1 && at.right <= box.right + 1 && at.top >= box.top - 1 && at.bottom <= box.bottom + 1
  })
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e .[dev]")
    if CHROMIUM is None:
        pytest.skip("no browser on this machine; install Chromium, e.g. apt-get install chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """A tab in which nothing may go wrong, and from which nothing may be asked of other hosts."""
    context = browser.new_context(viewport={"width": 1280, "height": 820}, reduced_motion="reduce")
    tab = context.new_page()
    tab.set_default_timeout(60_000)
    troubles: list[str] = []
    tab.on("console", lambda message: message.type in ("error", "warning") and troubles.append(message.text))
    tab.on("pageerror", lambda error: troubles.append(str(error)))
    tab.on("request", lambda request: "//127.0.0.1:" in request.url or troubles.append(request.url))
    yield tab
    tab.wait_for_timeout(50)
    context.close()
    assert troubles == []


@pytest.fixture(scope="module")
def rotating(tiny_config: EngineConfig) -> Iterator[EngineProcess]:
    """An engine whose first tier holds one long request, so that several must take turns."""
    config = msgspec.structs.replace(tiny_config, kv_tokens=1024, dram_tokens=16384, policy="lru")
    with launch_engine(config) as process:
        yield process


def _ask(client: EngineClient, request: Generate, again: threading.Event) -> None:
    """Read an answer, and ask anew as long as `again` is set."""
    while True:
        with contextlib.suppress(RequestCancelledError):
            list(client.generate(request))
        if not again.is_set():
            return
        request = msgspec.structs.replace(request, request_id=new_request_id())


@contextlib.contextmanager
def busy(
    address: str, requests: int, tokens: int, n: int = 1, *, always: bool = False, **more: Any
) -> Iterator[list[str]]:
    """The engine has so many requests, until they have so many tokens or the context ends. Yields their ids.

    always: one that has its tokens is followed by another, however quick the engine is.
    """
    sampling = SamplingParams(max_tokens=tokens, n=n, ignore_eos=True)
    ids = [new_request_id() for _ in range(requests)]
    wanted = [Generate(request_id=id, prompt=[at + 3], sampling=sampling, **more) for at, id in enumerate(ids)]
    again = threading.Event()
    if always:
        again.set()
    with EngineClient(address) as client:
        threads = [threading.Thread(target=_ask, args=(client, request, again), daemon=True) for request in wanted]
        for thread in threads:
            thread.start()
        try:
            yield ids
        finally:
            again.clear()
            for id in ids:
                client.cancel(id)
            for thread in threads:
                thread.join(30)  # those asked anew end by themselves


def look(tab: Any, url: str) -> None:
    """Open the page."""
    tab.goto(url)


def until(tab: Any, holds: str) -> None:
    """Wait until a JavaScript expression or function gives true. (`wait_for_function` needs what the page forbids.)"""
    deadline = time.monotonic() + 60
    while not tab.evaluate(holds):
        assert time.monotonic() < deadline, holds
        tab.wait_for_timeout(50)


def counted(lane: str) -> str:
    """The JavaScript of how many requests a lane says that it has."""
    return f"Number(document.querySelector('[data-lane={lane}] .count').textContent.replaceAll(',', ''))"


# ---------------------------------------------------------------------------- lanes


# Every change of a card's state that is ever drawn: a moment's look at the page may miss that it was there.
NOTE_MOVES = """() => {
  const lane = {waiting: "waiting", computing: "computing", rotated: "memory", loading: "memory"}
  window.moves = new Set()
  new MutationObserver(changes => {
    for (const {target, oldValue} of changes) {
      if (oldValue && lane[oldValue] !== lane[target.dataset.state]) {
        window.moves.add(`${lane[oldValue]} to ${lane[target.dataset.state]}`)
      }
    }
  }).observe(document.querySelector("#cards"), {
    subtree: true, attributes: true, attributeFilter: ["data-state"], attributeOldValue: true,
  })
}"""


def test_a_request_is_a_card_that_moves_with_its_kv_cache(tab: Any, rotating: EngineProcess, serving: Any) -> None:
    with serving(rotating.address) as server:
        look(tab, server.url)
        tab.wait_for_selector("#stage.idle #empty:visible")
        tab.evaluate(NOTE_MOVES)
        with busy(rotating.address, 6, 900, always=True, slo=SLO(ttft=60, tbt=0.001), slo_class="eager"):
            # Six of 900 tokens take turns in a first tier of 1,024: at any pace each way is gone sooner or later.
            until(tab, "window.moves.has('computing to memory') && window.moves.has('memory to computing')")
            until(tab, "document.querySelectorAll('.card[data-state=rotated], .card[data-state=loading]').length > 0")
            until(tab, ALL_CARDS_LIE_IN_THEIR_LANES)
            until(tab, "[...document.querySelectorAll('.card')].some(card => card.title.includes('eager'))")
            until(tab, "parseFloat(document.querySelector('#link-in').textContent) > 0")
            until(tab, "parseFloat(document.querySelector('#link-out').textContent) > 0")
            until(tab, "+document.querySelector('[data-lane=memory] .meter').getAttribute('aria-valuenow') > 0")
            until(tab, "parseFloat(document.querySelector('#output-rate').textContent) > 0")
        tab.wait_for_selector("#stage.idle")
        tab.goto("about:blank")  # before the server ends


def test_late_requests_stand_out_and_kept_promises_are_counted_by_class(
    tab: Any, rotating: EngineProcess, serving: Any
) -> None:
    with serving(rotating.address) as server:
        with busy(rotating.address, 2, 900, always=True, slo=SLO(ttft=1e-6, tbt=1e-6), slo_class="hopeless"):
            look(tab, server.url)
            tab.wait_for_selector(".card.late .slack:has-text('−')")
        with EngineClient(rotating.address) as client:
            sampling = SamplingParams(max_tokens=2, ignore_eos=True)
            for slo, name in ((SLO(ttft=60), "easy"), (SLO(ttft=1e-6), "hopeless")):
                list(client.generate(Generate(request_id=name, prompt=[5], sampling=sampling, slo=slo, slo_class=name)))
        tab.wait_for_selector("#classes li:has-text('easy'):has-text('100 % of 1')")
        kept_none = "/hopeless/.test(li.textContent) && /(^|\\D)0 % of/.test(li.textContent)"
        until(tab, f"[...document.querySelectorAll('#classes li')].some(li => {kept_none})")
        tab.goto("about:blank")  # before the server ends


def test_a_thousand_requests_are_counted_and_some_of_them_drawn(tab: Any, tiny_checkpoint: Path, serving: Any) -> None:
    with slow_engine(tiny_checkpoint, num_slots=64, max_queue=1000) as engine, serving(engine.address) as server:
        look(tab, server.url)
        with busy(engine.address, 8, 1000, n=125):
            until(tab, f"{counted('waiting')} + {counted('computing')} === 1000")
            until(tab, "document.querySelectorAll('.card:not(.old)').length > 100")
            tab.wait_for_selector("[data-lane=waiting] .undrawn:has-text('not drawn')")
            assert tab.locator(".card:not(.old)").count() <= live.MAX_REQUESTS
            until(tab, ALL_CARDS_LIE_IN_THEIR_LANES)
            before = tab.locator("#output-rate").inner_text()
            until(tab, f"document.querySelector('#output-rate').textContent !== '{before}'")
        tab.goto("about:blank")  # before the server ends


# ---------------------------------------------------------------------------- chat


def set_promise(tab: Any, **steps: int) -> None:
    for name, step in steps.items():
        tab.locator(f"#{name}").fill(str(step))


def test_the_chat_streams_an_answer_and_says_that_the_promise_was_kept(tab: Any, served: Any) -> None:
    look(tab, served.url)
    tab.wait_for_selector("#status[data-state=live]")
    set_promise(tab, ttft=12, tbt=0, deadline=9)
    assert tab.locator("output[for=tbt]").inner_text() == "no promise"
    tab.locator("#prompt").fill("hello")
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".verdict.met b:has-text('Kept')")
    assert tab.locator(".mine").inner_text() == "hello" and tab.locator(".theirs p").inner_text()
    assert "first token" in tab.locator(".verdict").inner_text()
    assert "0 of them after they were due" in tab.locator(".ticks").get_attribute("aria-label")


def test_the_chat_says_that_a_promise_was_missed_and_why(tab: Any, tiny_checkpoint: Path, serving: Any) -> None:
    # Steps of 100 ms break a promise of 50 ms and 10 ms on any machine; the context ends the answer.
    with slow_engine(tiny_checkpoint, step_s=0.1, context=32) as engine, serving(engine.address) as server:
        look(tab, server.url)
        tab.wait_for_selector("#status[data-state=live]")
        set_promise(tab, ttft=1, tbt=1, deadline=0)
        tab.locator("#prompt").fill("hello")
        tab.locator("#send").click()
        tab.wait_for_selector(".verdict.missed b:has-text('Missed')")
        assert "most of it: decode" in tab.locator(".verdict").inner_text()
        assert ", 0 of them after" not in tab.locator(".ticks").get_attribute("aria-label")
        tab.goto("about:blank")  # before the server ends


def test_an_answer_can_be_stopped(tab: Any, rotating: EngineProcess, serving: Any) -> None:
    with serving(rotating.address) as server, busy(rotating.address, 4, 900, always=True):
        look(tab, server.url)
        tab.wait_for_selector("#status[data-state=live]")
        tab.locator("#prompt").fill("hello")
        tab.locator("#send").click()
        tab.locator("#send:has-text('Stop')").click()
        tab.wait_for_selector(".verdict:has-text('Stopped.')")
        assert tab.locator("#send").inner_text() == "Send"
        tab.goto("about:blank")


# ---------------------------------------------------------------------------- what may go wrong


def test_a_key_that_the_server_asks_for_is_sent_and_kept_in_the_tab(browser: Any, served: Any) -> None:
    tab = browser.new_page()

    def guarded(route: Any) -> None:
        if route.request.headers.get("authorization") == "Bearer sesame":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "no key"}})

    tab.route("**/v1/live", guarded)
    look(tab, served.url)
    tab.wait_for_selector("#status[data-state=key]")
    tab.locator("#key").fill("sesame")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#status[data-state=live]")
    tab.reload()
    tab.wait_for_selector("#status[data-state=live]")
    assert tab.evaluate("localStorage.length") == 0 and tab.evaluate("document.cookie") == ""
    tab.close()


def test_everything_is_reached_with_the_tab_key(tab: Any, served: Any) -> None:
    look(tab, served.url)
    tab.wait_for_selector("#status[data-state=live]")
    reached = set()
    for _ in range(8):
        tab.keyboard.press("Tab")
        reached.add(tab.evaluate("document.activeElement.id"))
    assert {"key-toggle", "ttft", "tbt", "deadline", "talk", "prompt", "send"} <= reached


def test_the_page_fits_a_phone_and_does_not_jump(tab: Any, tiny_engine: EngineProcess, served: Any) -> None:
    where = (
        "[...document.querySelectorAll('.lane, article, aside')].map(e => JSON.stringify(e.getBoundingClientRect()))"
    )
    for width in (390, 900, 1280):
        tab.set_viewport_size({"width": width, "height": 820})
        look(tab, served.url)
        tab.wait_for_selector("#status[data-state=live]")  # what is served is named: from now on nothing may move
        before = tab.evaluate(where)
        with busy(tiny_engine.address, 3, 1900, always=True):
            tab.wait_for_selector(".card")
            assert tab.evaluate(where) == before
        assert tab.evaluate("document.documentElement.scrollWidth") <= width


# ---------------------------------------------------------------------------- /v1/live


def test_many_viewers_cost_the_engine_no_more_than_one_and_none_cost_nothing(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    real = AsyncEngineClient.live

    async def counted(self: AsyncEngineClient, *arguments: Any) -> Any:
        asked.append(time.monotonic())
        return await real(self, *arguments)

    monkeypatch.setattr(AsyncEngineClient, "live", counted)
    with contextlib.ExitStack() as stack:
        viewers = [stack.enter_context(httpx.stream("GET", f"{served.url}/v1/live", timeout=60)) for _ in range(10)]
        lines = [viewer.iter_lines() for viewer in viewers]
        for _ in range(4):
            for viewer in lines:
                event = next(line for line in viewer if line)
                assert msgspec.json.decode(event.removeprefix("data: "))["model"] == "tiny"
    assert len(asked) >= 3 and all(b - a > 0.9 * live.INTERVAL_S for a, b in itertools.pairwise(asked))
    deadline, before = time.monotonic() + 30, -1
    while len(asked) != before:  # until nobody has asked for three intervals
        assert time.monotonic() < deadline, "the engine is asked though nobody looks"
        before = len(asked)
        pass_time(3 * live.INTERVAL_S)


def test_a_viewer_too_many_is_refused(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MAX_VIEWERS", 1)
    url = f"{served.url}/v1/live"
    with httpx.stream("GET", url, timeout=60) as viewer:
        lines = viewer.iter_lines()
        assert next(lines).startswith("data: ")
        refused = httpx.get(url)
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "too_many_viewers"
        assert refused.headers["retry-after"] == "1"


def test_a_dead_engine_is_shown_and_asked_for_again(tab: Any, tiny_config: EngineConfig, serving: Any) -> None:
    with launch_engine(tiny_config) as doomed, serving(doomed.address) as server:
        look(tab, server.url)
        tab.wait_for_selector("#status[data-state=live]")
        psutil.Process(doomed.pid).kill()
        tab.wait_for_selector("#status[data-state=dead]:has-text('the engine is dead')")
        with tab.expect_request("**/v1/live"):
            pass
        tab.goto("about:blank")
