"""choice: one of several given options: closed label sets, yes/no about a context, options named in a context."""

from __future__ import annotations

from tools.embedded_model import facts, words
from tools.embedded_model.dialogue import Dialogue, Message, chat, turn
from tools.embedded_model.draw import Draw
from tools.embedded_model.labels import MOODS, REVIEWS, REVIEWS_NEW, SETS

KIND = "choice"

ASKS = (
    "{t}\n\n{q} Choose one of: {o}.",
    "{q} Choose one of: {o}.\n\n{t}",
    "{t}\n{q} Options: {o}",
    "Text: {t}\n{q}\nOptions: {o}\nAnswer:",
    "{q} Answer with one of {o}.\n{t}",
    "{q} ({o})\n{t}",
    "Choose one of: {o}.\n{q}\nMessage: {t}",
    "{t}\n{q} Pick one: {o}.",
    "Message: {t}\n{q} Answer only {o}.",
    "{t} {q} Choose from: {o}.",
    "Text: {t}\n\n{q} Select one of the following: {o}",
)
ASKS_NEW = (
    "Here is a text: {t}\nDecide: {q} Allowed answers: {o}.",
    "{q}\nPossible answers are {o}.\n\n{t}",
    "{t}\n\n{q} It must be one of {o}.",
)
SYSTEM_ASKS = (
    "{q} Answer with one of: {o}.",
    "You are a classifier. {q} Choose one of: {o}.",
    "Classify each message. {q} Options: {o}",
    "For every message answer with one of: {o}. {q}",
)
SYSTEM_ASKS_NEW = ("You sort messages. {q} Labels: {o}.",)


def _fill(draw: Draw, template: str) -> str:
    return template.format(
        x=draw.thing(),
        n=draw.first_name(),
        p=draw.place(),
        o=draw.code(),
        w=draw.word(),
        d=draw.pick(words.WEEKDAYS),
        c=draw.pick(words.COLOURS),
        a="",
    )


def _text(draw: Draw, name: str, texts: dict[str, tuple[str, ...]], label: str) -> str:
    if name == "sentiment" and draw.chance(0.6):
        template = draw.say(REVIEWS, REVIEWS_NEW).replace("{a}", draw.pick(MOODS[label]))
        adverb = draw.pick(("", "", "really ", "very ")) if label != "neutral" else ""
        return _fill(draw, template.replace(" is ", f" is {adverb}", 1))
    return _fill(draw, draw.pick(texts[label]))


def _options(draw: Draw, options: list[str], last: str = "or") -> str:
    """The options as a person writes them; the order is drawn by the caller."""
    u = draw.rng.random()
    if u < 0.5:
        return ", ".join(options)
    if u < 0.7:
        return ", ".join(options[:-1]) + f" {last} {options[-1]}"
    if u < 0.8:
        return " / ".join(options)
    return ", ".join(f'"{o}"' for o in options) if u < 0.9 else "\n" + "\n".join(f"- {o}" for o in options)


def closed(draw: Draw) -> Dialogue:
    """A label of a closed set for one to three messages."""
    name = draw.pick(tuple(SETS))
    texts, spellings, asks, asks_new = SETS[name]
    labels = draw.some(tuple(texts), draw.integer(2, len(texts)))
    spell = draw.pick(spellings) if spellings and draw.chance(0.35) else {x: x for x in labels}
    shown = [spell[x] for x in labels]
    if draw.chance(0.12):
        shown = [x.upper() if draw.chance(0.5) else x.capitalize() for x in shown]
    options = _options(draw, shown)
    ask = draw.loose(draw.say(asks, asks_new)).format(o=options)
    if draw.chance(0.25):
        messages: list[Message] = [turn("system", draw.say(SYSTEM_ASKS, SYSTEM_ASKS_NEW).format(q=ask, o=options))]
        for _ in range(draw.integer(1, 4)):
            i = draw.integer(0, len(labels) - 1)
            messages += [turn("user", _text(draw, name, texts, labels[i])), turn("assistant", shown[i])]
        return chat(KIND, *messages)
    i = draw.integer(0, len(labels) - 1)
    prompt = draw.say(ASKS, ASKS_NEW).format(t=_text(draw, name, texts, labels[i]), q=ask, o=options)
    return chat(KIND, *draw.system(), turn("user", prompt), turn("assistant", shown[i]))


def yes_no(draw: Draw) -> Dialogue:
    """Is a statement true in the context?"""
    known = facts.world(draw, draw.integer(1, 6))
    fact, true = draw.pick(known), draw.chance(0.5)
    value = fact.value
    while not true and value.lower() == fact.value.lower():
        same = [f.value for f in known if f.kind.label == fact.kind.label and f.value != fact.value]
        value = draw.pick(same) if same and draw.chance(0.4) else fact.kind.value(draw)
    claim = facts.state(draw, fact.kind, fact.subject, value).sentence
    yes, no = draw.pick((("yes", "no"), ("yes", "no"), ("Yes", "No"), ("true", "false"), ("True", "False")))
    options = _options(draw, [yes, no] if draw.chance(0.7) else [no, yes])
    asks = (
        "Is this right: {s}",
        "Is it true that: {s}",
        "Statement: {s} Is it true?",
        "True or false: {s}",
        "Claim: {s}",
    )
    asks_new = ("Does the text say this: {s}", "Check this claim: {s}")
    ask = draw.say(asks, asks_new).format(s=claim)
    prompt = draw.say(ASKS, ASKS_NEW).format(t=facts.article(draw, known), q=ask, o=options)
    return chat(KIND, *draw.system(), turn("user", prompt), turn("assistant", yes if true else no))


