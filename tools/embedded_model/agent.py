"""tool_use: multi-turn agents. Every assistant turn is graded: the calls, and the answers made from their results."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tools.embedded_model import smalltalk, words
from tools.embedded_model.concepts import CONCEPTS, Concept
from tools.embedded_model.dialogue import Dialogue, Message, tool_call, turn
from tools.embedded_model.draw import Draw

KIND = "tool_use"
Tool = dict[str, Any]


def function(name: str, description: str, /, **parameters: str) -> Tool:
    """An OpenAI function tool; `parameters` are name=JSON type, all required."""
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


CALCULATORS = (
    "Evaluate an arithmetic expression.",
    "Calculate an expression.",
    "Does sums.",
    "Computes the value of an expression.",
    "A calculator for + - * /.",
)
LOOKUPS = (
    "Look up a fact by its key.",
    "Find a value in the database.",
    "Returns what is stored for a key.",
    "Search the catalogue.",
    "Look something up.",
)


@dataclass
class Desk:
    """The agent's desk while one dialogue is drawn: which tools it has, how results come, what was said."""

    draw: Draw
    plain: bool  # tools described in the system text, results as user turns
    messages: list[Message] = field(default_factory=list)
    tools: list[Tool] = field(default_factory=list)
    prices: dict[str, int] = field(default_factory=dict)

    def user(self, text: str) -> None:
        self.messages.append(turn("user", text))

    def say(self, text: str) -> None:
        self.messages.append(turn("assistant", text))

    def call(self, name: str, arguments: dict[str, Any], result: Any) -> None:
        self.messages.append(turn("assistant", tool_call(name, arguments)))
        text = result if isinstance(result, str) else json.dumps(result)
        if not self.plain:
            self.messages.append(turn("tool", text))
        else:
            lead = self.draw.pick(("Result: ", "Tool result: ", f"{name} returned: ", "Observation: "))
            self.messages.append(turn("user", lead + text))


# ---------------------------------------------------------------------------------------------------- calculator
BINARY = {
    "+": ("{a} + {b}", "{a} plus {b}", "the sum of {a} and {b}"),
    "-": ("{a} - {b}", "{a} minus {b}"),
    "*": ("{a} * {b}", "{a} times {b}", "{a} x {b}", "{a} multiplied by {b}"),
    "/": ("{a} / {b}", "{a} divided by {b}"),
}
SUM_ASKS = (
    "What is {e}?",
    "Calculate {e}.",
    "How much is {e}?",
    "Compute {e}.",
    "{e}",
    "{e} = ?",
    "Work out {e}.",
    "I need {e}.",
)
SUM_ASKS_NEW = ("Tell me the value of {e}.", "Could you do {e} for me?")


def value_of(expression: str) -> str:
    """The calculator: whole results as integers, others with at most two decimals."""
    value = round(float(eval(expression, {"__builtins__": {}})), 2)  # digits and + - * / ( ) of our own making
    return str(int(value)) if value == int(value) else str(value)


def sums(desk: Desk) -> None:
    draw = desk.draw
    if draw.chance(0.25):
        parts = [str(draw.number(4)) for _ in range(draw.integer(3, 4))]
        expression = parts[0] + "".join(f" {draw.pick('+-*')} {p}" for p in parts[1:])
        if draw.chance(0.4):
            expression = f"({draw.number(3)} {draw.pick('+-')} {draw.number(3)}) {draw.pick('*+')} {draw.number(3)}"
        spoken = expression
    else:
        op, a, b = draw.pick("+-**/"), draw.number(5), draw.number(5)
        expression, spoken = f"{a} {op} {b}", draw.pick(BINARY[op]).format(a=a, b=b)
    desk.user(draw.loose(draw.say(SUM_ASKS, SUM_ASKS_NEW)).format(e=spoken))
    result = value_of(expression)
    desk.call("calculator", {"expression": expression}, result)
    desk.say(f"The result is {result}.")


# -------------------------------------------------------------------------------------------------------- lookup
@dataclass(frozen=True)
class Topic:
    name: str
    subject: Callable[[Draw], str]
    value: Callable[[Draw], str]
    asks: tuple[str, ...] = ()


