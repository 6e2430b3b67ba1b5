"""Facts: what the contexts of the tasks say about invented people, shops, things, orders, towns and events."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tools.embedded_model import words
from tools.embedded_model.draw import Draw


@dataclass(frozen=True)
class FactKind:
    """One relation: `{s}` is the subject and `{v}` the value in every phrasing.

    `who` asks for the subject given the value; the `new_` phrasings exist only in the unseen split.
    """

    label: str
    value: Callable[[Draw], str]
    say: Sequence[str]
    ask: Sequence[str]
    who: Sequence[str] = ()
    new_say: Sequence[str] = ()
    new_ask: Sequence[str] = ()


@dataclass(frozen=True)
class Fact:
    kind: FactKind
    subject: str
    value: str
    sentence: str


K = FactKind
PERSON = (
    K(
        "city",
        Draw.place,
        (
            "{s} lives in {v}.",
            "{s}'s home is in {v}.",
            "{s} moved to {v}.",
            "The home of {s} is in {v}.",
            "{s} is from {v}.",
        ),
        (
            "Where does {s} live?",
            "In which city does {s} live?",
            "What city is {s} from?",
            "Where is {s}'s home?",
            "Which town does {s} live in?",
            "What is {s}'s city?",
            "Where is {s} from?",
        ),
        ("Who lives in {v}?", "Who is from {v}?", "Which person lives in {v}?"),
        ("{s} has a flat in {v}.",),
        ("Which place does {s} call home?", "{s} lives where?"),
    ),
    K(
        "job",
        lambda d: d.pick(words.JOBS),
        ("{s} works as a {v}.", "{s} is a {v}.", "{s}'s job is {v}.", "{s} earns a living as a {v}."),
        (
            "What is {s}'s job?",
            "What does {s} do for a living?",
            "What does {s} work as?",
            "What is the job of {s}?",
            "Which job does {s} have?",
        ),
        ("Who works as a {v}?", "Who is a {v}?", "Whose job is {v}?"),
        ("{s} is employed as a {v}.",),
        ("What kind of work does {s} do?", "What is {s}'s profession?"),
    ),
    K(
        "age",
        lambda d: str(d.integer(18, 99)),
        ("{s} is {v} years old.", "{s} is {v}.", "The age of {s} is {v}.", "{s} turned {v} this year."),
        ("How old is {s}?", "What is {s}'s age?", "What is the age of {s}?"),
        ("Who is {v} years old?", "Who turned {v}?"),
        ("{s} has just turned {v}.",),
        ("Tell me how old {s} is.", "{s} is how old?"),
    ),
    K(
        "pet",
        lambda d: f"{d.pick(words.PETS)} called {d.name_word()}" if d.chance(0.3) else d.pick(words.PETS),
        ("{s} has a {v}.", "{s} owns a {v}.", "{s} keeps a {v} as a pet."),
        (
            "What pet does {s} have?",
            "Which animal does {s} own?",
            "What animal does {s} keep?",
            "What is {s}'s pet?",
        ),
        ("Who has a {v}?", "Who owns a {v}?"),
        ("At home {s} has a {v}.",),
        ("Which pet lives with {s}?",),
    ),
    K(
        "colour",
        lambda d: d.pick(words.COLOURS),
        (
            "{s} likes the colour {v}.",
            "{s}'s favourite colour is {v}.",
            "The favourite colour of {s} is {v}.",
        ),
        ("What is {s}'s favourite colour?", "Which colour does {s} like?", "What colour does {s} like?"),
        ("Who likes {v}?", "Whose favourite colour is {v}?"),
        ("{s} prefers {v} to other colours.",),
        ("Which colour does {s} like most?",),
    ),
    K(
        "food",
        lambda d: d.pick(words.FOODS),
        (
            "{s} likes to eat {v}.",
            "{s}'s favourite food is {v}.",
            "{s} ordered {v}.",
            "{s} eats {v} for lunch.",
        ),
        (
            "What does {s} like to eat?",
            "What is {s}'s favourite food?",
            "Which food does {s} eat?",
            "What did {s} order?",
        ),
        ("Who likes {v}?", "Who ordered {v}?"),
        ("{s} is fond of {v}.",),
        ("Which dish does {s} prefer?",),
    ),
    K(
        "sport",
        lambda d: d.pick(words.SPORTS),
        ("{s} plays {v}.", "{s} is good at {v}.", "In the evening {s} practises {v}."),
        (
            "What does {s} play?",
            "Which sport does {s} practise?",
            "What is {s} good at?",
            "Which sport does {s} do?",
        ),
        ("Who plays {v}?", "Who is good at {v}?"),
        ("{s} trains for {v}.",),
        ("What is {s}'s sport?",),
    ),
    K(
        "phone",
        Draw.phone,
        (
            "{s}'s phone number is {v}.",
            "Call {s} on {v}.",
            "{s} can be reached at {v}.",
            "The phone number of {s} is {v}.",
        ),
        (
            "What is {s}'s phone number?",
            "What is the phone number of {s}?",
            "Which number reaches {s}?",
            "How can I call {s}?",
        ),
        ("Whose phone number is {v}?", "Who can be reached at {v}?"),
        ("To phone {s}, dial {v}.",),
        ("Which number do I dial for {s}?",),
    ),
    K(
        "email",
        Draw.email,
        ("{s}'s email is {v}.", "Write to {s} at {v}.", "The email address of {s} is {v}."),
        (
            "What is {s}'s email?",
            "What is the email address of {s}?",
            "What is {s}'s email address?",
            "Where can I write to {s}?",
        ),
        ("Whose email is {v}?",),
        ("Send mail for {s} to {v}.",),
        ("Give me the email of {s}.",),
    ),
    K(
        "employer",
        Draw.company,
        ("{s} works for {v}.", "{s} is employed by {v}.", "{s} has a job at {v}."),
        (
            "Where does {s} work?",
            "Who does {s} work for?",
            "Who employs {s}?",
            "Which company does {s} work for?",
        ),
        ("Who works for {v}?", "Who is employed by {v}?"),
        ("{v} employs {s}.",),
        ("At which company does {s} have a job?",),
    ),
    K(
        "birthday",
        Draw.date,
        ("{s} was born on {v}.", "{s}'s birthday is {v}.", "The birthday of {s} is {v}."),
        (
            "When was {s} born?",
            "When is {s}'s birthday?",
            "What is {s}'s birthday?",
            "What is the birthday of {s}?",
        ),
        ("Who was born on {v}?", "Whose birthday is {v}?"),
        ("{s} came into the world on {v}.",),
        ("On which date was {s} born?",),
    ),
)
PLACE = (
    K(
        "opening hours",
        Draw.hours,
        (
            "{s} is open from {v}.",
            "The opening hours of {s} are {v}.",
            "{s} opens {v}.",
            "Opening hours at {s}: {v}.",
        ),
        (
            "When is {s} open?",
            "What are the opening hours of {s}?",
            "At what times is {s} open?",
            "What are {s}'s opening hours?",
        ),
        (),
        ("You can visit {s} {v}.",),
        ("During which hours is {s} open?",),
    ),
    K(
        "address",
        lambda d: f"{d.integer(1, 199)} {d.name_word()} {d.pick(('Street', 'Road', 'Lane', 'Avenue', 'Square'))}",
        ("{s} is at {v}.", "The address of {s} is {v}.", "You find {s} at {v}.", "{s} is located at {v}."),
        ("What is the address of {s}?", "Where is {s}?", "Where can I find {s}?", "What is {s}'s address?"),
        ("What is at {v}?",),
        ("{s} stands at {v}.",),
        ("At which address is {s}?",),
    ),
    K(
        "owner",
        Draw.full_name,
        ("{s} is owned by {v}.", "The owner of {s} is {v}.", "{s} belongs to {v}.", "{s} is run by {v}."),
        ("Who owns {s}?", "Who is the owner of {s}?", "Who runs {s}?", "Whom does {s} belong to?"),
        ("What does {v} own?", "What is owned by {v}?"),
        ("{v} is the owner of {s}.",),
        ("To whom does {s} belong?",),
    ),
    K(
        "founded",
        lambda d: str(d.integer(1800, 2030)),
        ("{s} was founded in {v}.", "{s} was opened in {v}.", "{s} has existed since {v}."),
        (
            "When was {s} founded?",
            "In which year was {s} founded?",
            "What year was {s} opened?",
            "Since when has {s} existed?",
        ),
        ("What was founded in {v}?",),
        ("The year {s} started was {v}.",),
        ("In what year did {s} start?",),
    ),
    K(
        "closed",
        lambda d: d.pick(words.WEEKDAYS),
        ("{s} is closed on {v}.", "On {v} {s} is closed.", "{s} does not open on {v}."),
        ("When is {s} closed?", "On which day is {s} closed?", "What day is {s} closed?"),
        ("What is closed on {v}?",),
        ("{s} rests on {v}.",),
        ("Which day does {s} not open?",),
    ),
)
THING = (
    K(
        "price",
        Draw.price,
        (
            "The {s} costs {v}.",
            "The price of the {s} is {v}.",
            "A {s} costs {v}.",
            "The {s} is sold for {v}.",
            "You pay {v} for the {s}.",
        ),
        (
            "How much does the {s} cost?",
            "What is the price of the {s}?",
            "What does the {s} cost?",
            "How much is the {s}?",
            "What do I pay for the {s}?",
            "What is the {s}'s price?",
        ),
        ("What costs {v}?", "Which item costs {v}?"),
        ("The {s} goes for {v}.",),
        ("What would I have to pay for the {s}?", "Price of the {s}?"),
    ),
    K(
        "stock",
        lambda d: str(d.number(3)),
        (
            "There are {v} of the {s} in stock.",
            "The stock of the {s} is {v}.",
            "We have {v} of the {s} left.",
        ),
        (
            "How many of the {s} are in stock?",
            "What is the stock of the {s}?",
            "How many of the {s} are left?",
        ),
        (),
        ("Number of the {s} in stock: {v}.",),
        ("How many of the {s} do we have?",),
    ),
    K(
        "colour",
        lambda d: d.pick(words.COLOURS),
        ("The {s} is {v}.", "The colour of the {s} is {v}.", "The {s} was painted {v}."),
        ("What colour is the {s}?", "What is the colour of the {s}?", "Which colour does the {s} have?"),
        ("What is {v}?", "Which item is {v}?"),
        ("The {s} comes in {v}.",),
        ("The {s} is of which colour?",),
    ),
    K(
        "place",
        lambda d: f"the {d.pick(('kitchen', 'cellar', 'office', 'garden', 'hall', 'attic', 'garage', 'library'))}",
        ("The {s} is in {v}.", "Somebody put the {s} in {v}.", "You find the {s} in {v}."),
        ("Where is the {s}?", "Where can I find the {s}?", "In which room is the {s}?"),
        ("What is in {v}?",),
        ("The {s} was left in {v}.",),
        ("Where did somebody leave the {s}?",),
    ),
    K(
        "weight",
        lambda d: f"{d.number(3)} {d.pick(('kg', 'g', 'pounds'))}",
        ("The {s} weighs {v}.", "The weight of the {s} is {v}."),
        ("How much does the {s} weigh?", "What is the weight of the {s}?", "How heavy is the {s}?"),
        ("What weighs {v}?",),
        ("On the scale the {s} shows {v}.",),
        ("What does the {s} weigh?",),
    ),
    K(
        "maker",
        Draw.company,
        ("The {s} is made by {v}.", "{v} makes the {s}.", "The maker of the {s} is {v}."),
        ("Who makes the {s}?", "Which company makes the {s}?", "Who is the maker of the {s}?"),
        ("What does {v} make?",),
        ("The {s} comes from {v}.",),
        ("By whom is the {s} made?",),
    ),
)
ORDER = (
    K(
        "status",
        lambda d: d.pick(words.STATUSES),
        ("Order {s} is {v}.", "The status of order {s} is {v}.", "Order {s} has the status {v}."),
        (
            "What is the status of order {s}?",
            "What is happening with order {s}?",
            "What is order {s}'s status?",
        ),
        ("Which order is {v}?",),
        ("Right now order {s} is {v}.",),
        ("How is order {s} doing?",),
    ),
    K(
        "customer",
        Draw.full_name,
        ("Order {s} was placed by {v}.", "The customer of order {s} is {v}.", "{v} placed order {s}."),
        ("Who placed order {s}?", "Who is the customer of order {s}?", "Which customer placed order {s}?"),
        ("Which order was placed by {v}?", "What order did {v} place?"),
        ("Order {s} came from {v}.",),
        ("Who made order {s}?",),
    ),
    K(
        "delivery",
        Draw.date,
        (
            "Order {s} will arrive on {v}.",
            "The delivery date of order {s} is {v}.",
            "Order {s} is due on {v}.",
        ),
        ("When will order {s} arrive?", "When is order {s} due?", "What is the delivery date of order {s}?"),
        (),
        ("Expect order {s} on {v}.",),
        ("On which date does order {s} come?",),
    ),
    K(
        "total",
        Draw.price,
        ("The total of order {s} is {v}.", "Order {s} comes to {v}.", "Order {s} costs {v} in all."),
        ("What is the total of order {s}?", "How much is order {s}?", "What does order {s} come to?"),
        (),
        ("The sum for order {s} is {v}.",),
        ("How much does order {s} cost?",),
    ),
)
TOWN = (
    K(
        "population",
        lambda d: str(d.integer(100, 99999)),
        ("{s} has {v} inhabitants.", "The population of {s} is {v}.", "{v} people live in {s}."),
        (
            "How many people live in {s}?",
            "What is the population of {s}?",
            "How many inhabitants does {s} have?",
        ),
        ("Which town has {v} inhabitants?",),
        ("{s} counts {v} people.",),
        ("How large is the population of {s}?",),
    ),
    K(
        "mayor",
        Draw.full_name,
        ("The mayor of {s} is {v}.", "{v} is the mayor of {s}.", "{s}'s mayor is {v}."),
        ("Who is the mayor of {s}?", "What is the name of {s}'s mayor?", "Who is {s}'s mayor?"),
        ("Which town has {v} as mayor?", "Of which town is {v} the mayor?"),
        ("{v} was elected mayor of {s}.",),
        ("What is the mayor of {s} called?",),
    ),
    K(
        "river",
        Draw.name_word,
        ("{s} lies on the river {v}.", "The river {v} flows through {s}.", "The river in {s} is the {v}."),
        ("Which river flows through {s}?", "On which river does {s} lie?", "What is the river in {s}?"),
        ("Which town lies on the river {v}?",),
        ("The {v} crosses {s}.",),
        ("What river crosses {s}?",),
    ),
    K(
        "country",
        Draw.country,
        ("{s} is in {v}.", "{s} is a town in {v}.", "{s} belongs to {v}."),
        ("Which country is {s} in?", "In which country is {s}?", "What country does {s} belong to?"),
        (),
        ("You find {s} in {v}.",),
        ("{s} lies in which country?",),
    ),
    K(
        "weather",
        lambda d: d.pick(words.CONDITIONS),
        ("The weather in {s} is {v}.", "Today it is {v} in {s}.", "{s} is {v} today."),
        ("What is the weather in {s}?", "How is the weather in {s}?", "What is the weather like in {s}?"),
        ("Where is it {v}?",),
        ("In {s} the sky is {v}.",),
        ("What does the weather do in {s}?",),
    ),
)
EVENT = (
    K(
        "date",
        Draw.date,
        ("The {s} takes place on {v}.", "The {s} is on {v}.", "The date of the {s} is {v}."),
        (
            "When is the {s}?",
            "On which date is the {s}?",
            "What is the date of the {s}?",
            "When does the {s} take place?",
        ),
        ("What takes place on {v}?",),
        ("The {s} was set for {v}.",),
        ("Which day is the {s} on?",),
    ),
    K(
        "time",
        Draw.clock,
        ("The {s} starts at {v}.", "The {s} begins at {v}.", "The start of the {s} is at {v}."),
        ("What time does the {s} start?", "When does the {s} begin?", "At what time does the {s} start?"),
        ("What starts at {v}?",),
        ("Be there at {v} for the {s}.",),
        ("The {s} starts when?",),
    ),
    K(
        "room",
        lambda d: f"room {d.integer(1, 400)}",
        ("The {s} is held in {v}.", "The {s} takes place in {v}.", "For the {s} go to {v}."),
        (
            "Where is the {s} held?",
            "Which room is the {s} in?",
            "In which room is the {s}?",
            "Where is the {s}?",
        ),
        ("What is held in {v}?",),
        ("The {s} happens in {v}.",),
        ("In which room does the {s} happen?",),
    ),
    K(
        "host",
        Draw.full_name,
        ("The {s} is led by {v}.", "{v} leads the {s}.", "The host of the {s} is {v}."),
        ("Who leads the {s}?", "Who is the host of the {s}?", "Who hosts the {s}?"),
        ("What does {v} lead?", "What is led by {v}?"),
        ("{v} is in charge of the {s}.",),
        ("Who is in charge of the {s}?",),
    ),
)


def _event(draw: Draw) -> str:
    sort = draw.pick(
        (
            "meeting",
            "workshop",
            "concert",
            "lecture",
            "party",
            "course",
            "race",
            "show",
            "dinner",
            "interview",
        )
    )
    return f"{draw.name_word()} {sort}" if draw.chance(0.6) else f"{draw.pick(words.ADJECTIVES)} {sort}"


def _thing(draw: Draw) -> str:
    return draw.thing()


CLASSES: tuple[tuple[Callable[[Draw], str], tuple[FactKind, ...]], ...] = (
    (Draw.person, PERSON),
    (Draw.person, PERSON),
    (Draw.company, PLACE),
    (_thing, THING),
    (Draw.code, ORDER),
    (Draw.place, TOWN),
    (_event, EVENT),
)


def state(draw: Draw, kind: FactKind, subject: str, value: str) -> Fact:
    """The fact in one drawn sentence."""
    sentence = draw.say(kind.say, kind.new_say).format(s=subject, v=value)
    return Fact(kind, subject, value, sentence[0].upper() + sentence[1:])


MONTHS = {month.lower(): f"month {i + 1}" for i, month in enumerate(words.MONTHS)}
SPELLINGS = {**MONTHS, "$": "dollars", "€": "euros", "eur": "euros", "£": "pounds"}
PAINTED = next(kind for kind in THING if kind.label == "colour")
SAME_QUESTION = {"total": "price"}  # "What costs $5?" fits an order too


@lru_cache(maxsize=4096)  # drawing a context compares the same values many times
def meaning(value: str) -> frozenset[str]:
    """What a value says, however it is written: "May 5" and "5 May", "2 pm" and "14:00", "$5" and "5 dollars"."""
    value = re.sub(r"(\d+) ([ap])m\b", lambda m: f"{int(m[1]) % 12 + 12 * (m[2] == 'p')}:00", value)
    value = re.sub(r"(\d{4})-(\d\d)-(\d\d)", lambda m: f"{m[1]} {words.MONTHS[int(m[2]) - 1]} {int(m[3])}", value)
    return frozenset(SPELLINGS.get(word, word) for word in re.findall(r"\d+[:.]\d+|\w+|[$€£]", value.lower()))


def rivals(a: Fact, b: Fact) -> bool:
    """Whether a question that names the value of one fact could be answered with the subject of the other.

    So it is if one value says what the other says or a part of it ("Who has a cat?" where one has a cat and one a cat
    called Mira; "Who was born on 5 May?" of 5 May and of 5 May 1990), or if a subject is called by a thing's colour
    ("What is red?" of a cup that is red and a red lamp).
    """
    if SAME_QUESTION.get(a.kind.label, a.kind.label) == SAME_QUESTION.get(b.kind.label, b.kind.label):
        first, second = meaning(a.value), meaning(b.value)
        if first <= second or second <= first:
            return True
    return any(
        p.kind is PAINTED and p.subject != q.subject and p.value in q.subject.split() for p, q in ((a, b), (b, a))
    )


def world(draw: Draw, n: int, classes: int = 3, narrow: bool = False) -> list[Fact]:
    """`n` facts, some subjects with several; no two of one kind share a subject, none answers another's question.

    The subjects are of one to `classes` of the classes above. A `narrow` world has one or two kinds of fact in each, so
    that only the value tells its facts apart.
    """
    facts: list[Fact] = []
    drawn = draw.some(CLASSES, draw.integer(1, classes))
    if narrow:
        drawn = [(make, tuple(draw.some([k for k in kinds if k.who], draw.integer(1, 2)))) for make, kinds in drawn]
    tries = 0
    while len(facts) < n and tries < 4 * n + 20:
        make, kinds = draw.pick(drawn)
        subject = make(draw)
        if any(subject in f.subject or f.subject in subject for f in facts):
            tries += 1
            continue
        for kind in draw.some(kinds, draw.pick((1, 1, 1, 2, 2, 3))):
            fact = Fact(kind, subject, kind.value(draw), "")
            tries += 1
            if len(facts) < n and not any(rivals(fact, other) for other in facts):
                facts.append(state(draw, kind, subject, fact.value))
    draw.rng.shuffle(facts)
    return facts


def question(draw: Draw, fact: Fact) -> str:
    return draw.loose(draw.say(fact.kind.ask, fact.kind.new_ask)).format(s=fact.subject, v=fact.value)


def reverse_question(draw: Draw, fact: Fact) -> str:
    return draw.loose(draw.pick(fact.kind.who)).format(s=fact.subject, v=fact.value)


def article(draw: Draw, facts: Sequence[Fact], fillers: float = 0.2, lists: float = 0.15) -> str:
    """The facts as running text or as a list of lines, with filler sentences in between."""
    if draw.chance(lists):
        mark = draw.pick(("- ", "* ", "", "• "))
        return "\n".join(f"{mark}{f.subject} {draw.pick(('-', '/', '|'))} {f.kind.label}: {f.value}" for f in facts)
    sentences = _sentences(draw, facts, fillers)
    if draw.chance(0.12):
        return "\n".join(f"- {s}" for s in sentences)
    return ("\n" if draw.chance(0.1) else " ").join(sentences)


def prose(draw: Draw, facts: Sequence[Fact], fillers: float = 0.3) -> str:
    """The facts' own sentences, with filler sentences in between."""
    return ("\n" if draw.chance(0.1) else " ").join(_sentences(draw, facts, fillers))


def _sentences(draw: Draw, facts: Sequence[Fact], fillers: float) -> list[str]:
    sentences: list[str] = []
    for fact in facts:
        if draw.chance(fillers):
            sentences.append(draw.say(words.FILLERS, words.FILLERS + words.FILLERS_NEW))
        sentences.append(fact.sentence)
    return sentences