def open_options(draw: Draw) -> Dialogue:
    """The options are values of the context (and strangers); the question singles one out."""
    known = facts.world(draw, draw.integer(1, 7))
    fact = draw.pick(known)
    options = {fact.value.lower(): fact.value}
    for value in [f.value for f in known if f.kind.label == fact.kind.label] + [
        fact.kind.value(draw) for _ in range(4)
    ]:
        options.setdefault(value.lower(), value)
    shown = [fact.value, *[v for v in options.values() if v != fact.value][: draw.integer(1, 4)]]
    draw.rng.shuffle(shown)
    question, text = facts.question(draw, fact), facts.article(draw, known)
    if draw.chance(0.3):  # lettered options, answered by their letter
        mark = draw.pick(("{}) {}", "{}. {}", "({}) {}"))
        lines = "\n".join(mark.format("ABCDEF"[i], v) for i, v in enumerate(shown))
        end = draw.say(
            ("Answer with the letter.", "Which letter is right?", "Answer with one letter."),
            ("Give only the letter.",),
        )
        prompt = f"{text}\n\n{question}\n{lines}\n{end}"
        return chat(KIND, *draw.system(), turn("user", prompt), turn("assistant", "ABCDEF"[shown.index(fact.value)]))
    prompt = draw.say(ASKS, ASKS_NEW).format(t=text, q=question, o=_options(draw, shown))
    return chat(KIND, *draw.system(), turn("user", prompt), turn("assistant", fact.value))


def named(draw: Draw) -> Dialogue:
    """The text names one of the options; which one?"""
    make = draw.pick((Draw.thing, Draw.place, Draw.first_name, Draw.company, lambda d: d.pick(words.COLOURS)))
    options: list[str] = []
    while len(options) < draw.integer(2, 5):
        option = make(draw)
        if not any(option.lower() in o.lower() or o.lower() in option.lower() for o in options):
            options.append(option)
    right = draw.pick(options)
    texts = (
        "I want the {r}.",
        "Please take {r}.",
        "I would go for {r}.",
        "My choice is {r}.",
        "It must be {r}.",
        "{f} {r} was mentioned.",
        "{f} They talked about {r}.",
        "We decided on {r}. {f}",
    )
    text = draw.say(texts, ("{f} In the end it was {r}.",)).format(r=right, f=draw.pick(words.FILLERS))
    asks = ("Which one is named?", "Which one is it?", "Which one does the text mention?", "What was chosen?")
    ask = draw.loose(draw.say(asks, ("Which of these occurs?",)))
    prompt = draw.say(ASKS, ASKS_NEW).format(t=text, q=ask, o=_options(draw, options))
    return chat(KIND, *draw.system(), turn("user", prompt), turn("assistant", right))


def tool_choice(draw: Draw) -> Dialogue:
    """Which tool does a question need? The usual first step of a routing program."""
    sums = ("What is {a} + {b}?", "Calculate {a} * {b}.", "How much is {a} minus {b}?", "Add {a} and {b}.")
    finds = (
        "What is the price of the {x}?",
        "Who is {n}?",
        "Where does {n} live?",
        "What is the status of order {o}?",
        "What is the capital of {p}?",
        "How many of the {x} are in stock?",
    )
    talk = (
        "Hello!",
        "Thank you.",
        "Good morning, how are you?",
        "Hi {n} here.",
        "Goodbye!",
        "Nice to meet you.",
    )
    names = {"calculator": sums, "search": finds, "none": talk}
    if draw.chance(0.3):
        names = {"calculator": sums, "lookup": finds, "chat": talk}
    labels = draw.some(tuple(names), draw.integer(2, 3))
    right = draw.pick(labels)
    text = _fill(draw, draw.pick(names[right]).replace("{a}", str(draw.number(3))).replace("{b}", str(draw.number(3))))
    asks = ("Which tool is needed?", "Which tool should I use?", "To answer this, I need which tool?")
    prompt = draw.say(ASKS, ASKS_NEW).format(
        t=text, q=draw.loose(draw.say(asks, ("What tool fits?",))), o=_options(draw, labels)
    )
    return chat(KIND, *draw.system(), turn("user", prompt), turn("assistant", right))


def draw_choice(draw: Draw) -> Dialogue:
    u = draw.rng.random()
    for make, share in ((closed, 0.40), (yes_no, 0.62), (open_options, 0.82), (named, 0.92)):
        if u < share:
            return make(draw)
    return tool_choice(draw)