TOPICS = (
    Topic(
        "weight",
        Draw.thing,
        lambda d: f"{d.number(3)} kg",
        ("How heavy is the {s}?", "How much does the {s} weigh?"),
    ),
    Topic(
        "stock",
        Draw.thing,
        lambda d: str(d.number(3)),
        ("How many of the {s} are in stock?", "How many of the {s} do we have?"),
    ),
    Topic("colour", Draw.thing, lambda d: d.pick(words.COLOURS), ("What colour is the {s}?",)),
    Topic("maker", Draw.thing, Draw.company, ("Who makes the {s}?",)),
    Topic("size", Draw.thing, lambda d: f"{d.number(3)} cm"),
    Topic("warranty", Draw.thing, lambda d: f"{d.integer(2, 60)} months"),
    Topic(
        "status",
        lambda d: f"order {d.code()}",
        lambda d: d.pick(words.STATUSES),
        ("Where is {s}?", "What is happening with {s}?"),
    ),
    Topic("total", lambda d: f"order {d.code()}", Draw.price, ("How much is {s}?",)),
    Topic("opening hours", Draw.company, Draw.hours, ("When is {s} open?", "At what times is {s} open?")),
    Topic(
        "address",
        Draw.company,
        lambda d: f"{d.integer(1, 199)} {d.name_word()} Street",
        ("Where is {s}?", "Where can I find {s}?"),
    ),
    Topic("owner", Draw.company, Draw.full_name, ("Who owns {s}?", "Who runs {s}?")),
    Topic("phone number", Draw.person, Draw.phone, ("How can I call {s}?",)),
    Topic("email", Draw.person, Draw.email, ("How can I write to {s}?",)),
    Topic(
        "job",
        Draw.person,
        lambda d: d.pick(words.JOBS),
        ("What does {s} do for a living?", "What does {s} work as?"),
    ),
    Topic("birthday", Draw.person, Draw.date, ("When was {s} born?",)),
    Topic("population", Draw.place, lambda d: str(d.integer(100, 999999)), ("How many people live in {s}?",)),
    Topic("mayor", Draw.place, Draw.full_name, ("Who runs the town of {s}?",)),
    Topic("capital", Draw.country, Draw.place, ("Which city is the capital of {s}?",)),
    Topic("distance", Draw.place, lambda d: f"{d.number(4)} km", ("How far away is {s}?", "How far is {s}?")),
)
OF_ASKS = (
    "What is the {t} of {the}{s}?",
    "Tell me the {t} of {the}{s}.",
    "I need the {t} of {the}{s}.",
    "What's the {t} of {the}{s}?",
    "Find the {t} of {the}{s}.",
    "Do you know the {t} of {the}{s}?",
    "Look up the {t} of {the}{s}.",
    "{t} of {the}{s}?",
)
OF_ASKS_NEW = ("Give me the {t} of {the}{s}.", "I would love to know the {t} of {the}{s}.")
PRICE_ASKS = (
    "How much is a {s}?",
    "What does the {s} cost?",
    "What is the price of the {s}?",
    "How much does a {s} cost?",
    "Price of {s}?",
)
PRICE_ASKS_NEW = ("What do you charge for the {s}?", "What must I pay for one {s}?")
MANY_ASKS = (
    "How much are {n} {p}?",
    "What do {n} {p} cost?",
    "I want {n} {p}. What is the total?",
    "What is the total for {n} {p}?",
    "How much do I pay for {n} {p}?",
    "Total price of {n} {p}?",
    "How much would {n} {p} be?",
)
MANY_ASKS_NEW = ("I take {n} {p}, what does that make?", "Give me the price for {n} {p}.")
MORE_ASKS = (
    "And {n} of them?",
    "What about {n}?",
    "And for {n}?",
    "How much for {n} of them?",
    "And {n} {p}?",
    "I want {n}. How much?",
)
MORE_ASKS_NEW = ("Make it {n}, what then?",)
NEXT_ASKS = ("And the {s}?", "What about the {s}?", "And a {s}?", "How about the {s}?")
NEXT_ASKS_NEW = ("Same question for the {s}.",)
DIFFERENCE_ASKS = (
    "How much more does the {a} cost than the {b}?",
    "What is the price difference between the {a} and the {b}?",
    "How much more expensive is the {a} than the {b}?",
)
DIFFERENCE_ASKS_NEW = ("By how much is the {a} dearer than the {b}?",)
BOTH_ASKS = (
    "What do the {a} and the {b} cost together?",
    "I buy a {a} and a {b}. What is the total?",
    "Total for one {a} and one {b}?",
    "How much are the {a} and the {b} together?",
)
BOTH_ASKS_NEW = ("What do I pay for the {a} plus the {b}?",)
MISSING = (
    "not found",
    "unknown",
    "error: not found",
    "null",
    "no entry",
    '{"error": "not found"}',
    "none",
    "Error: unknown key",
    "no result",
)


