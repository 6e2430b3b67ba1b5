"""Runs the programs of `superinfer bench programs` on each arm, taking turns, and takes the time."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from superinfer.bench.program_texts import (
    OPTIONS,
    PLAIN,
    SAMPLE,
    SHAPES,
    SIZES,
    Sizes,
    Texts,
    Tokens,
    Weights,
    field,
    sample,
    scaled,
)
from superinfer.errors import EngineUnavailableError, InvalidRequestError, SuperinferError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

WARM_UP = 2  # programs of each shape, before anything is timed


@dataclass(frozen=True)
class Plan:
    """What is measured. at_once: programs of a shape that run together. limit: seconds for them."""

    shapes: tuple[str, ...]
    at_once: tuple[int, ...]
    rounds: int
    sizes: dict[str, Sizes]
    seed: int
    limit: float

    @classmethod
    def of(cls, shapes: str, at_once: Sequence[int], rounds: int, scale: float, seed: int, limit: float) -> Plan:
        """Raises InvalidRequestError, naming what is wrong."""
        chosen = tuple(part.strip() for part in shapes.split(",") if part.strip())
        for shape in chosen:
            if shape not in SHAPES:
                raise InvalidRequestError(f"--shapes {shape!r} is not one of {', '.join(SHAPES)}")
        if not chosen or rounds < 1 or scale <= 0 or limit <= 0:
            raise InvalidRequestError(
                f"shapes={shapes!r}, rounds={rounds}, scale={scale} and limit={limit}: none may be empty or 0"
            )
        return cls(chosen, tuple(at_once), rounds, {name: scaled(SIZES[name], scale) for name in chosen}, seed, limit)

    def scaled(self, scale: float) -> Plan:
        """With lengths of that scale."""
        return replace(self, sizes={name: scaled(SIZES[name], scale) for name in self.shapes})

    def texts(self, shape: str, count: int, round_: int) -> list[Texts]:
        """The programs of one batch. Those of another round have other texts, so that no cache holds them."""
        return [Texts(shape, self.sizes[shape], f"{self.seed} {count} {round_} {at}") for at in range(count)]


class Arm(ABC):
    """One way to run the programs. name: "ours", "engine" (ours again, without HTTP) or "peer". what: to be recorded of
    it."""

    name: str
    what: dict[str, Any]

    @abstractmethod
    async def begin(self) -> None:
        """Before the first program."""

    @abstractmethod
    async def run(self, texts: Texts) -> Tokens:
        """One program, to its end. Raises what makes it fail."""

    async def counts(self) -> dict[str, int]:
        """What its engine has done since it began, where that is told: steps, and tokens that it prefilled."""
        return {}

    def refused(self, error: BaseException) -> bool:
        """Whether a program failed as a request was not taken as it was."""
        return isinstance(error, InvalidRequestError)

    async def end(self) -> None:  # noqa: B027  (not all hold something)
        """After the last."""


class OurArm(Arm):
    """The language, on an engine or a server of ours."""

    def __init__(self, backend: Any, at: str, name: str = "ours") -> None:
        from superinfer.lang.backend import TextBackend

        self.name = name
        self._backend = backend
        self.what = {"at": at, "door": "zmq" if isinstance(backend, TextBackend) else "http"}
        if isinstance(backend, TextBackend):
            from superinfer.bench.engine import info_of

            self.what |= {"engine": info_of(backend.info)}

    @property
    def context(self) -> int:
        """Of the engine, in tokens; a server tells none."""
        return int(self._backend.info.max_model_len)

    def weights(self, shapes: Sequence[str]) -> Weights:
        """By the engine's tokenizer; a server has none here."""

        def count(text: str) -> int:
            return len(self._backend.encode(text, special=False))

        message = 0
        if set(shapes) - set(PLAIN):  # else the model need have no chat template
            roles = ("system", "user", "assistant")
            chat = [{"role": role, "content": "x"} for role in roles]
            message = math.ceil(count(self._backend.render_chat(chat, add_generation_prompt=False)) / len(roles))
        return Weights(count(sample()) / SAMPLE, message, count(field(1)))

    async def begin(self) -> None:
        # Should both arms be served by one engine, neither is to find the other's prompts in its cache.
        self._backend.flush_cache()

    async def counts(self) -> dict[str, int]:
        if self.what["door"] != "zmq":
            return {}
        from superinfer.lang.loop import language_loop

        stats = await asyncio.wrap_future(language_loop().submit(self._backend.client.client.stats()))
        return {"steps": stats.steps, "prefill": stats.prefill_tokens}

    async def run(self, texts: Texts) -> Tokens:
        from superinfer.bench.programs_lang import PROGRAMS

        state = await PROGRAMS[texts.shape].arun(texts, backend=self._backend)
        used = Tokens()
        for made, name in state.ret_value:
            meta = made.get_meta_info(name)
            prompts = OPTIONS if meta["finish_reason"] == "scored" else 1
            used += Tokens(1, meta["prompt_tokens"] * prompts, meta["cached_tokens"], meta["completion_tokens"])
        return used


