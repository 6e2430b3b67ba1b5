"""notes: the pieces of a fork/join program: one note per document, then the notes merged into one answer."""

from __future__ import annotations

from tools.embedded_model import facts
from tools.embedded_model.dialogue import Dialogue, Message, chat, turn
from tools.embedded_model.draw import Draw

KIND = "notes"
NOTE_ASKS = (
    "{c}\n\nWrite one note about {s}.",
    "Document:\n{c}\n\nNote the key fact about {s}.",
    "What does the document say about {s}? Quote it.\n\n{c}",
    "{c}\n\nWhich sentence is about {s}?",
    "Text: {c}\nQuote the sentence about {s}.",
    "Note one fact about {s} from this text: {c}",
    "Note about {s}.\n\nDocument: {c}",
    "{c}\nKey fact about {s}?",
    "Extract the key fact about {s}.\n\n{c}",
)
NOTE_ASKS_NEW = (
    "Here is a document.\n{c}\nWrite down what it says about {s}.",
    "Take a note on {s} from: {c}",
)
MERGE_ASKS = (
    "Merge the notes into one answer:\n{n}",
    "Combine these notes into one paragraph:\n{n}",
    "{n}\n\nMerge these notes.",
    "Notes:\n{n}\n\nWrite one answer from the notes.",
    "Join the notes:\n{n}",
    "Here are the notes.\n{n}\nMerge them into one answer.",
    "Merge:\n{n}",
    "{n}\n\nCombine the notes into one answer.",
)
MERGE_ASKS_NEW = ("Put these notes together:\n{n}", "{n}\n\nMake one answer out of the notes.")
LINE_ASKS = (
    "Summarise the notes in one line:\n{n}",
    "{n}\n\nSummarise the notes in one line.",
    "Summarize these notes in one line:\n{n}",
    "Notes:\n{n}\nOne line summary:",
    "Write a one line summary of the notes.\n{n}",
)
LINE_ASKS_NEW = ("Shorten the notes to one line:\n{n}",)
BULLETS = ("- ", "- ", "* ", "", "", "#")


def _note_lines(draw: Draw, notes: list[str]) -> str:
    mark = draw.pick(BULLETS)
    if mark == "#":
        return "\n".join(f"{i + 1}. {note}" for i, note in enumerate(notes))
    return "\n".join(mark + note for note in notes)


def merged(draw: Draw, notes: list[str]) -> tuple[str, str]:
    """A request to merge and its answer: the notes in order, by spaces; in one line, by semicolons."""
    lines = _note_lines(draw, notes)
    if draw.chance(0.3):
        return draw.say(LINE_ASKS, LINE_ASKS_NEW).format(n=lines), "; ".join(n.rstrip(".") for n in notes) + "."
    return draw.say(MERGE_ASKS, MERGE_ASKS_NEW).format(n=lines), " ".join(notes)


def note(draw: Draw) -> Dialogue:
    """The sentence of a document that is about one subject."""
    while True:
        known = facts.world(draw, draw.integer(1, 10))
        once = [f for f in known if sum(f.subject == g.subject for g in known) == 1]
        if once:
            break
    fact = draw.pick(once)
    sentences = facts.prose(draw, known)
    prompt = draw.say(NOTE_ASKS, NOTE_ASKS_NEW).format(c=sentences, s=fact.subject)
    return chat(KIND, *draw.system(), turn("user", prompt), turn("assistant", fact.sentence))


def merge(draw: Draw) -> Dialogue:
    notes = [f.sentence for f in facts.world(draw, draw.integer(1, 6))]
    prompt, answer = merged(draw, notes)
    return chat(KIND, *draw.system(), turn("user", prompt), turn("assistant", answer))


def result_note(draw: Draw) -> Dialogue:
    """Lookup results, one a turn, each noted in a sentence, and merged at the end."""
    systems = (
        "You are a support agent. Answer from the tool results only.",
        "Turn each result into a note.",
        "Write one note per result.",
    )
    messages: list[Message] = [turn("system", draw.say(systems, ("Make a sentence of each result.",)))]
    notes: list[str] = []
    for _ in range(draw.integer(1, 4)):
        subject = draw.pick((draw.thing, draw.company, draw.code))()
        label = draw.pick(
            (
                "price",
                "weight",
                "stock",
                "status",
                "address",
                "size",
                "warranty",
                "delivery time",
                "maker",
                "owner",
            )
        )
        value = draw.pick(
            (draw.price, draw.place, draw.date, lambda: str(draw.number(3)), draw.full_name, draw.hours)
        )()
        lead = draw.pick(("", "", "Result: ", "Tool result: ", "Lookup: "))
        messages.append(turn("user", f"{lead}{label} of {subject}{draw.pick((': ', ' = '))}{value}"))
        notes.append(f"The {label} of {subject} is {value}.")
        messages.append(turn("assistant", notes[-1]))
    if draw.chance(0.5):
        prompt, answer = merged(draw, notes)
        messages += [turn("user", prompt), turn("assistant", answer)]
    return chat(KIND, *messages)


def draw_notes(draw: Draw) -> Dialogue:
    u = draw.rng.random()
    if u < 0.4:
        return note(draw)
    return merge(draw) if u < 0.75 else result_note(draw)
