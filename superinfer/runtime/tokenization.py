"""Text to tokens and back: tokenizer, chat template, incremental detokenization. Never inside the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from superinfer.errors import InvalidRequestError, ModelLoadError
from superinfer.runtime.segments import Known, segments_of

ChatMessage = dict[str, Any]

# Of a text's end: how it is split into words may look a few characters ahead, and special tokens are no longer.
SAFE_TOKENS, SAFE_CHARACTERS = 8, 40


class Tokenizer:
    """A checkpoint's tokenizer and chat template, by way of transformers."""

    def __init__(self, path: str) -> None:
        """`path`: a folder with a Hugging Face tokenizer. Raises ModelLoadError."""
        # Takes a second to import, so only who handles text pays; AutoTokenizer would take five and load torch. The
        # class is the one of every tokenizer.json, which alone says how to tokenize.
        from transformers import PreTrainedTokenizerFast

        try:
            self._hf = PreTrainedTokenizerFast.from_pretrained(path)
        except Exception as error:  # whatever a broken file makes the library raise
            raise ModelLoadError(f"cannot load a tokenizer from {path!r}: {error}") from error
        if not getattr(self._hf, "is_fast", False):
            raise ModelLoadError(f"the tokenizer in {path!r} has no tokenizer.json; convert it with transformers first")
        self._backend = self._hf.backend_tokenizer
        self._segments = segments_of(self._backend)
        self.eos_token_id: int | None = self._hf.eos_token_id

    @property
    def has_chat_template(self) -> bool:
        return bool(self._hf.chat_template)

    @property
    def chat_template(self) -> str:
        """The template's source; "" where there is none."""
        return str(self._hf.chat_template or "")

    @property
    def special_tokens(self) -> dict[str, int]:
        """Text and id of the tokens that `skip_special` leaves out."""
        added = self._backend.get_added_tokens_decoder().items()
        return {token.content: token_id for token_id, token in added if token.special}

    @property
    def cuts_anywhere(self) -> bool:
        """Whether texts may be tokenized piece by piece: no piece gets anything of its own at its beginning."""
        return self._segments is not None

    @property
    def template_takes_tools(self) -> bool:
        """Whether the chat template mentions tools at all; one that does not would drop them in silence."""
        return "tools" in self.chat_template

    def encode(self, text: str, *, special: bool = True, known: Known | None = None) -> list[int]:
        """Token ids of `text`. `special`: add what the model wants around a prompt (a BOS, say); a rendered chat
        template already holds it, so pass False there. known: tokens of texts between special tokens, where they are
        not to be the tokenizer's own; not asked where texts cannot be cut at these."""
        try:
            if self._segments is not None and not special:
                return self._segments.encode(text, self._plainly, known)
            return list(self._backend.encode(text, add_special_tokens=special).ids)
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidRequestError(f"prompt {text!r:.80} cannot be tokenized: {error}; give valid text") from error

    def after_special(self, text: str) -> str | None:
        """What stands behind the last special token that a text may be cut at; None where there is none."""
        return self._segments.rest(text) if self._segments is not None else None

    def _plainly(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_each(self, text: str, ends: Sequence[str], *, special: bool = True) -> tuple[list[int], list[list[int]]]:
        """Token ids of `text`, and of `text` with each of `ends` behind it, as `encode` gives them. What comes before
        the last words of `text` is tokenized once: nothing behind it changes how it is split."""
        try:
            whole = self._backend.encode(text, add_special_tokens=special)
        except (TypeError, UnicodeEncodeError):
            whole = None
        cut = self._cut(whole, text) if whole is not None else None
        if whole is None or cut is None:
            return self.encode(text, special=special), [self.encode(text + end, special=special) for end in ends]
        first, tail = whole.ids[: cut[0]], text[cut[1] :]
        return list(whole.ids), [first + self.encode(tail + end, special=False) for end in ends]

    def _cut(self, whole: Any, text: str) -> tuple[int, int] | None:
        """(token, character) from which on text that follows may change the tokens; None where that is not certain."""
        words, offsets, count = whole.word_ids, whole.offsets, len(whole.ids)
        at = count
        while at > 0 and (
            count - at < SAFE_TOKENS or words[at - 1] == words[at] or len(text) - offsets[at - 1][1] < SAFE_CHARACTERS
        ):
            at -= 1
        if at == 0 or None in words[at - 1 :]:
            return None
        character = offsets[at - 1][1]
        again = self._backend.encode(text[character:], add_special_tokens=False).ids
        return (at, character) if again == whole.ids[at:] else None

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `token_ids`."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special))

    def render_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text for `messages` by the model's own template.

        continue_final_message: the last (assistant) message is a beginning that the model is to continue.
        variables: further names that the template may ask for, such as Qwen3's `enable_thinking`.
        Raises InvalidRequestError when the model has no template or the template refuses the messages.
        """
        if not self.has_chat_template:
            raise InvalidRequestError(
                "this model has no chat template: give it plain prompts (`/v1/completions`, or text without roles)"
            )
        try:
            return str(
                self._hf.apply_chat_template(
                    list(messages),
                    tools=list(tools) if tools else None,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt and not continue_final_message,
                    continue_final_message=continue_final_message,
                    **(variables or {}),
                )
            )
        except Exception as error:  # a template is a program of the model's author: it may raise anything
            raise InvalidRequestError(f"the chat template refused these messages: {error}") from error

    def detokenizer(self, *, skip_special: bool = True) -> Detokenizer:
        """A fresh incremental detokenizer for one sequence."""
        return Detokenizer(self, skip_special)


class Detokenizer:
    """Text of a growing token sequence, given out as soon as it is certain (a character may span tokens)."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._stream = DecodeStream(skip_special_tokens=skip_special)
        self._ids: list[int] = []
        self._given = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """The new text after `token_ids`; "" while a character is incomplete."""
        pieces = []
        for token_id in token_ids:
            self._ids.append(token_id)
            piece = self._stream.step(self._tokenizer._backend, token_id)
            if piece:
                pieces.append(piece)
        text = "".join(pieces)
        self._given += len(text)
        return text

    def flush(self) -> str:
        """What is left at the end, such as the bytes of a character that was cut off."""
        whole = self._tokenizer.decode(self._ids, skip_special=self._skip_special)
        rest, self._given = whole[self._given :], len(whole)
        return rest
