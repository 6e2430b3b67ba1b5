"""arithmetic: short sums in words and symbols, answered with the number alone.

The operand pairs of held-out additions and subtractions never occur in training, in either order. The times tables
(two digits by one digit) have only 810 entries, so for products and quotients the held-out instances are new
questions and texts over pairs that training has seen.
"""

from __future__ import annotations

from tools.embedded_model import words
from tools.embedded_model.dialogue import Dialogue, Message, chat, turn
from tools.embedded_model.draw import Draw

KIND = "arithmetic"
SYMBOLS = {"+": ("+",), "-": ("-", "-", "−"), "*": ("*", "x", "×"), "/": ("/", "÷")}
SPOKEN = {
    "+": ("{a} plus {b}", "the sum of {a} and {b}", "{a} and {b} together"),
    "-": ("{a} minus {b}", "the difference of {a} and {b}", "{a} less {b}"),
    "*": ("{a} times {b}", "the product of {a} and {b}", "{a} multiplied by {b}"),
    "/": ("{a} divided by {b}", "the quotient of {a} and {b}", "{a} over {b}"),
}
ORDERS = {
    "+": ("Add {a} and {b}.", "Add {b} to {a}.", "Sum {a} and {b}."),
    "-": ("Subtract {b} from {a}.", "Take {b} from {a}.", "Take {b} away from {a}."),
    "*": ("Multiply {a} by {b}.", "Multiply {a} and {b}."),
    "/": ("Divide {a} by {b}.",),
}
ASKS = (
    "What is {e}?",
    "How much is {e}?",
    "Calculate {e}.",
    "Compute {e}.",
    "{e} = ?",
    "{e} =",
    "{e}",
    "{e}?",
    "What does {e} make?",
    "Work out {e}.",
    "Give me {e}.",
    "Solve {e}.",
    "Tell me the result of {e}.",
    "What's {e}?",
    "Can you tell me {e}?",
)
ASKS_NEW = ("Find {e}.", "I need to know {e}.", "What do you get for {e}?", "The result of {e} is what?")
STORIES = {
    "+": (
        "{n} has {a} {i} and gets {b} more. How many {i} does {n} have now?",
        "There are {a} {i} in the box. {n} adds {b}. How many {i} are in the box?",
        "{n} bought {a} {i} and {b} {j}. How many things did {n} buy in all?",
        "A {s} costs ${a} and a {t} costs ${b}. What do they cost together?",
        "{n} read {a} pages on Monday and {b} on Tuesday. How many pages in total?",
    ),
    "-": (
        "{n} has {a} {i} and gives away {b}. How many {i} are left?",
        "There were {a} {i}. {n} took {b}. How many {i} remain?",
        "{n} had ${a} and spent ${b}. How much money is left?",
        "A shop has {a} {i} and sells {b}. How many {i} are left?",
    ),
    "*": (
        "{n} buys {b} {i} for ${a} each. What is the total?",
        "One {s} costs ${a}. What do {b} {i} cost?",
        "There are {b} boxes with {a} {i} each. How many {i} are there?",
        "{n} runs {a} km a day. How many km in {b} days?",
    ),
    "/": (
        "{n} shares {a} {i} among {b} people. How many {i} does each get?",
        "{a} {i} go into {b} equal boxes. How many {i} are in each box?",
    ),
}
STORIES_NEW = {
    "+": ("{n} owns {a} {i}. A friend brings {b}. How many {i} are there now?",),
    "-": ("Of {a} {i}, {n} loses {b}. How many {i} does {n} still have?",),
    "*": ("Each of {b} bags holds {a} {i}. How many {i} is that?",),
    "/": ("{b} friends split {a} {i} evenly. How many {i} per friend?",),
}
FOLLOW = {
    "+": ("Now add {b}.", "Plus {b}?", "Add {b} to that.", "And if you add {b}?"),
    "-": ("Now subtract {b}.", "Minus {b}?", "Take {b} away from that.", "And if you subtract {b}?"),
}
SYSTEMS = (
    "Answer with a number only.",
    "You are a calculator.",
    "Reply with the number.",
    "You do sums.",
    "Only write the result.",
)


