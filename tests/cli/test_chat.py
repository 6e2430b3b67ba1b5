"""`superinfer chat` through pipes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from command_line import starting

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", params=["engine", "url", "url without a path"])
def partner(request: pytest.FixtureRequest, tiny_engine: Any) -> Iterator[tuple[str, str]]:
    """The options that name who answers."""
    if request.param == "engine":
        yield "--engine", tiny_engine.address
        return
    with starting() as start:
        server = start("serve", "--port", "0", "--engine", tiny_engine.address)
        url = server.line("serving at").split()[2]
        yield "--url", url if request.param == "url" else url.removesuffix("/v1")


def test_each_line_gets_an_answer_and_its_timing(run: Run, partner: tuple[str, str]) -> None:
    status, out, err = run("chat", *partner, "--max-tokens", "20", stdin="hello\n\nand then?\n")
    assert status == 0
    assert len(out) > 20
    assert err.count("first token after") == 2 and "tok/s" in err


def test_quit_ends_before_further_lines(run: Run, partner: tuple[str, str]) -> None:
    status, out, err = run("chat", *partner, stdin="/quit\nhello\n")
    assert (status, out, err) == (0, "", "")


def test_a_conversation_grows_until_reset(run: Run, tiny_engine: Any) -> None:
    long = "x" * 800 + "\n"  # a token of this model is a character, and its context holds 2048
    arguments = ("chat", "--engine", tiny_engine.address, "--max-tokens", "5")
    assert run(*arguments, stdin=long + long)[0] == 0
    status, _, err = run(*arguments, stdin=long * 3)
    assert status == 1 and "/reset" in err and "2048" in err
    assert run(*arguments, stdin=long + long + "/reset\n" + long)[0] == 0


def test_the_system_prompt_is_part_of_the_conversation(run: Run, tiny_engine: Any) -> None:
    status, _, err = run("chat", "--engine", tiny_engine.address, "--system", "x" * 3000, stdin="hello\n")
    assert status == 1 and "tokens" in err
