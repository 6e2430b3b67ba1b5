"""Text to tokens and back: tokenizer and chat template. Never inside the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from superinfer.errors import InvalidRequestError, ModelLoadError
from superinfer.runtime.detokenization import ByteDetokenizer, Detokenizer, LibraryDetokenizer, byte_pieces_of
from superinfer.runtime.segments import Known, segments_of
from superinfer.runtime.tokenizer_files import check_tokenizer, template_beside

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

        check_tokenizer(Path(path))
        try:
            self._hf = PreTrainedTokenizerFast.from_pretrained(path)
        except Exception as error:  # whatever a broken file makes the library raise
            raise ModelLoadError(f"cannot load a tokenizer from {path!r}: {error}") from error
        self._backend = self._hf.backend_tokenizer
        self._backend.no_truncation()  # tokenizer.json may hold what its trainer had set, for batches of one length
        self._backend.no_padding()
        self._hf.chat_template = self._hf.chat_template or template_beside(Path(path))
        self._segments = segments_of(self._backend)
        self._byte_pieces = byte_pieces_of(self._backend)
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.eos_token_id: int | None = self._hf.eos_token_id

    @property
    def has_chat_template(self) -> bool:
        return bool(self._hf.chat_template)

    @property
    def chat_template(self) -> str:
        """The template's source, of all templates where there are several; "" where there is none."""
        template = self._hf.chat_template or ""
        return "\n".join(template.values()) if isinstance(template, dict) else str(template)

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
        if self._byte_pieces is not None:
            detokenizer = self.detokenizer(skip_special=skip_special)
            return detokenizer.push(token_ids) + detokenizer.flush()
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special))

    def piece(self, token_id: int) -> str:
        """Text of one token, special or not, where other text is before it."""
        if self._byte_pieces is not None:
            return self._byte_pieces.piece(token_id).later.decode(errors="replace")
        return self.decode([token_id], skip_special=False)

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

    def is_text(self, token_ids: Sequence[int]) -> bool:
        """Whether there are others among them than special tokens."""
        return any(token_id not in self._special_ids for token_id in token_ids)

    def detokenizer(self, *, skip_special: bool = True, begun: bool = False) -> Detokenizer:
        """A fresh incremental detokenizer for one sequence. begun: it goes on from other text. Tokenizers such as
        Llama 2's begin every text with a space, which is left out where that text begins, and nowhere else."""
        if self._byte_pieces is not None:
            return ByteDetokenizer(self._byte_pieces, skip_special, begun)
        return LibraryDetokenizer(self._backend, skip_special)