def pair(draw: Draw, op: str) -> tuple[int, int, int]:
    """Operands of this split and the result."""
    while True:
        if op == "*":
            a, b = draw.integer(2, 99), draw.integer(2, 9)
            if draw.chance(0.3):
                a, b = b, a
            return a, b, a * b
        if op == "/":
            b, quotient = draw.integer(2, 9), draw.integer(2, 12)
            return b * quotient, b, quotient
        a, b = draw.number(3), draw.number(3)
        if draw.chance(0.35):
            a, b = draw.integer(100, 999), draw.integer(100, 999)
        if op == "-" and a < b and draw.chance(0.7):
            a, b = b, a
        if draw.fresh(f"{op} {min(a, b)} {max(a, b)}"):
            return a, b, a + b if op == "+" else a - b


def operation(draw: Draw) -> str:
    return draw.pick("+++++-----****/")


def expression(draw: Draw, op: str, a: int, b: int) -> str:
    if draw.chance(0.35):
        return draw.pick(SPOKEN[op]).format(a=a, b=b)
    gap = "" if draw.chance(0.2) else " "
    return f"{a}{gap}{draw.pick(SYMBOLS[op])}{gap}{b}"


def ask(draw: Draw, story: float = 0.25) -> tuple[str, int]:
    """A question and its result."""
    op = operation(draw)
    a, b, result = pair(draw, op)
    if draw.chance(story) and result >= 0:
        thing, other = draw.pick(words.THINGS), draw.pick(words.THINGS)
        if op == "*" and b > 9:
            a, b = b, a
        return draw.say(STORIES[op], STORIES_NEW[op]).format(
            n=draw.first_name(), a=a, b=b, s=thing, t=other, i=words.plural(thing), j=words.plural(other)
        ), result
    if draw.chance(0.12):
        return draw.loose(draw.pick(ORDERS[op])).format(a=a, b=b), result
    return draw.loose(draw.say(ASKS, ASKS_NEW)).format(e=expression(draw, op, a, b)), result


def three(draw: Draw) -> tuple[str, int]:
    """A sum of three small numbers."""
    while True:
        a, b, c = (draw.integer(1, 30) for _ in range(3))
        if draw.fresh("+".join(map(str, sorted((a, b, c))))):
            text = f"{a} + {b} + {c}" if draw.chance(0.7) else f"{a} plus {b} plus {c}"
            return draw.loose(draw.say(ASKS, ASKS_NEW)).format(e=text), a + b + c


def raw(draw: Draw) -> Dialogue:
    """Few-shot text without chat tokens."""
    pieces: list[str] = []
    q, a = draw.pick((("Q: ", "A:"), ("Q: ", "A:"), ("Question: ", "Answer:"), ("", "=")))
    lead = draw.pick(("", "", "Calculate.\n", "Answer with a number.\n"))
    for _ in range(draw.integer(2, 6)):
        op = operation(draw)
        x, y, result = pair(draw, op)
        if a == "=":
            prompt = f"{x} {draw.pick(SYMBOLS[op])} {y} ="
        else:
            prompt = f"{q}{draw.say(ASKS, ASKS_NEW).format(e=expression(draw, op, x, y))}\n{a}"
        pieces += [lead + prompt, f" {result}\n"]
        lead = ""
    return Dialogue(KIND, pieces=tuple(pieces))


def draw_arithmetic(draw: Draw) -> Dialogue:
    u = draw.rng.random()
    if u < 0.12:
        return raw(draw)
    messages: list[Message] = draw.system(0.25)
    if draw.chance(0.2):
        messages = [turn("system", draw.pick(SYSTEMS))]
    for _ in range(draw.pick((1, 1, 2, 3, 4))):
        question, result = three(draw) if draw.chance(0.06) else ask(draw)
        messages += [turn("user", question), turn("assistant", str(result))]
        if draw.chance(0.12) and 0 <= result <= 999:
            op, by = draw.pick("+-"), draw.number(2)
            total = result + by if op == "+" else result - by
            if draw.fresh(f"{op} {min(result, by)} {max(result, by)}"):
                question = draw.loose(draw.pick(FOLLOW[op])).format(b=by)
                messages += [turn("user", question), turn("assistant", str(total))]
    return chat(KIND, *messages)
