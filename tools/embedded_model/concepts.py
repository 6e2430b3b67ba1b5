"""Tools beyond calculator and lookup that agents may be given: what they do, how one asks for them, their answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tools.embedded_model import words
from tools.embedded_model.draw import Draw


@dataclass(frozen=True)
class Concept:
    """A tool of any name: `parameters` is one tuple of possible names per argument."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[tuple[str, ...], ...]
    kinds: tuple[str, ...]
    values: Callable[[Draw], tuple[Any, ...]]
    asks: tuple[str, ...]
    new_asks: tuple[str, ...]
    result: Callable[[Draw], str]
    answer: str


CONCEPTS = (
    Concept(
        ("get_weather", "weather", "forecast"),
        ("Get the weather for a city.", "Current weather in a place."),
        (("city", "place", "location"),),
        ("string",),
        lambda d: (d.place(),),
        (
            "What is the weather in {0}?",
            "How is the weather in {0}?",
            "Is it raining in {0}?",
            "Weather in {0}?",
        ),
        ("Do I need an umbrella in {0}?",),
        lambda d: f"{d.integer(0, 35)} degrees and {d.pick(words.CONDITIONS)}",
        "The weather in {0}: {r}.",
    ),
    Concept(
        ("get_time", "clock", "local_time"),
        ("Get the local time of a city.", "What time it is somewhere."),
        (("city", "place", "zone"),),
        ("string",),
        lambda d: (d.place(),),
        ("What time is it in {0}?", "Tell me the time in {0}.", "Local time in {0}?"),
        ("How late is it in {0}?",),
        Draw.clock,
        "It is {r} in {0}.",
    ),
    Concept(
        ("send_message", "message", "notify"),
        ("Send a message to a person.", "Deliver a text to somebody."),
        (("to", "person", "recipient"), ("text", "message", "body")),
        ("string", "string"),
        lambda d: (
            d.person(),
            d.pick(
                (
                    "I am late",
                    "call me back",
                    f"see you at {d.clock()}",
                    f"the {d.thing()} is ready",
                    "thank you",
                )
            ),
        ),
        ("Send a message to {0}: {1}", "Write to {0}: {1}", "Message {0}: {1}"),
        ("Please let {0} know: {1}",),
        lambda d: d.pick(("sent", "ok", "delivered")),
        "Your message to {0} was sent.",
    ),
    Concept(
        ("book_table", "reserve", "reservation"),
        ("Book a table at a restaurant.", "Reserve a table."),
        (("restaurant", "name", "place"), ("guests", "people", "seats")),
        ("string", "integer"),
        lambda d: (d.company(), d.integer(1, 20)),
        (
            "Book a table for {1} at {0}.",
            "Reserve a table at {0} for {1} people.",
            "I need a table for {1} at {0}.",
        ),
        ("{1} of us want to eat at {0}, book it.",),
        lambda d: d.pick(("booked", "ok", "confirmed")),
        "The table for {1} at {0} is booked.",
    ),
    Concept(
        ("set_timer", "timer", "countdown"),
        ("Start a timer.", "Set a timer in minutes."),
        (("minutes", "time", "duration"),),
        ("integer",),
        lambda d: (d.integer(1, 180),),
        ("Set a timer for {0} minutes.", "Start a timer of {0} minutes.", "Timer, {0} minutes."),
        ("Wake me in {0} minutes.",),
        lambda d: d.pick(("started", "ok", "running")),
        "The timer for {0} minutes is set.",
    ),
    Concept(
        ("order_status", "track", "track_order"),
        ("Get the status of an order.", "Track an order."),
        (("order_id", "order", "id"),),
        ("string",),
        lambda d: (d.code(),),
        ("Where is my order {0}?", "What is the status of order {0}?", "Track order {0}."),
        ("How is my order {0} doing?",),
        lambda d: d.pick(words.STATUSES),
        "Order {0} is {r}.",
    ),
    Concept(
        ("translate", "translator", "to_language"),
        ("Translate a word into a language.", "Translation of a word."),
        (("word", "text"), ("language", "to")),
        ("string", "string"),
        lambda d: (
            d.pick(words.THINGS),
            d.pick(("French", "German", "Spanish", "Italian", "Polish", "Latin", "Dutch")),
        ),
        ("Translate {0} into {1}.", "What is {0} in {1}?", "How do you say {0} in {1}?"),
        ("Give me the {1} word for {0}.",),
        Draw.word,
        "In {1}, {0} is {r}.",
    ),
    Concept(
        ("stock_price", "quote", "ticker"),
        ("Get the share price of a company.", "Current share price."),
        (("company", "symbol", "name"),),
        ("string",),
        lambda d: (d.company(),),
        ("What is the share price of {0}?", "How much is a share of {0}?", "Share price of {0}?"),
        ("What are {0} shares worth?",),
        lambda d: str(d.amount()),
        "A share of {0} costs {r}.",
    ),
    Concept(
        ("play_song", "play", "music"),
        ("Play a song.", "Play music by an artist."),
        (("artist", "name", "singer"),),
        ("string",),
        lambda d: (d.full_name(),),
        ("Play something by {0}.", "Play music by {0}.", "I want to hear {0}."),
        ("Put on some {0}.",),
        lambda d: d.pick(("playing", "ok")),
        "Now playing {0}.",
    ),
    Concept(
        ("convert", "exchange", "to_currency"),
        ("Convert an amount of euros into a currency.", "Exchange euros."),
        (("amount", "euros", "value"), ("currency", "to")),
        ("number", "string"),
        lambda d: (d.number(4), d.pick(("dollars", "pounds", "yen", "francs", "pesos", "rupees"))),
        ("Convert {0} euros into {1}.", "How much are {0} euros in {1}?", "{0} euros in {1}?"),
        ("I have {0} euros, how many {1} is that?",),
        lambda d: str(d.number(5)),
        "{0} euros are {r} {1}.",
    ),
    Concept(
        ("create_ticket", "open_ticket", "report"),
        ("Open a support ticket.", "Report a problem."),
        (("title", "problem", "subject"),),
        ("string",),
        lambda d: (d.pick(("broken {}", "missing {}", "wrong {}", "lost {}")).format(d.thing()),),
        ("Open a ticket: {0}", "Please report this: {0}", "Create a ticket about {0}."),
        ("I have a problem, {0}, open a ticket.",),
        lambda d: d.code(),
        "Ticket {r} is open.",
    ),
    Concept(
        ("switch_light", "light", "lamp_control"),
        ("Turn the light of a room on or off.", "Switch the light in a room."),
        (("room", "where"), ("state", "to")),
        ("string", "string"),
        lambda d: (
            d.pick(("kitchen", "bedroom", "hall", "garden", "office", "cellar", "garage", "bathroom")),
            d.pick(("on", "off")),
        ),
        ("Turn {1} the light in the {0}.", "Switch {1} the {0} light.", "Light {1} in the {0}, please."),
        ("I want the {0} light {1}.",),
        lambda d: d.pick(("ok", "done")),
        "The light in the {0} is {1}.",
    ),
)
