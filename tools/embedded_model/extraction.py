"""json_extraction: the asked fields of a message as one JSON object, in the asked order, null where it is silent."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tools.embedded_model import words
from tools.embedded_model.dialogue import Dialogue, chat, turn
from tools.embedded_model.draw import Draw

KIND = "json_extraction"


@dataclass(frozen=True)
class Field:
    """`keys` are names a program may give the field, `say` the sentences that state it (`{v}`)."""

    keys: tuple[str, ...]
    value: Callable[[Draw], Any]
    say: tuple[str, ...]
    new_say: tuple[str, ...] = ()


FIELDS = (
    Field(
        ("name", "customer", "customer_name", "full_name", "person"),
        Draw.person,
        (
            "My name is {v}.",
            "I am {v}.",
            "This is {v}.",
            "{v} here.",
            "Hello, {v} speaking.",
            "The customer is {v}.",
            "Name: {v}.",
            "Booked by {v}.",
        ),
        ("You are talking to {v}.",),
    ),
    Field(
        ("email", "mail", "email_address"),
        Draw.email,
        ("My email is {v}.", "Write to {v}.", "You can reach me at {v}.", "Email: {v}.", "Send it to {v}."),
        ("My mailbox is {v}.",),
    ),
    Field(
        ("phone", "phone_number", "telephone"),
        Draw.phone,
        ("My phone number is {v}.", "Call me on {v}.", "Phone: {v}.", "My number is {v}."),
        ("Ring me at {v}.",),
    ),
    Field(
        ("city", "town", "location"),
        Draw.place,
        (
            "I live in {v}.",
            "I am from {v}.",
            "Deliver it to {v}.",
            "I am writing from {v}.",
            "City: {v}.",
            "We are in {v}.",
        ),
        ("My home town is {v}.",),
    ),
    Field(
        ("age", "years"),
        lambda d: d.integer(1, 99),
        ("I am {v} years old.", "My age is {v}.", "Age: {v}.", "I turned {v}."),
        ("I have reached {v} years.",),
    ),
    Field(
        ("date", "day", "booking_date"),
        Draw.date,
        ("It is for {v}.", "The date is {v}.", "Please come on {v}.", "Date: {v}.", "It happened on {v}."),
        ("Put {v} in the diary.",),
    ),
    Field(
        ("time", "hour", "start_time"),
        Draw.clock,
        ("At {v}, please.", "The time is {v}.", "Time: {v}.", "I will be there at {v}.", "Around {v}."),
        ("Say {v}.",),
    ),
    Field(
        ("item", "product", "article"),
        Draw.thing,
        (
            "I ordered a {v}.",
            "I want a {v}.",
            "I need a {v}.",
            "It is about the {v}.",
            "Item: {v}.",
            "The product is the {v}.",
        ),
        ("I am after a {v}.",),
    ),
    Field(
        ("quantity", "count", "amount", "number"),
        lambda d: d.number(3),
        (
            "I need {v} of them.",
            "{v} pieces, please.",
            "Quantity: {v}.",
            "Send {v} units.",
            "I want {v} of it.",
        ),
        ("Make that {v} pieces.",),
    ),
    Field(
        ("price", "cost", "total"),
        Draw.amount,
        (
            "I paid ${v}.",
            "The price was {v} euros.",
            "It cost {v} dollars.",
            "Price: {v}.",
            "The total is €{v}.",
        ),
        ("They charged {v} dollars.",),
    ),
    Field(
        ("order", "order_id", "order_number"),
        Draw.code,
        (
            "My order is {v}.",
            "The order number is {v}.",
            "It is about order {v}.",
            "Order: {v}.",
            "Order {v} it is.",
        ),
        ("The reference is order {v}.",),
    ),
    Field(
        ("company", "employer", "firm"),
        Draw.company,
        ("I work for {v}.", "My company is {v}.", "I am with {v}.", "Company: {v}."),
        ("My firm is called {v}.",),
    ),
    Field(
        ("colour", "color"),
        lambda d: d.pick(words.COLOURS),
        ("In {v}, please.", "The colour is {v}.", "Colour: {v}.", "I would like it in {v}."),
        ("Make it {v}.",),
    ),
    Field(
        ("guests", "people", "party_size"),
        lambda d: d.integer(1, 40),
        ("We are {v} people.", "A table for {v}.", "Guests: {v}.", "There will be {v} of us."),
        ("Expect {v} people.",),
    ),
    Field(
        ("job", "profession", "occupation"),
        lambda d: d.pick(words.JOBS),
        ("I work as a {v}.", "My job is {v}.", "Job: {v}.", "I am a {v}."),
        ("By trade I am a {v}.",),
    ),
    Field(
        ("country", "nation"),
        Draw.country,
        ("My country is {v}.", "Country: {v}.", "Ship it to {v}, my country.", "My passport is from {v}."),
        ("I am a citizen of {v}.",),
    ),
    Field(
        ("status", "state"),
        lambda d: d.pick(words.STATUSES),
        ("The status is {v}.", "Status: {v}.", "It says the order is {v}."),
        ("The page shows {v}.",),
    ),
)
STARTS = ("Hi! ", "Hello, ", "Good morning. ", "Dear team, ", "", "", "", "", "Hey, ")
ENDS = (" Thanks!", " Thank you.", " Best wishes", " Please help.", "", "", "", "", " Bye!")
ASKS = (
    "Extract {k} as JSON.\n\n{t}",
    "{t}\n\nExtract {k} as JSON.",
    "Extract the fields {k} from this message as JSON:\n{t}",
    "Give me a JSON object with the keys {k}.\n{t}",
    "Message: {t}\nReturn JSON with {k}.",
    "Return {k} as JSON: {t}",
    "{t}\nJSON with keys {k}:",
    "From the message, fill in JSON with {k}.\n\nMessage: {t}",
    "Text: {t}\nFields: {k}\nJSON:",
    "Turn this into JSON ({k}):\n{t}",
    "{t}\n\nWrite {k} as a JSON object.",
    "Extract as JSON: {k}\n\n{t}",
)
ASKS_NEW = (
    "I need {k} in JSON form from the text: {t}",
    "Here is a message: {t}\nPut {k} into JSON.",
    "Read the message and output JSON having {k}.\n{t}",
)
SYSTEM_ASKS = (
    "Extract {k} from each message as JSON.",
    "You turn messages into JSON with the keys {k}.",
    "Answer only with JSON. Keys: {k}. Use null for what is missing.",
    "You are an extraction engine. Fields: {k}.",
)
SYSTEM_ASKS_NEW = ("For every message write JSON having {k}.",)
TOPICS = (
    "price",
    "weight",
    "stock",
    "colour",
    "size",
    "status",
    "warranty",
    "delivery time",
    "maker",
    "age",
    "address",
    "opening hours",
)


def _keys(draw: Draw, keys: list[str]) -> str:
    u = draw.rng.random()
    if u < 0.45:
        return ", ".join(keys)
    if u < 0.65 and len(keys) > 1:
        return ", ".join(keys[:-1]) + " and " + keys[-1]
    if u < 0.75:
        return json.dumps(keys)
    if u < 0.85:
        return "{" + ", ".join(f'"{k}": ...' for k in keys) + "}"
    return ", ".join(f'"{k}"' for k in keys)


def _message(draw: Draw, wanted: list[Field], silent: float) -> tuple[str, list[Any]]:
    """A message that states most of the wanted fields and some others; the values, None where not stated."""
    values: list[Any] = []
    sentences: list[str] = []
    for field in wanted:
        value = None if draw.chance(silent) else field.value(draw)
        values.append(value)
        if value is not None:
            spoken: Any = value
            if isinstance(value, int) and 1 < value <= 12 and draw.chance(0.2):
                spoken = words.NUMBER_WORDS[value]
            sentence = draw.say(field.say, field.new_say).format(v=spoken)
            sentences.append(sentence[0].upper() + sentence[1:])
    taken = {field.keys for field in wanted}
    for field in draw.some([f for f in FIELDS if f.keys not in taken], draw.pick((0, 0, 1, 1, 2, 3))):
        sentences.append(draw.pick(field.say).format(v=field.value(draw)))
    if draw.chance(0.3) or not sentences:
        sentences.append(draw.say(words.FILLERS, words.FILLERS_NEW))
    draw.rng.shuffle(sentences)
    glue = "\n" if draw.chance(0.12) else " "
    return draw.pick(STARTS) + glue.join(sentences) + draw.pick(ENDS), values


def extract(draw: Draw) -> Dialogue:
    wanted = draw.some(FIELDS, draw.pick((1, 2, 2, 3, 3, 4, 5, 6)))
    keys = [draw.pick(field.keys) for field in wanted]
    if len({*keys}) < len(keys):
        return extract(draw)
    silent = draw.pick((0.0, 0.0, 0.15, 0.4))
    asked = _keys(draw, keys)
    rounds = []
    for _ in range(draw.pick((1, 1, 1, 2, 3))):
        text, values = _message(draw, wanted, silent)
        rounds.append((text, json.dumps(dict(zip(keys, values, strict=True)), ensure_ascii=False)))
    if len(rounds) > 1 or draw.chance(0.2):
        system = turn("system", draw.say(SYSTEM_ASKS, SYSTEM_ASKS_NEW).format(k=asked))
        turns = [m for text, answer in rounds for m in (turn("user", text), turn("assistant", answer))]
        return chat(KIND, system, *turns)
    text, answer = rounds[0]
    prompt = draw.say(ASKS, ASKS_NEW).format(k=asked, t=text)
    return chat(KIND, *draw.system(), turn("user", prompt), turn("assistant", answer))


def plan(draw: Draw) -> Dialogue:
    """What a ticket wants looked up, as {"queries": [...]}: the first step of a fork/join program."""
    n = draw.integer(1, 4)
    queries: list[str] = []
    for _ in range(n):
        subject = draw.pick((draw.thing, draw.thing, draw.company, draw.code))()
        queries.append(f"{draw.pick(TOPICS)} of {subject}")
    parts = [draw.pick(("the {}", "the {}", "{}")).format(q) for q in queries]
    listed = parts[0] if n == 1 else ", ".join(parts[:-1]) + draw.pick((" and ", ", and ")) + parts[-1]
    asks = (
        "I need {l}.",
        "What is {l}?",
        "Please tell me {l}.",
        "Can you tell me {l}?",
        "I would like to know {l}.",
        "Find {l}.",
    )
    ask = draw.pick(STARTS) + draw.say(asks, ("My question is about {l}.",)).format(l=listed) + draw.pick(ENDS)
    jobs = (
        "List what to look up as JSON.",
        'Answer with JSON: {"queries": [...]}.',
        "Plan the lookups as JSON with the key queries.",
        "Write the queries as JSON.",
        "Which lookups are needed? Answer as JSON with queries.",
    )
    job = draw.say(jobs, ("Give the list of lookups in JSON, key queries.",))
    answer = json.dumps({"queries": queries}, ensure_ascii=False)
    if draw.chance(0.5):
        lead = draw.pick(("", "You are a support agent. ", "You plan lookups. "))
        return chat(KIND, turn("system", lead + job), turn("user", ask), turn("assistant", answer))
    return chat(
        KIND,
        *draw.system(),
        turn("user", f"{ask}\n\n{job}" if draw.chance(0.7) else f"{job}\n{ask}"),
        turn("assistant", answer),
    )


def draw_extraction(draw: Draw) -> Dialogue:
    return extract(draw) if draw.chance(0.85) else plan(draw)
