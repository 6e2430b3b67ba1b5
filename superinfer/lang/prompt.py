"""The transcript of a state: raw text and chat messages in order, and the prompt text they make.

Messages are rendered by the model's own chat template. An answer is written straight after the template's generation
prompt, so that what the model reads before its next token is what it wrote, to the character.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from superinfer.errors import InvalidRequestError

_SAID = "one <think>two</think> three"  # an answer as models write it that reason first
_MARK = "\x02here\x03"  # stands for a message's content while its place in the template is looked for


class RenderChat(Protocol):
    """The part of Backend that a transcript needs."""

    def __call__(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str: ...


def keeps_answers(render: RenderChat) -> bool:
    """Whether a chat template shows earlier answers as they were written. One for models that reason may not."""
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": _SAID},
        {"role": "user", "content": "q"},
    ]
    try:
        return _SAID in render(messages)
    except InvalidRequestError:
        return True  # it takes no chats at all


class Part(NamedTuple):
    """A message, or raw text where `role` is None."""

    role: str | None
    content: str


@dataclass(frozen=True)
class Chat:
    """A prompt before any template, for services that take messages.

    messages: the closed ones. role, begun: of the open one and its text so far. plain: the whole text, where there
    are no roles at all. mixed: text stands between messages too.
    """

    messages: tuple[dict[str, Any], ...] = ()
    role: str | None = None
    begun: str = ""
    plain: str | None = None
    mixed: bool = False
    tools: tuple[dict[str, Any], ...] = ()


NO_CHAT = Chat()


@dataclass(frozen=True)
class Prompt:
    """What the model is given. `add_special`: whether the tokenizer adds its BOS; a chat template brings its own."""

    text: str
    add_special: bool
    chat: Chat = NO_CHAT


NO_PROMPT = Prompt("", add_special=False)


class Transcript:
    """All that was said in one state. The last part is open where `role` is not None."""

    def __init__(self, render: RenderChat) -> None:
        self._render = render
        self._parts: list[Part] = []
        self.tools: tuple[dict[str, Any], ...] = ()
        self.role: str | None = None

    def copy(self, render: RenderChat | None = None) -> Transcript:
        """Equal and independent; shown by `render` where one is given."""
        twin = Transcript(render or self._render)
        twin._parts, twin.tools, twin.role = list(self._parts), self.tools, self.role
        return twin

    def add(self, text: str) -> None:
        """Append text: to the open message, else as raw text."""
        if not text:
            return
        if self._parts and self._parts[-1].role == self.role:
            self._parts[-1] = Part(self.role, self._parts[-1].content + text)
        else:
            self._parts.append(Part(None, text))

    @property
    def is_plain(self) -> bool:
        """Whether nothing stands in a role."""
        return all(part.role is None for part in self._parts)

    def begin(self, role: str) -> None:
        """Open a message. Raises InvalidRequestError within an open one."""
        if self.role is not None:
            raise InvalidRequestError(f"role {role!r} begins inside role {self.role!r}; end that message first")
        self.role = role
        self._parts.append(Part(role, ""))

    def end(self, role: str) -> None:
        """Close the open message. Raises InvalidRequestError if that is not of `role`."""
        if self.role != role:
            raise InvalidRequestError(f"role {role!r} ends, but the open one is {self.role!r}")
        self.role = None

    def messages(self) -> list[dict[str, Any]]:
        """The closed messages, OpenAI style."""
        return [{"role": role, "content": content} for role, content in self._closed() if role is not None]

    def _closed(self) -> list[Part]:
        return self._parts if self.role is None else self._parts[:-1]

    def text(self) -> str:
        """The whole prompt text. Raises InvalidRequestError where the chat template refuses."""
        messages = self.messages()
        chat = self._chat(messages)
        pieces, at, seen = [], 0, 0
        for part in self._closed():
            if part.role is not None:
                seen += 1
                continue
            cut = len(chat) if seen == len(messages) and self.role is None else self._place(messages[:seen], chat)
            pieces += [chat[at:cut], part.content]
            at = cut
        pieces.append(chat[at:])
        if self.role is not None:
            pieces.append(self._parts[-1].content)
        return "".join(pieces)

    def prompt(self, *, messages: bool = False) -> Prompt:
        """What to generate from; with `messages`, also as a Chat. Raises like `text`."""
        special = not self._parts or self._parts[0].role is None
        return Prompt(self.text(), special, self.chat() if messages else NO_CHAT)

    def chat(self) -> Chat:
        """All that was said, as messages where there are any."""
        raw = any(part.role is None and part.content for part in self._parts)
        if all(part.role is None for part in self._parts):
            return Chat(plain="".join(part.content for part in self._parts), tools=self.tools)
        begun = self._parts[-1].content if self.role is not None else ""
        return Chat(tuple(self.messages()), self.role, begun, mixed=raw, tools=self.tools)

    def _chat(self, messages: list[dict[str, Any]]) -> str:
        """The messages' text, up to where the content of the open one begins."""
        if self.role == "assistant" and messages:
            return self._render(messages, tools=self.tools, add_generation_prompt=True)
        if self.role is not None:  # an answer before any message too: templates take no chat without one
            marked = [*messages, {"role": self.role, "content": _MARK}]
            whole = self._render(marked, tools=self.tools, add_generation_prompt=False)
            if _MARK not in whole:
                raise InvalidRequestError(f"the chat template of this model shows no messages of role {self.role!r}")
            return whole[: whole.rindex(_MARK)]
        return self._render(messages, tools=self.tools, add_generation_prompt=False) if messages else ""

    def _place(self, before: list[dict[str, Any]], chat: str) -> int:
        """Where in `chat` the messages `before` end."""
        head = self._render(before, tools=self.tools, add_generation_prompt=False) if before else ""
        if not chat.startswith(head):
            raise InvalidRequestError(
                "raw text stands between messages, but this model's chat template rewrites earlier messages; "
                "put the text inside a role"
            )
        return len(head)

    def until(self, mark: str, render: RenderChat) -> Transcript | None:
        """The beginning of this transcript, up to the first `mark` in it, for `render` to show. None: it is empty."""
        head = Transcript(render)
        head.tools = self.tools
        for part in self._parts:
            before, found, _ = part.content.partition(mark)
            if part.role == "assistant" and found:
                break  # an answer's beginning is written behind the template's prompt for one: left to the run itself
            head._parts.append(Part(part.role, before))
            if found:
                head.role = part.role
                break
        return head if any(part.content for part in head._parts) else None

    def mark(self) -> tuple[int, int]:
        """This moment, for `since`."""
        return len(self._parts), len(self._parts[-1].content) if self._parts else 0

    def since(self, mark: tuple[int, int]) -> tuple[str, list[Part]]:
        """What came after `mark`: the rest of the part that was last then, and the parts after it."""
        count, length = mark
        rest = self._parts[count - 1].content[length:] if count else ""
        return rest, self._parts[count:]

    def append(self, other: Transcript, mark: tuple[int, int]) -> None:
        """Append what `other` said since `mark`. Raises InvalidRequestError where one has a message open that the
        other has not."""
        rest, parts = other.since(mark)
        if other.role != self.role or (self.role is not None and parts):
            raise InvalidRequestError(
                f"cannot append a fork with open role {other.role!r} to a state with open role {self.role!r}; "
                "begin and end each role on the same side of the fork"
            )
        self.add(rest)
        for part in parts:
            if part.role is None:
                self.add(part.content)
            else:
                self._parts.append(part)
