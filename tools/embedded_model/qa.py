"""context_qa: a short answer copied from a given context, in chat and as few-shot text; "I don't know." otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tools.embedded_model import facts
from tools.embedded_model.dialogue import Dialogue, Message, chat, turn
from tools.embedded_model.draw import Draw

KIND = "context_qa"
UNKNOWN = "I don't know."
LAYOUTS = (
    "Context: {c}\nQuestion: {q}",
    "{c}\n\n{q}",
    "{c}\n{q}",
    "{q}\n\n{c}",
    "Text: {c}\n\nQuestion: {q}",
    "Context:\n{c}\n\nQuestion:\n{q}",
    "Read this: {c}\n{q}",
    "Use the text to answer.\n\n{c}\n\n{q}",
    "Answer from the text.\nText: {c}\nQ: {q}",
    "Document:\n{c}\n\n{q}",
    "Here is some information: {c} {q}",
    "{q} Use this: {c}",
    "Question: {q}\nContext: {c}",
    "Answer the question from the context.\n\n{c}\n\nQuestion: {q}",
    "I have these notes:\n{c}\n\n{q}",
    "Context: {c}\nQ: {q}\nA:",
    "Context: {c}\n\nQuestion: {q}\n\nAnswer:",
    "{c} {q}",
)
LAYOUTS_NEW = (
    "Passage: {c}\nWhat I want to know: {q}",
    "Look at the following.\n{c}\nNow answer: {q}",
    "This is what we know: {c}\n\nMy question is: {q}",
    "{q}\nSource: {c}",
)
SYSTEM_LAYOUTS = (
    "Answer from this text only.\n{c}",
    "{c}",
    "You are a support agent. Answer from these documents only.\n\n{c}",
    "Context:\n{c}",
    "You answer questions about the following text.\n\n{c}",
    "Use only these facts:\n{c}",
    "You are a helpful assistant. What you know:\n{c}",
    "Documents:\n{c}\n\nAnswer in a few words.",
)
SYSTEM_LAYOUTS_NEW = ("Everything you may use is here.\n{c}", "Stick to this information: {c}")
TITLES = ("Document {i}: ", "[{i}] ", "Doc {i}\n", "Text {i}: ", "### Document {i}\n")


def asked(draw: Draw, known: list[facts.Fact], refuse: float = 0.12) -> tuple[str, str]:
    """A question about one of the facts and its answer, now and then one that the facts leave open."""
    fact = draw.pick(known)
    if draw.chance(refuse):
        for _ in range(8):
            other = draw.pick(facts.world(draw, 3) + known)  # a stranger, or an attribute nobody stated
            kinds = next(kinds for _, kinds in facts.CLASSES if other.kind in kinds)
            kind = draw.pick(kinds)
            clash = any((f.subject in other.subject or other.subject in f.subject) and f.kind is kind for f in known)
            if not clash:
                return draw.loose(draw.say(kind.ask, kind.new_ask)).format(s=other.subject), UNKNOWN
    if fact.kind.who and draw.chance(0.2):
        return facts.reverse_question(draw, fact), fact.subject
    return facts.question(draw, fact), fact.value


def context(draw: Draw, known: list[facts.Fact], lists: float = 0.15) -> str:
    """One article, or several titled documents; `lists` is the share of articles that are lists of lines."""
    if len(known) < 3 or draw.chance(0.7):
        return facts.article(draw, known, lists=lists)
    n = draw.integer(2, min(6, len(known)))
    title = draw.pick(TITLES)
    parts = [facts.article(draw, known[i::n], 0.4, lists) for i in range(n)]
    return draw.pick(("\n", "\n\n")).join(title.format(i=i + 1) + part for i, part in enumerate(parts))


def size(draw: Draw, most: int = 85) -> int:
    """Number of facts: mostly a few, now and then a context of many hundred tokens."""
    u = draw.rng.random()
    if u < 0.84:
        return draw.integer(1, 9)
    return draw.integer(8, 22) if u < 0.95 else draw.integer(20, most)


def one(draw: Draw) -> Dialogue:
    """A chat about one context: one to nine questions, since every one is a lesson in finding things."""
    known = facts.world(draw, size(draw))

    def pairs() -> Iterator[tuple[str, str]]:
        yield asked(draw, known)
        for _ in range(min(len(known), draw.pick((0, 0, 1, 2, 4, 8)))):
            yield asked(draw, known)

    return talk(draw, context(draw, known), pairs())


def talk(draw: Draw, text: str, pairs: Iterator[tuple[str, str]]) -> Dialogue:
    """The chat in which these questions about the text are asked and answered."""
    question, answer = next(pairs)
    messages: list[Message]
    if draw.chance(0.3):
        system = draw.say(SYSTEM_LAYOUTS, SYSTEM_LAYOUTS_NEW).format(c=text)
        messages = [turn("system", system), turn("user", question), turn("assistant", answer)]
    else:
        layout = draw.say(LAYOUTS, LAYOUTS_NEW)
        messages = [
            *draw.system(),
            turn("user", layout.format(c=text, q=question)),
            turn("assistant", answer),
        ]
    for question, answer in pairs:
        messages += [turn("user", question), turn("assistant", answer)]
    return chat(KIND, *messages)


def few_shot(draw: Draw) -> Dialogue:
    """Plain text without chat tokens: every shot's answer is graded and ends with a newline."""
    q, a = draw.pick((("Q:", "A:"), ("Q:", "A:"), ("Question:", "Answer:")))
    gap = draw.pick(("\n", "\n\n"))
    c = draw.pick(("Context:", "Context:", "Text:", "Passage:"))
    shared = draw.chance(0.4)  # one context for all shots, or one each
    known = facts.world(draw, draw.integer(3, 8))
    pieces: list[str] = []
    if shared:
        known = known if draw.chance(0.9) else facts.world(draw, draw.integer(15, 40))
        lead = f"{c} {facts.article(draw, known)}{gap}"
    else:
        lead = draw.pick(("", "", "Answer the questions.\n\n", "Answer from the context.\n\n"))
    for _ in range(draw.integer(2, 8 if shared else 5)):
        if not shared:
            known = facts.world(draw, draw.integer(1, 5))
            lead += f"{c} {facts.article(draw, known)}\n"
        question, answer = asked(draw, known, refuse=0.06)
        pieces += [f"{lead}{q} {question}\n{a}", f" {answer}\n"]
        lead = "" if gap == "\n" else "\n"
    return Dialogue(KIND, pieces=tuple(pieces))