def item(draw: Draw, taken: dict[str, int]) -> str:
    while True:
        thing = draw.thing()
        if not any(thing in t or t in thing for t in taken) and not thing.endswith(("s", "x", "h", "y")):
            return thing


def lookup_price(desk: Desk, thing: str) -> int | None:
    """Look the price up unless it was found before; None (and the apology said) if there is none."""
    if thing in desk.prices:
        return desk.prices[thing]
    if desk.draw.chance(0.08):
        desk.call("lookup", {"key": f"price of {thing}"}, desk.draw.pick(MISSING))
        desk.say(f"I could not find the price of {thing}.")
        return None
    price = desk.draw.number(3)
    desk.call("lookup", {"key": f"price of {thing}"}, str(price))
    desk.prices[thing] = price
    return price


def calculate(desk: Desk, expression: str) -> str:
    result = value_of(expression)
    desk.call("calculator", {"expression": expression}, result)
    return result


def fact(desk: Desk) -> None:
    draw = desk.draw
    topic = draw.pick(TOPICS)
    subject = topic.subject(draw)
    the = "the " if topic.subject is Draw.thing and draw.chance(0.7) else ""
    template = draw.pick(topic.asks) if topic.asks and draw.chance(0.4) else draw.say(OF_ASKS, OF_ASKS_NEW)
    desk.user(draw.loose(template).format(t=topic.name, s=subject, the=the))
    key = f"{topic.name} of {subject}"
    if draw.chance(0.15):
        desk.call("lookup", {"key": key}, draw.pick(MISSING))
        desk.say(f"I could not find the {key}.")
        return
    value = topic.value(draw)
    desk.call("lookup", {"key": key}, value)
    desk.say(f"The {key} is {value}.")


def price(desk: Desk) -> None:
    """The price of one thing, then perhaps of another."""
    draw = desk.draw
    for i in range(draw.pick((1, 1, 2))):
        thing = item(draw, desk.prices)
        seen, new = (PRICE_ASKS, PRICE_ASKS_NEW) if i == 0 else (NEXT_ASKS, NEXT_ASKS_NEW)
        desk.user(draw.loose(draw.say(seen, new)).format(s=thing))
        found = lookup_price(desk, thing)
        if found is None:
            return
        desk.say(f"The price of {thing} is {found}.")
    if draw.chance(0.35) and len(desk.prices) == 1:
        many(desk, thing)


def many(desk: Desk, thing: str | None = None) -> None:
    """The total for several: look the price up, then calculate; follow-ups reuse the price."""
    draw = desk.draw
    follow = thing is not None
    thing = thing or item(draw, desk.prices)
    for _ in range(draw.pick((1, 1, 2))):
        n = draw.integer(2, 99)
        seen, new = (MORE_ASKS, MORE_ASKS_NEW) if follow else (MANY_ASKS, MANY_ASKS_NEW)
        desk.user(draw.loose(draw.say(seen, new)).format(n=n, p=words.plural(thing)))
        found = lookup_price(desk, thing)
        if found is None:
            return
        result = calculate(desk, f"{n} * {found}")
        desk.say(f"{n} {words.plural(thing)} cost {result}.")
        follow = True


def two_prices(desk: Desk) -> None:
    """Two lookups and a calculation."""
    draw = desk.draw
    a = item(draw, desk.prices)
    b = item(draw, desk.prices | {a: 0})
    both = draw.chance(0.5)
    seen, new = (BOTH_ASKS, BOTH_ASKS_NEW) if both else (DIFFERENCE_ASKS, DIFFERENCE_ASKS_NEW)
    desk.user(draw.loose(draw.say(seen, new)).format(a=a, b=b))
    first = lookup_price(desk, a)
    if first is None:
        return
    second = lookup_price(desk, b)
    if second is None:
        return
    result = calculate(desk, f"{first} {'+' if both else '-'} {second}")
    desk.say(f"The {a} and the {b} cost {result}." if both else f"The difference is {result}.")


