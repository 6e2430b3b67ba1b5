"""The data generator: dialogues of every task kind, seeded, deterministic, with train and held-out kept apart.

`draw_dialogue(kind, draw)` makes one dialogue of the split its `Draw` is bound to. An instance belongs to the held-out
side if the hash of its whole text says so, and is drawn again otherwise; so no text of one side occurs on the other.

    python -m tools.embedded_model.tasks --kind tool_use --split heldout --seed 0 --count 3     # look at some
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

from tools.embedded_model import agent, arithmetic, choice, extraction, lists, notes, qa, smalltalk
from tools.embedded_model.dialogue import Dialogue, Message, render
from tools.embedded_model.draw import SPLITS, Draw


def draw_mixed(draw: Draw) -> Dialogue:
    """A chat of two to five single-turn errands of different kinds; also the shape of long prompts."""
    parts = (
        qa.one,
        choice.draw_choice,
        extraction.extract,
        arithmetic.draw_arithmetic,
        lists.simple,
        notes.note,
        notes.merge,
        smalltalk.draw_smalltalk,
    )
    messages: list[Message] = draw.system()
    for _ in range(draw.integer(2, 5)):
        part = draw.pick(parts)(draw)
        while part.pieces or part.messages[0]["role"] == "system" or not draw.fresh(part.text()):
            part = draw.pick(parts)(draw)  # each part, too, belongs to this side of the split
        messages += part.messages
    graded = tuple(i for i, m in enumerate(messages) if m["role"] == "assistant")
    return Dialogue("mixed", tuple(messages), graded)


# kind -> (generator, share of the training dialogues)
KINDS: dict[str, tuple[Callable[[Draw], Dialogue], float]] = {
    qa.KIND: (qa.draw_qa, 0.30),
    choice.KIND: (choice.draw_choice, 0.08),
    extraction.KIND: (extraction.draw_extraction, 0.06),
    arithmetic.KIND: (arithmetic.draw_arithmetic, 0.10),
    agent.KIND: (agent.draw_agent, 0.15),
    lists.KIND: (lists.draw_list, 0.13),
    notes.KIND: (notes.draw_notes, 0.09),
    smalltalk.KIND: (smalltalk.draw_smalltalk, 0.01),
    "mixed": (draw_mixed, 0.08),
}


def draw_dialogue(kind: str, draw: Draw) -> Dialogue:
    """One dialogue of `kind` on the side of `draw.split`.

    The mixed kind splits its parts itself. The smalltalk kind has few texts, nearly all without values, and is not
    split: its held-out figures say that it was learnt, not that it generalises.
    """
    make = KINDS[kind][0]
    while True:
        dialogue = make(draw)
        if kind in (smalltalk.KIND, "mixed") or draw.fresh(dialogue.text()):
            return dialogue


def stream(seed: int | str, split: str = "train", focus: float = 0.0) -> Iterator[Dialogue]:
    """Endless dialogues of all kinds in their shares; `focus` is the share of reversed-question drills before that."""
    draw = Draw(seed, split)
    names = list(KINDS)
    shares = [share for _, share in KINDS.values()]
    while True:
        if focus and draw.chance(focus):
            drill = qa.drill(draw)
            if draw.fresh(drill.text()):
                yield drill
            continue
        yield draw_dialogue(draw.rng.choices(names, shares)[0], draw)


def sample(kind: str, split: str, count: int, seed: int = 0) -> list[Dialogue]:
    """`count` dialogues of one kind."""
    draw = Draw(f"{kind}/{seed}", split)
    return [draw_dialogue(kind, draw) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Print drawn dialogues; graded answers stand between » and «.")
    parser.add_argument("--kind", choices=list(KINDS), required=True)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=5)
    args = parser.parse_args()
    for dialogue in sample(args.kind, args.split, args.count, args.seed):
        print("".join(f"»{text}«" if graded else text for text, graded in render(dialogue)), "\n" + "=" * 80)


if __name__ == "__main__":
    main()