def single_fact(draw: Draw) -> Dialogue:
    """One statement about the user's own things, asked back later in the chat: memory over turns."""
    known = facts.world(draw, draw.integer(1, 3))
    messages: list[Message] = draw.system()
    for fact in known:
        lead = draw.pick(("", "Remember: ", "Note this: ", "Keep in mind: "))
        messages += [turn("user", lead + fact.sentence), turn("assistant", "Noted.")]
    for _ in range(draw.integer(1, 2)):
        question, answer = asked(draw, known)
        messages += [turn("user", question), turn("assistant", answer)]
    return chat(KIND, *messages)


def drill(draw: Draw) -> Dialogue:
    """For training alone: a context and reversed questions about its facts, in every shape that the kind has.

    Most have subjects of one class, and many one or two kinds of fact: among others the question's wording ("Who
    ...?", "... lives in ...?") already rules subjects out. `stated` holds the facts, for `carry.py`.
    """
    most = draw.integer(2, 9) if draw.chance(0.88) else draw.integer(10, 24)
    known = facts.world(draw, most, classes=1 if draw.chance(0.7) else 3, narrow=draw.chance(0.35))
    text = context(draw, known, lists=0.25)
    pairs = _reversed(draw, known)
    u = draw.rng.random()
    if u < 0.6:
        return replace(talk(draw, text, iter(pairs)), stated=tuple(known))
    if u < 0.75:  # told one at a time, asked back later
        messages: list[Message] = draw.system()
        for fact in known:
            lead = draw.pick(("", "Remember: ", "Note this: ", "Keep in mind: "))
            messages += [turn("user", lead + fact.sentence), turn("assistant", "Noted.")]
        for question, answer in pairs:
            messages += [turn("user", question), turn("assistant", answer)]
        return replace(chat(KIND, *messages), stated=tuple(known))
    q, a = draw.pick((("Q:", "A:"), ("Q:", "A:"), ("Question:", "Answer:")))
    gap = draw.pick(("\n", "\n\n"))
    c = draw.pick(("Context:", "Context:", "Text:", "Passage:"))
    contexts = [(text, pairs)]
    if draw.chance(0.4):  # a context for each question
        worlds = [known] + [facts.world(draw, draw.integer(2, 5), classes=1) for _ in range(draw.integer(1, 4))]
        contexts = [(facts.article(draw, w, lists=0.25), _reversed(draw, w)[:1]) for w in worlds]
        known = [fact for w in worlds for fact in w]
    pieces: list[str] = []
    for text, pairs in contexts:
        lead = f"{c} {text}" + (gap if len(pairs) > 1 else "\n")
        if pieces:
            lead = ("" if gap == "\n" else "\n") + lead
        for question, answer in pairs:
            pieces += [f"{lead}{q} {question}\n{a}", f" {answer}\n"]
            lead = "" if gap == "\n" else "\n"
    return Dialogue(KIND, pieces=tuple(pieces), stated=tuple(known))


def _reversed(draw: Draw, known: list[facts.Fact]) -> list[tuple[str, str]]:
    """Questions about the facts in drawn order, reversed where that can be, but for a few."""
    pairs = []
    for fact in draw.some(known, len(known)):
        if fact.kind.who and not draw.chance(0.12):
            pairs.append((facts.reverse_question(draw, fact), fact.subject))
        elif fact.kind.who or draw.chance(0.3):
            pairs.append((facts.question(draw, fact), fact.value))
    return pairs or [(facts.question(draw, known[0]), known[0].value)]


def draw_qa(draw: Draw) -> Dialogue:
    u = draw.rng.random()
    if u < 0.68:
        return one(draw)
    return few_shot(draw) if u < 0.92 else single_fact(draw)
