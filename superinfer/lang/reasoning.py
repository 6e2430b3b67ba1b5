"""Reasoning told apart from the answer: `<think>...</think>` before what a model says to its reader."""

from __future__ import annotations

from dataclasses import dataclass

from superinfer.errors import UnsupportedError

_THINK = ("<think>", "</think>")
_TAGS = {
    "deepseek-r1": _THINK, "deepseek-v3": _THINK, "glm45": _THINK, "kimi": ("◁think▷", "◁/think▷"),
    "kimi_k2": _THINK, "minimax": _THINK, "qwen3": _THINK, "qwen3-thinking": _THINK, "step3": _THINK,
}  # fmt: skip
_BEGIN_INSIDE = ("deepseek-r1", "qwen3-thinking")  # they think always, and their template writes the opening tag


@dataclass(frozen=True)
class Reasoning:
    """How a model marks its reasoning. `inside`: its text begins within, without an opening tag."""

    begin: str = _THINK[0]
    end: str = _THINK[1]
    inside: bool = False

    @classmethod
    def of(cls, model_type: str | None) -> Reasoning:
        """By SGLang's name of the model's kind; None: <think> tags. Raises UnsupportedError for an unknown name."""
        if model_type is None:
            return cls()
        tags = _TAGS.get(model_type.lower())
        if tags is None:
            raise UnsupportedError(f"model_type={model_type!r} is not known; use {', '.join(_TAGS)} or None")
        return cls(*tags, inside=model_type.lower() in _BEGIN_INSIDE)

    def split(self, text: str, prompt: str, *, finished: bool) -> tuple[str, str]:
        """(reasoning, answer) of what was written so far after `prompt`; either only grows as `text` does.

        A text that neither has nor follows an opening tag is an answer; one that never closes the tag is reasoning.
        """
        opened = text.lstrip().startswith(self.begin)
        if not (opened or self.inside or prompt.rstrip().endswith(self.begin)):
            undecided = not finished and self.begin.startswith(text.lstrip())
            return "", "" if undecided else text
        thought, closed, answer = text.partition(self.end)
        return thought.strip().removeprefix(self.begin).strip(), answer.lstrip() if closed else ""
