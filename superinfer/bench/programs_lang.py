"""The programs of `superinfer bench programs`, in our language. Each returns (state, variable) of all its calls."""

from __future__ import annotations

import asyncio
from typing import Any

import superinfer as si
from superinfer.bench import program_texts as texts
from superinfer.bench.program_texts import Texts

Made = list[tuple[si.ProgramState, str]]


def _says(name: str, tokens: int) -> Any:
    return si.gen(name, max_tokens=tokens, temperature=0, ignore_eos=True)


def _ask(text: str, name: str, tokens: int) -> Any:
    return si.user(text) + si.assistant(_says(name, tokens))


@si.function
async def tree_of_thought(s: Any, t: Texts) -> Made:
    """Plans for a question, solutions of each plan, verdicts on each solution."""
    made: Made = []
    s += si.system(t.shared)
    s += si.user(t.part("question"))
    for i, plan in enumerate(s.fork(texts.FORKS)):
        plan += _ask(t.part("ask", i), "plan", t.sizes["plan"])
        made.append((plan, "plan"))
        for j, solution in enumerate(plan.fork(texts.FORKS)):
            solution += _ask(t.part("ask", (i, j)), "solution", t.sizes["solution"])
            made.append((solution, "solution"))
            for k, verdict in enumerate(solution.fork(texts.FORKS)):
                verdict += _ask(t.part("ask", (i, j, k)), "verdict", t.sizes["verdict"])
                made.append((verdict, "verdict"))
    return made


@si.function
async def react(s: Any, t: Texts) -> Made:
    """Thoughts, and what a tool found after each."""
    s += si.system(t.shared)
    s += si.user(t.part("question"))
    for turn in range(texts.TURNS):
        s += si.assistant(_says(f"thought {turn}", t.sizes["thought"]))
        await s.get(f"thought {turn}")
        await asyncio.sleep(texts.TOOL_S)
        s += si.user(t.part("observation", turn))
    s += si.assistant(_says("answer", t.sizes["answer"]))
    return [(s, f"thought {turn}") for turn in range(texts.TURNS)] + [(s, "answer")]


@si.function
async def map_reduce(s: Any, t: Texts) -> Made:
    """A note on each document, one answer from all notes."""
    s += si.system(t.shared)
    notes = s.fork(texts.DOCUMENTS)
    notes += lambda i: _ask(t.part("document", i), "note", t.sizes["note"])
    await notes.ajoin()
    s += _ask(t.part("ask") + "".join(s["note"]), "answer", t.sizes["answer"])
    return [*((note, "note") for note in notes), (s, "answer")]


@si.function
async def json_extraction(s: Any, t: Texts) -> Made:
    """The fields of an object, one by one; the program writes what stands between them."""
    s += t.shared + t.part("document") + "\n"
    for number in range(texts.FIELDS):
        s += texts.field(number)
        s += _says(f"field {number}", t.sizes["field"])
    s += '"}'
    return [(s, f"field {number}") for number in range(texts.FIELDS)]


@si.function
async def chat(s: Any, t: Texts) -> Made:
    """A person's messages, each after the answer to the one before."""
    s += si.system(t.shared)
    for number in range(texts.MESSAGES):
        s += _ask(t.part("message", number), f"answer {number}", t.sizes["answer"])
        await s.get(f"answer {number}")
    return [(s, f"answer {number}") for number in range(texts.MESSAGES)]


@si.function
async def select(s: Any, t: Texts) -> Made:
    """Questions about a document, each with a choice of answers."""
    s += t.shared + t.part("document")
    branches = s.fork(texts.QUESTIONS)
    for number, branch in enumerate(branches):
        branch += t.part("question", number)
        branch += si.select("choice", t.options(number))
    return [(branch, "choice") for branch in branches]


PROGRAMS: dict[str, si.Function] = {
    program.name: program for program in (tree_of_thought, react, map_reduce, json_extraction, chat, select)
}
