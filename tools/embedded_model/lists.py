"""list_continuation: the next items of a list with one plain rule (steps, weekdays, months, letters, cycles)."""

from __future__ import annotations

from itertools import islice

from tools.embedded_model import words
from tools.embedded_model.dialogue import Dialogue, Message, chat, turn
from tools.embedded_model.draw import Draw

KIND = "list_continuation"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DEFAULT = 3  # items when the request names no number
ASKS_N = (
    "Continue the list with {n} more items: {l}",
    "Give the next {n} items: {l}",
    "{l}\nNext {n}?",
    "What are the next {n} items?\n{l}",
    "Continue with {n} more: {l}",
    "{l}\n\nGive the next {n} items.",
    "Write the next {n} of this list: {l}",
    "List: {l}\nNext {n} items:",
)
ASKS_N_NEW = ("Here is a list: {l}\nI want {n} more items.", "Extend this by {n} items: {l}")
ASKS_1 = (
    "What comes next? {l}",
    "{l}\nWhat comes next?",
    "What is the next item? {l}",
    "Next item: {l}",
    "Which item follows? {l}",
    "{l}\nNext?",
    "What comes after {l}?",
)
ASKS_1_NEW = ("Tell me the item that follows {l}",)
ASKS_ANY = (
    "Continue the list: {l}",
    "Continue: {l}",
    "Go on: {l}",
    "{l}\nContinue.",
    "Please continue this list: {l}",
    "Keep going: {l}",
)
ASKS_ANY_NEW = ("Carry on with {l}",)


def _cycle(items: list[str], start: int, n: int) -> list[str]:
    return [items[(start + i) % len(items)] for i in range(n)]


def sequence(draw: Draw, more: int) -> tuple[list[str], list[str]]:
    """The items shown and the `more` items that follow."""
    u = draw.rng.random()
    shown = draw.integer(3, 7)
    total = shown + more
    if u < 0.42:
        step = draw.pick((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 15, 20, 25, 50, 100))
        start = draw.integer(0, 60) if draw.chance(0.6) else draw.integer(0, 900)
        if draw.chance(0.2) and start >= 0:
            start += step * total  # downwards, never below zero
            step = -step
        items = [str(start + step * i) for i in range(total)]
    elif u < 0.52:
        names = [d[:3] for d in words.WEEKDAYS] if draw.chance(0.2) else list(words.WEEKDAYS)
        items = _cycle(names[::-1] if draw.chance(0.1) else names, draw.integer(0, 6), total)
    elif u < 0.62:
        names = [m[:3] for m in words.MONTHS] if draw.chance(0.2) else list(words.MONTHS)
        items = _cycle(names, draw.integer(0, 11), total)
    elif u < 0.74:
        step = draw.pick((1, 1, 1, 2))
        letters = [LETTERS[(draw_start + step * i) % 26] for draw_start in (draw.integer(0, 25),) for i in range(total)]
        items = [x.lower() for x in letters] if draw.chance(0.4) else letters
        if draw.chance(0.15):
            items = [f"{items[0]}{i + 1}" for i in range(total)]
    else:
        make = draw.pick(
            (
                draw.thing,
                draw.word,
                draw.first_name,
                lambda: str(draw.number(2)),
                lambda: draw.pick(words.COLOURS),
            )
        )
        period = draw.integer(2, 4)
        base: list[str] = []
        while len(base) < period:
            item = make()
            if item not in base:
                base.append(item)
        shown = max(shown, 2 * period)  # two whole periods show the rule
        items = _cycle(base, 0, shown + more)
    return items[:shown], items[shown:]


