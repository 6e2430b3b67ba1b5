"""The programs of `superinfer bench programs`, as one writes them with the `openai` client: the same calls with the
same prompts, concurrent where they do not wait for each other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from superinfer.bench import program_texts as texts
from superinfer.bench.program_texts import Texts, Tokens

if TYPE_CHECKING:
    from openai import AsyncOpenAI

Messages = list[dict[str, Any]]
SELECT_BY = ("scores", "choice")


class Caller:
    """Makes calls, and counts tokens by what the server says it used.

    select_by: "scores" sends all options of a question behind its prompt in one request with `echo`, and takes the one
    of the highest mean log probability, as our `select` does. "choice" has the server write one of them, constrained
    (`structured_outputs`), which reads less and weighs the options otherwise: token by token.
    """

    def __init__(self, client: AsyncOpenAI, model: str, select_by: str = "scores") -> None:
        self._client, self._model, self._select_by = client, model, select_by

    async def chat(self, used: Tokens, messages: Messages, tokens: int) -> str:
        """The assistant's next message, of exactly so many tokens."""
        said: Any = messages
        answer = await self._client.chat.completions.create(model=self._model, messages=said, **_exactly(tokens))
        self._count(used, answer.usage)
        return answer.choices[0].message.content or ""

    async def complete(self, used: Tokens, prompt: str, tokens: int) -> str:
        """The text's next tokens, exactly so many."""
        answer = await self._client.completions.create(model=self._model, prompt=prompt, **_exactly(tokens))
        self._count(used, answer.usage)
        return answer.choices[0].text

    async def select(self, used: Tokens, prompt: str, options: list[str]) -> str:
        """One of the options."""
        if self._select_by == "choice":
            answer = await self._client.completions.create(
                model=self._model,
                prompt=prompt,
                temperature=0,
                max_tokens=64,
                extra_body={"structured_outputs": {"choice": options}},
            )
            self._count(used, answer.usage, generated=False)
            return answer.choices[0].text
        answer = await self._client.completions.create(
            model=self._model,
            prompt=[prompt + option for option in options],
            temperature=0,
            max_tokens=0,
            echo=True,
            logprobs=0,
        )
        self._count(used, answer.usage, generated=False)
        means = [_mean_from(choice.logprobs, len(prompt)) for choice in answer.choices]
        best = max(range(len(options)), key=means.__getitem__)
        return options[answer.choices[best].index]

    @staticmethod
    def _count(used: Tokens, usage: Any, generated: bool = True) -> None:
        details = getattr(usage, "prompt_tokens_details", None)
        used.calls += 1
        used.prompt += usage.prompt_tokens
        used.cached += (getattr(details, "cached_tokens", None) or 0) if details else 0
        used.output += usage.completion_tokens if generated else 0


def _exactly(tokens: int) -> dict[str, Any]:
    return {"max_tokens": tokens, "temperature": 0, "extra_body": {"ignore_eos": True, "min_tokens": tokens}}


def _mean_from(logprobs: Any, start: int) -> float:
    """Of the tokens that begin at or after character `start`."""
    found = [
        value
        for value, offset in zip(logprobs.token_logprobs, logprobs.text_offset, strict=True)
        if offset >= start and value is not None
    ]
    return sum(found) / len(found)


async def tree_of_thought(caller: Caller, used: Tokens, t: Texts) -> None:
    """See programs_lang."""

    async def grow(messages: Messages, path: tuple[int, ...]) -> None:
        if len(path) == 3:
            return
        size = ("plan", "solution", "verdict")[len(path)]

        async def branch(i: int) -> None:
            key = (*path, i) if path else i
            asked = [*messages, _user(t.part("ask", key))]
            said = await caller.chat(used, asked, t.sizes[size])
            await grow([*asked, _assistant(said)], (*path, i))

        await asyncio.gather(*map(branch, range(texts.FORKS)))

    await grow([_system(t.shared), _user(t.part("question"))], ())


async def react(caller: Caller, used: Tokens, t: Texts) -> None:
    """See programs_lang."""
    messages = [_system(t.shared), _user(t.part("question"))]
    for turn in range(texts.TURNS):
        messages.append(_assistant(await caller.chat(used, messages, t.sizes["thought"])))
        await asyncio.sleep(texts.TOOL_S)
        messages.append(_user(t.part("observation", turn)))
    await caller.chat(used, messages, t.sizes["answer"])


async def map_reduce(caller: Caller, used: Tokens, t: Texts) -> None:
    """See programs_lang."""

    async def note(i: int) -> str:
        return await caller.chat(used, [_system(t.shared), _user(t.part("document", i))], t.sizes["note"])

    notes = await asyncio.gather(*map(note, range(texts.DOCUMENTS)))
    messages = [_system(t.shared), _user(t.part("ask") + "".join(notes))]
    await caller.chat(used, messages, t.sizes["answer"])


async def json_extraction(caller: Caller, used: Tokens, t: Texts) -> None:
    """See programs_lang."""
    prompt = t.shared + t.part("document") + "\n"
    for number in range(texts.FIELDS):
        prompt += texts.field(number)
        prompt += await caller.complete(used, prompt, t.sizes["field"])


async def chat(caller: Caller, used: Tokens, t: Texts) -> None:
    """See programs_lang."""
    messages = [_system(t.shared)]
    for number in range(texts.MESSAGES):
        messages.append(_user(t.part("message", number)))
        messages.append(_assistant(await caller.chat(used, messages, t.sizes["answer"])))


async def select(caller: Caller, used: Tokens, t: Texts) -> None:
    """See programs_lang."""
    document = t.shared + t.part("document")

    async def choose(number: int) -> None:
        await caller.select(used, document + t.part("question", number), t.options(number))

    await asyncio.gather(*map(choose, range(texts.QUESTIONS)))


def _system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


PROGRAMS: dict[str, Callable[[Caller, Tokens, Texts], Awaitable[None]]] = {
    program.__name__: program for program in (tree_of_thought, react, map_reduce, json_extraction, chat, select)
}