def concept_tool(draw: Draw, concept: Concept) -> tuple[Tool, list[str]]:
    """The concept as a tool with a usual or an invented name, and its argument names."""
    name = draw.pick(concept.names) if draw.chance(0.6) else draw.word() + draw.pick(("", "_tool", "_" + draw.word()))
    arguments = [draw.pick(names) for names in concept.parameters]
    return function(
        name, draw.pick(concept.descriptions), **dict(zip(arguments, concept.kinds, strict=True))
    ), arguments


def use_concept(desk: Desk, concept: Concept, tool: Tool, arguments: list[str]) -> None:
    draw = desk.draw
    values = concept.values(draw)
    desk.user(draw.loose(draw.say(concept.asks, concept.new_asks)).format(*values))
    call = dict(zip(arguments, values, strict=True))
    name = tool["function"]["name"]
    if draw.chance(0.07):
        desk.call(
            name,
            call,
            draw.pick(
                (
                    "error: service unavailable",
                    "error: timeout",
                    "error: try again later",
                    '{"error": "failed"}',
                )
            ),
        )
        desk.say("That did not work.")
        return
    result = concept.result(draw)
    desk.call(name, call, result)
    desk.say(concept.answer.format(*values, r=result))


# ---------------------------------------------------------------------------------------------------- dialogues
def described(draw: Draw, tools: list[Tool]) -> str:
    """The tools in plain words, for programs that write their own system turn."""
    lines = [
        f"{t['function']['name']}({', '.join(t['function']['parameters']['properties'])}): "
        f"{t['function']['description']}"
        for t in tools
    ]
    mark = draw.pick(("- ", "", "* "))
    head = draw.pick(("Tools:", "You have these tools:", "You can use these tools:", "Available tools:"))
    tail = draw.pick(
        (
            "",
            "",
            'Call a tool with <tool_call>{"name": ..., "arguments": {...}}</tool_call>.',
            'To call a tool write <tool_call>{"name": ..., "arguments": {...}}</tool_call>',
        )
    )
    return "\n".join([head, *(mark + line for line in lines), *([tail] if tail else [])])


def draw_agent(draw: Draw) -> Dialogue:
    """Tools at hand, then one to three errands, now and then small talk that needs no tool."""
    desk = Desk(draw, plain=draw.chance(0.3))
    calculator = function("calculator", draw.pick(CALCULATORS), expression="string")
    lookup = function("lookup", draw.pick(LOOKUPS), key="string")
    concepts = [(c, *concept_tool(draw, c)) for c in draw.some(CONCEPTS, draw.pick((0, 0, 1, 1, 2, 3, 4)))]
    if len({t["function"]["name"] for _, t, _ in concepts}) < len(concepts):
        return draw_agent(draw)
    errands: list[Callable[[Desk], None]] = []
    desk.tools = [t for _, t, _ in concepts]
    if not concepts or draw.chance(0.75):
        desk.tools += [calculator, lookup]
        errands += [sums, fact, price, many, many, two_prices]
    for concept, tool, arguments in concepts:
        errands += [lambda d, c=concept, t=tool, a=arguments: use_concept(d, c, t, a)] * 2  # type: ignore[misc]
    draw.rng.shuffle(desk.tools)
    system = draw.system(0.5)
    if desk.plain:
        lead = system[0]["content"] + draw.pick(("\n", "\n\n", " ")) if system else ""
        system = [turn("system", lead + described(draw, desk.tools))]
    desk.messages = list(system)
    for _ in range(draw.pick((1, 1, 2, 3))):
        if draw.chance(0.12):
            question, answer = smalltalk.exchange(draw)
            desk.user(question)
            desk.say(answer)
        if draw.chance(0.9):
            draw.pick(errands)(desk)
    if len(desk.messages) == len(system):
        return draw_agent(draw)
    graded = tuple(i for i, m in enumerate(desk.messages) if m["role"] == "assistant")
    return Dialogue(KIND, tuple(desk.messages), graded, () if desk.plain else tuple(desk.tools))