def simple(draw: Draw) -> Dialogue:
    u = draw.rng.random()
    n = 1 if u < 0.25 else draw.integer(2, 6) if u < 0.75 else DEFAULT
    before, after = sequence(draw, n)
    glue = draw.pick((", ", ", ", ", ", " ", "\n", "; "))
    text = glue.join(before) + (draw.pick(("", ",", ", ...")) if glue == ", " else "")
    if glue == "\n":
        text = "\n" + text
    if u < 0.25:
        template = draw.say(ASKS_1, ASKS_1_NEW)
    elif u < 0.75:
        template = draw.say(ASKS_N, ASKS_N_NEW)
    else:
        template = draw.say(ASKS_ANY, ASKS_ANY_NEW)
    number = words.NUMBER_WORDS[n] if draw.chance(0.3) else n
    prompt = draw.loose(template).format(n=number, l=text).strip()
    return chat(KIND, *draw.system(), turn("user", prompt), turn("assistant", glue.join(after)))


def numbered(draw: Draw) -> Dialogue:
    """A numbered list whose items repeat: the counter goes on, the cycle goes on."""
    n = draw.integer(1, 5)
    period = draw.integer(1, 4)
    make = draw.pick((draw.thing, draw.word, draw.first_name, lambda: draw.pick(words.FOODS)))
    base = list(islice(dict.fromkeys(make() for _ in range(20)), period))
    shown = draw.integer(2, 6) if len(base) == 1 else draw.integer(2 * len(base), 3 * len(base) + 1)
    first = 1 if draw.chance(0.8) else draw.integer(2, 40)
    mark = draw.pick(("{}. {}", "{}. {}", "{}) {}", "{}: {}"))
    lines = [mark.format(first + i, item) for i, item in enumerate(_cycle(base, 0, shown + n))]
    text = "\n" + "\n".join(lines[:shown])
    template = draw.say(ASKS_N, ASKS_N_NEW)
    prompt = draw.loose(template).format(n=n, l=text).strip()
    return chat(KIND, *draw.system(), turn("user", prompt), turn("assistant", "\n".join(lines[shown:])))


def raw_numbered(draw: Draw) -> Dialogue:
    """The same without chat tokens: each line of the list after the first period is graded."""
    period = draw.integer(2, 4)
    make = draw.pick((draw.thing, draw.word, draw.first_name))
    base = list(islice(dict.fromkeys(make() for _ in range(20)), period))
    pieces: list[str] = []
    lead = draw.pick(("", "", "Continue the list.\n", "A list:\n"))
    shown = 2 * len(base)
    lead += "".join(f"{i + 1}. {item}\n" for i, item in enumerate(_cycle(base, 0, shown)))
    for i in range(shown, shown + draw.integer(1, 5)):
        pieces += [f"{lead}{i + 1}.", f" {base[i % len(base)]}\n"]
        lead = ""
    return Dialogue(KIND, pieces=tuple(pieces))


def count(draw: Draw) -> Dialogue:
    """Counting out loud: a long, fully determined answer, good for streaming."""
    messages: list[Message] = draw.system()
    low = draw.integer(1, 50) if draw.chance(0.6) else 1
    high = low + draw.integer(3, 40)
    step = draw.pick((1, 1, 1, 1, 2, 5, 10))
    down = draw.chance(0.15)
    numbers = list(range(low, high + 1, step))
    high = numbers[-1]
    ways = (
        "Count from {a} to {b}.",
        "Count from {a} to {b}",
        "Please count from {a} up to {b}.",
        "List the numbers from {a} to {b}.",
    )
    ask = draw.say(ways, ("Say all numbers from {a} to {b}.",))
    if down:
        numbers.reverse()
        ask = draw.say(
            ("Count down from {a} to {b}.", "Count backwards from {a} to {b}."),
            ("Count from {a} down to {b}.",),
        )
    prompt = draw.loose(ask).format(a=numbers[0], b=numbers[-1])
    if step > 1:
        prompt = prompt.rstrip(".") + f" in steps of {step}."
    return chat(KIND, *messages, turn("user", prompt), turn("assistant", ", ".join(map(str, numbers))))


def draw_list(draw: Draw) -> Dialogue:
    u = draw.rng.random()
    if u < 0.6:
        return simple(draw)
    if u < 0.78:
        return numbered(draw)
    return count(draw) if u < 0.9 else raw_numbered(draw)
