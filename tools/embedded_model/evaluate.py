"""Measure a model folder: greedy answers to every graded turn of held-out dialogues, exact match, through transformers.

    python -m tools.embedded_model.evaluate superinfer/embedded --device cpu --count 500 --out evaluation.json

Each graded turn is asked with the right earlier turns before it. A chat answer counts if its text, decoded without
special tokens, is the expected one and it ended by itself; a raw completion counts up to its first newline.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria

from tools.embedded_model.dialogue import IM_END, render
from tools.embedded_model.tasks import KINDS, sample

SPARE_TOKENS = 8  # an answer longer than the expected one by more is wrong however it goes on


@dataclass(frozen=True)
class Question:
    """A prompt and the exact text that must follow; `ends` is the text that closes the answer."""

    kind: str
    dialogue: int
    prompt: str
    expected: str
    raw: bool


def questions(kind: str, split: str, count: int, seed: int = 0) -> Iterator[Question]:
    for i, dialogue in enumerate(sample(kind, split, count, seed)):
        prompt = ""
        for text, graded in render(dialogue):
            if graded:
                raw = bool(dialogue.pieces)
                yield Question(kind, i, prompt, text.removesuffix("\n" if raw else IM_END), raw)
            prompt += text


def batches(tokenizer: Any, asked: list[Question], budget: int) -> Iterator[list[tuple[Question, list[int], int]]]:
    """Questions of about one length together; `budget` bounds batch size times longest prompt, in tokens."""
    encoded = tokenizer([q.prompt for q in asked], add_special_tokens=False)["input_ids"]
    answers = [len(ids) for ids in tokenizer([q.expected for q in asked], add_special_tokens=False)["input_ids"]]
    rows = sorted(zip(asked, encoded, answers, strict=True), key=lambda row: (row[2] // 16, len(row[1])))
    batch: list[tuple[Question, list[int], int]] = []
    for row in rows:
        longest = max([len(r[1]) for r in batch] + [len(row[1])])
        if batch and ((len(batch) + 1) * longest > budget or row[2] // 16 != batch[0][2] // 16):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


class _AllEnded(StoppingCriteria):
    """Stop a row at an end token or, if it is a raw completion, at its first newline."""

    def __init__(self, raw: torch.Tensor, newline: int, ends: list[int]) -> None:
        self.raw, self.newline, self.ends = raw, newline, torch.tensor(ends, device=raw.device)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        last = input_ids[:, -1]
        return torch.isin(last, self.ends) | (self.raw & (last == self.newline))


def answer(model: Any, tokenizer: Any, batch: list[tuple[Question, list[int], int]]) -> list[str | None]:
    """Greedy answers; None for one that did not end in time."""
    device = model.device
    longest = max(len(ids) for _, ids, _ in batch)
    tokens = torch.full((len(batch), longest), tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, (_, ids, _) in enumerate(batch):
        tokens[i, longest - len(ids) :] = torch.tensor(ids)
        mask[i, longest - len(ids) :] = 1
    newline = tokenizer.encode("\n", add_special_tokens=False)[0]
    raw = torch.tensor([q.raw for q, _, _ in batch], device=device)
    stop = _AllEnded(raw, newline, model.generation_config.eos_token_id)
    out = model.generate(
        tokens.to(device), attention_mask=mask.to(device), do_sample=False, stopping_criteria=[stop],
        max_new_tokens=max(n for _, _, n in batch) + SPARE_TOKENS,
    )[:, longest:].tolist()  # fmt: skip
    ends = set(model.generation_config.eos_token_id)
    answers: list[str | None] = []
    for (question, _, _), ids in zip(batch, out, strict=True):
        stops = {newline} if question.raw else ends
        cut = next((i for i, t in enumerate(ids) if t in stops), None)
        answers.append(None if cut is None else tokenizer.decode(ids[:cut], skip_special_tokens=True))
    return answers


def evaluate(folder: Path, device: str, counts: dict[str, int], kinds: list[str] | None = None, show: int = 0) -> dict[str, Any]:
    """Figures by split and kind: dialogues, graded turns, exact turns, and the share of turns that are exact."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    model = model.to(device).eval()
    budget = 1 << (14 if device == "cpu" else 18)
    figures: dict[str, Any] = {}
    for split, count in counts.items():
        asked = [q for kind in kinds or KINDS for q in questions(kind, split, count)]
        turns, exact = Counter(q.kind for q in asked), Counter[str]()
        failed: dict[str, set[int]] = {kind: set() for kind in turns}
        with torch.inference_mode():
            for batch in batches(tokenizer, asked, budget):
                for (question, _, _), text in zip(batch, answer(model, tokenizer, batch), strict=True):
                    exact[question.kind] += text == question.expected
                    if text != question.expected:
                        if len(failed[question.kind]) < show:
                            print(f"[{split} {question.kind}] ...{question.prompt[-400:]!r}\n  expected {question.expected!r}\n  got {text!r}")
                        failed[question.kind].add(question.dialogue)
        figures[split] = {
            kind: {"dialogues": count, "turns": turns[kind], "exact_turns": exact[kind], "accuracy": round(exact[kind] / turns[kind], 4),
                   "dialogues_all_exact": round(1 - len(failed[kind]) / count, 4)}
            for kind in turns
        }  # fmt: skip
    return figures


def print_table(figures: dict[str, Any]) -> None:
    for split, kinds in figures.items():
        for kind, row in kinds.items():
            print(f"{split:8} {kind:18} turns {row['accuracy']:.4f} ({row['exact_turns']}/{row['turns']}) dialogues {row['dialogues_all_exact']:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--count", type=int, default=500, help="dialogues per kind and split")
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS))
    parser.add_argument("--show", type=int, default=0, help="print this many failures per kind")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    start = time.monotonic()
    figures = evaluate(args.folder, args.device, {"heldout": args.count, "unseen": args.count}, args.kinds, args.show)
    print_table(figures)
    print(f"{time.monotonic() - start:.0f} s")
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