class OpenAIArm(Arm):
    """The `openai` client, on any server."""

    name = "peer"

    def __init__(self, url: str, model: str, select_by: str) -> None:
        from superinfer.bench.programs_openai import SELECT_BY

        if select_by not in SELECT_BY:
            raise InvalidRequestError(f"--select-by {select_by!r} must be one of {', '.join(SELECT_BY)}")
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._model, self._select_by = model, select_by
        self._client: AsyncOpenAI | None = None
        self.what = {"at": url, "door": "http", "select_by": select_by}

    async def begin(self) -> None:
        import openai

        from superinfer.bench.programs_openai import Caller

        # With the client's own two retries: servers close a connection that was idle for seconds, as between two turns,
        # and a request may be on its way to it just then.
        self._client = openai.AsyncOpenAI(base_url=self._base, api_key="none", timeout=600.0)
        try:
            cards = (await self._client.models.list()).data
        except openai.OpenAIError as error:
            raise EngineUnavailableError(f"no OpenAI server answers at {self._base}: {error}") from None
        served = [card.id for card in cards]
        model = self._model or served[0]
        if model not in served:
            raise InvalidRequestError(f"model {model!r} is not served at {self._base}; it has {', '.join(served)}")
        self.what |= {"model": model, "owned_by": next(card.owned_by for card in cards if card.id == model)}
        self._caller = Caller(self._client, model, self._select_by)

    async def run(self, texts: Texts) -> Tokens:
        from superinfer.bench.programs_openai import PROGRAMS

        used = Tokens()
        await PROGRAMS[texts.shape](self._caller, used, texts)
        return used

    def refused(self, error: BaseException) -> bool:
        import openai

        return isinstance(error, openai.BadRequestError)

    async def end(self) -> None:
        if self._client is not None:
            await self._client.close()


async def measure(arms: Sequence[Arm], plan: Plan) -> dict[str, Any]:
    """All shapes on all arms, in turns: which arm goes first changes from round to round. Raises SuperinferError."""
    runs: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = {arm.name: {} for arm in arms}
    async with contextlib.AsyncExitStack() as stack:
        for arm in arms:
            stack.push_async_callback(arm.end)
            await arm.begin()
        for arm in arms:
            for shape in plan.shapes:
                await _batch(arm, [Texts(shape, plan.sizes[shape], f"warm {at}") for at in range(WARM_UP)], plan.limit)
        for round_, shape, count in itertools.product(range(plan.rounds), plan.shapes, plan.at_once):
            for arm in arms if round_ % 2 == 0 else arms[::-1]:
                one = await _batch(arm, plan.texts(shape, count, round_), plan.limit)
                runs[arm.name].setdefault(shape, {}).setdefault(str(count), []).append(one)
                said = f"round {round_ + 1}: {shape}, {count} at once, {arm.name}: {one['seconds']:.2f} s"
                print(said, file=sys.stderr, flush=True)
    return {
        "settings": {**asdict(plan), "arms": [arm.name for arm in arms]},
        "arms": {arm.name: {**arm.what, "runs": runs[arm.name]} for arm in arms},
    }


async def _batch(arm: Arm, texts: Sequence[Texts], limit: float) -> dict[str, Any]:
    """Start these programs at once and wait for all. seconds: from the first's start to the last's end; programs_s: of
    each. Tokens are their sums; steps and prefilled tokens are the engine's, where it tells."""
    used, programs_s = Tokens(), []

    async def one(text: Texts) -> None:
        nonlocal used
        used += await arm.run(text)
        programs_s.append(time.perf_counter() - started)

    before = await arm.counts()
    started = time.perf_counter()
    what = f"{arm.name}: {len(texts)} programs of {texts[0].shape}"
    try:
        async with asyncio.timeout(limit), asyncio.TaskGroup() as group:
            for text in texts:
                group.create_task(one(text))
    except TimeoutError:
        raise SuperinferError(f"{what} took over {limit:.0f} s; raise --limit or lower --scale") from None
    except ExceptionGroup as failed:
        first = _first(failed)
        hint = "; where prompts are too long for the model, give a lower --scale" if arm.refused(first) else ""
        raise SuperinferError(f"{what} failed: {first!r}{hint}") from failed
    seconds, after = time.perf_counter() - started, await arm.counts()
    return {
        "seconds": seconds,
        "programs_s": programs_s,
        **asdict(used),
        **{name: after[name] - before[name] for name in before},
    }


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
