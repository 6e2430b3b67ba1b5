"""Measure a model folder: greedy answers to every graded turn of held-out dialogues, exact match, through transformers.

    python -m tools.embedded_model.evaluate superinfer/embedded --device cpu --count 500 --out evaluation.json

Each graded turn is asked with the right earlier turns before it. A chat answer counts if its text, decoded without
special tokens, is the expected one and it ended by itself; a raw completion counts up to its first newline.
"""

from __future__ import annotations

import argparse
import json
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
        tokens.to(device),
        attention_mask=mask.to(device),
        do_sample=False,
        stopping_criteria=[stop],
        max_new_tokens=max(n for _, _, n in batch) + SPARE_TOKENS,
    )[:, longest:].tolist()
    ends = set(model.generation_config.eos_token_id)
    answers: list[str | None] = []
    for (question, _, _), ids in zip(batch, out, strict=True):
        stops = {newline} if question.raw else ends
        cut = next((i for i, t in enumerate(ids) if t in stops), None)
        answers.append(None if cut is None else tokenizer.decode(ids[:cut], skip_special_tokens=True))
    return answers


def generated(folder: Path, device: str, asked: list[Question]) -> list[str | None]:
    """The model's own greedy answers to the questions, in their order."""
    tokenizer, model = load(folder, device)
    answers: dict[int, str | None] = {}
    order = {id(q): i for i, q in enumerate(asked)}
    with torch.inference_mode():
        for batch in batches(tokenizer, asked, 1 << (14 if device == "cpu" else 18)):
            for (question, _, _), text in zip(batch, answer(model, tokenizer, batch), strict=True):
                answers[order[id(question)]] = text
    return [answers[i] for i in range(len(asked))]


def load(folder: Path, device: str) -> tuple[Any, Any]:
    """Tokenizer and model; float32 on a CPU, bfloat16 as stored on a GPU."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32 if device == "cpu" else torch.bfloat16
    )
    return tokenizer, model.to(device).eval()


@dataclass(frozen=True)
class Row:
    """A dialogue's tokens and its graded spans [start, stop), end token included."""

    kind: str
    tokens: list[int]
    spans: list[tuple[int, int]]


def row(tokenizer: Any, kind: str, dialogue: Any) -> Row:
    tokens: list[int] = []
    spans: list[tuple[int, int]] = []
    for text, graded in render(dialogue):
        start = len(tokens)
        tokens += tokenizer.encode(text, add_special_tokens=False)
        if graded:
            spans.append((start, len(tokens)))
    return Row(kind, tokens, spans)


def exact(model: Any, rows: list[Row]) -> list[list[bool]]:
    """Whether greedy decoding gives each graded span: so it does if and only if every token of it is the likeliest."""
    longest = max(len(r.tokens) for r in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, r in enumerate(rows):
        tokens[i, : len(r.tokens)] = torch.tensor(r.tokens)  # padding on the right is never seen by a causal model
    likeliest = model(tokens.to(model.device), use_cache=False).logits.argmax(-1).tolist()
    return [[likeliest[i][a - 1 : b - 1] == r.tokens[a:b] for a, b in r.spans] for i, r in enumerate(rows)]


def evaluate(
    folder: Path, device: str, counts: dict[str, int], kinds: list[str] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Figures by split and kind: dialogues, graded turns, exact turns, shares of turns and whole dialogues exact."""
    tokenizer, model = load(folder, device)
    budget = 1 << (13 if device == "cpu" else 17)  # tokens of one forward pass
    figures: dict[str, Any] = {}
    for split, count in counts.items():
        figures[split] = {}
        for kind in kinds or KINDS:
            rows = sorted(
                (row(tokenizer, kind, d) for d in sample(kind, split, count, seed)), key=lambda r: len(r.tokens)
            )
            results: list[list[bool]] = []
            while len(results) < len(rows):
                rest = rows[len(results) :]
                fit = max((n for n in range(1, len(rest) + 1) if n * len(rest[n - 1].tokens) <= budget), default=1)
                with torch.inference_mode():
                    results += exact(model, rest[:fit])
            turns, right = sum(map(len, results)), sum(map(sum, results))
            figures[split][kind] = {
                "dialogues": count,
                "turns": turns,
                "exact_turns": right,
                "accuracy": round(right / turns, 4),
                "dialogues_all_exact": round(sum(map(all, results)) / count, 4),
            }
            print_row(split, kind, figures[split][kind])
    return figures


def print_row(split: str, kind: str, f: dict[str, Any]) -> None:
    ratio = f"({f['exact_turns']}/{f['turns']})"
    print(
        f"{split:8} {kind:18} turns {f['accuracy']:.4f} {ratio:12} dialogues {f['dialogues_all_exact']:.4f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--count", type=int, default=500, help="dialogues per kind and split")
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS))
    parser.add_argument(
        "--generate",
        type=int,
        default=0,
        metavar="N",
        help="also generate for N held-out dialogues per kind; print misses",
    )
    parser.add_argument("--seed", type=int, default=0, help="which dialogues; one not looked at while choosing weights")
    parser.add_argument("--splits", nargs="*", default=["heldout", "unseen"], choices=["heldout", "unseen"])
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    figures = evaluate(args.folder, args.device, dict.fromkeys(args.splits, args.count), args.kinds, args.seed)
    for kind in (args.kinds or KINDS) if args.generate else ():
        asked = list(questions(kind, "heldout", args.generate))
        texts = generated(args.folder, args.device, asked)
        print(f"generated {kind}: {sum(t == q.expected for q, t in zip(asked, texts, strict=True))}/{len(asked)}")
        for question, text in zip(asked, texts, strict=True):
            if text != question.expected:
                print(f"  ...{question.prompt[-300:]!r}\n  expected {question.expected!r}\n  got {text!r}")
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
