"""The page at `/`, in a real browser without a network beyond the server."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from superinfer.runtime.client import EngineClient
from superinfer.runtime.launch import EngineProcess
from superinfer.runtime.protocol import GetLive

LONG: dict[str, Any] = {
    "model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1900, "ignore_eos": True,
    "slo": {"deadline_ms": 60_000},
}  # fmt: skip


def test_the_page_loads_nothing_from_elsewhere(http: httpx.Client) -> None:
    for path in ("/", "/page.css", "/page.js"):
        answer = http.get(path)
        assert answer.status_code == 200 and "default-src 'none'" in answer.headers["content-security-policy"]
        assert "http://" not in answer.text and "https://" not in answer.text


def test_live_events_tell_of_each_running_request(served: Any, http: httpx.Client) -> None:
    with http.stream("POST", "/v1/chat/completions", json=LONG | {"n": 3, "stream": True}) as running:
        kept = running.iter_bytes()
        next(kept)
        with served.http() as other, other.stream("GET", "/v1/live") as live:
            line = next(line for line in live.iter_lines() if line.startswith("data: "))
    now = json.loads(line.removeprefix("data: "))
    assert now["unfinished"] == 3 and [s["state"] for s in now["sequences"]] == ["gpu"] * 3
    assert all(s["prompt_tokens"] > 5 and 0 < s["slack_s"] <= 60 for s in now["sequences"])


def test_a_live_report_is_cut_at_its_limit(tiny_engine: EngineProcess, http: httpx.Client) -> None:
    assert GetLive().limit == 256
    with http.stream("POST", "/v1/chat/completions", json=LONG | {"n": 5, "stream": True}) as running:
        kept = running.iter_bytes()
        next(kept)
        with EngineClient(tiny_engine.address) as client:
            report = client._loop.run(client._client.live(limit=2))
    assert report.unfinished == 5 and len(report.sequences) == 2


@pytest.fixture
def page(served: Any) -> Iterator[Any]:
    """The page in headless Chromium, and what its console said."""
    playwright = pytest.importorskip("playwright.sync_api")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium on this machine")

    def drive(act: Callable[[Any], None]) -> list[str]:
        said: list[str] = []
        with playwright.sync_playwright() as driver:
            chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            tab = chromium.new_page()
            tab.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.goto(f"{served.url}/")
            act(tab)
            chromium.close()
        return said

    yield drive


def test_requests_show_as_lanes_and_a_chat_reports_its_promise(page: Any, http: httpx.Client) -> None:
    expect = pytest.importorskip("playwright.sync_api").expect
    expect.set_options(timeout=20_000)

    def act(tab: Any) -> None:
        expect(tab.locator("#link-state")).to_have_text("live")
        expect(tab.locator("#model")).to_have_text("tiny")
        background = threading.Thread(target=lambda: http.post("/v1/chat/completions", json=LONG | {"n": 4}))
        background.start()
        expect(tab.locator(".lane:not(.gone) .pill.gpu")).to_have_count(4)
        assert "s left" in tab.locator(".pill.gpu").first.text_content()
        tab.fill("#text", "hello")
        tab.press("#text", "Enter")
        expect(tab.locator(".verdict")).to_contain_text("first token")
        assert tab.text_content(".said.assistant")
        background.join()
        expect(tab.locator(".lane:not(.gone)")).to_have_count(0)
        expect(tab.locator(".class").first).to_contain_text("%")

    assert page(act) == []
