"""choice: one of several given options: closed label sets, yes/no about a context, options named in a context."""

from __future__ import annotations

from tools.embedded_model import facts, words
from tools.embedded_model.dialogue import Dialogue, Message, chat, turn
from tools.embedded_model.draw import Draw

KIND = "choice"

GOOD = ("good", "great", "excellent", "wonderful", "lovely", "perfect", "fantastic", "amazing", "superb", "brilliant",
        "delightful", "pleasant", "nice", "outstanding", "beautiful")  # fmt: skip
BAD = ("bad", "awful", "terrible", "horrible", "poor", "broken", "useless", "disappointing", "dreadful", "ugly", "nasty",
       "unpleasant", "disgusting", "annoying", "worthless")  # fmt: skip
PLAIN = ("average", "ordinary", "standard", "acceptable", "normal", "as expected", "okay", "usual", "typical", "neither good nor bad")
MOODS = {"positive": GOOD, "negative": BAD, "neutral": PLAIN}
REVIEWS = (
    "The {x} is {a}.", "This {x} is {a}.", "I think the {x} is {a}.", "We found the {x} {a}.", "My {x} was {a}.",
    "{n} says the {x} is {a}.", "The {x} from {n} was {a}.", "I bought a {x} and it is {a}.", "Honestly, the {x} was {a}!",
    "The service was {a}.", "The food at {n} was {a}.", "Our stay at {n} was {a}.", "What I got was {a}.",
)  # fmt: skip
REVIEWS_NEW = ("In my view the {x} turned out {a}.", "After a week with the {x}: {a}.", "{n} sold me a {x}, it is {a}.")
WHOLE = {
    "positive": ("I love the {x}!", "I love it.", "Thank you, I am very happy with the {x}.", "Best {x} ever!",
                 "I would buy the {x} again.", "The {x} works like a charm.", "We enjoyed every minute at {n}.",
                 "I recommend {n} to everyone.", "The {x} exceeded my expectations."),
    "negative": ("I hate the {x}.", "I hate it.", "I am very unhappy with the {x}.", "Worst {x} ever!", "I want my money back.",
                 "The {x} broke after one day.", "Never again {n}.", "Do not buy the {x}.", "What a waste of money.",
                 "The {x} does not work at all."),
    "neutral": ("The {x} arrived on {d}.", "I have a {x}.", "The {x} is in the box.", "I bought the {x} on {d}.",
                "{n} sells the {x}.", "The {x} comes in {c}."),
}  # fmt: skip
ISSUES = {
    "refund": ("I want my money back for the {x}.", "Please refund order {o}.", "You charged me twice, please return the money.",
               "I sent the {x} back and want a refund.", "When do I get my refund for {o}?", "I would like to be reimbursed."),
    "shipping": ("Where is my parcel?", "My order {o} has not arrived.", "The delivery of the {x} is late.",
                 "When will the {x} be shipped?", "The package {o} is lost.", "Can you deliver the {x} to {p}?"),
    "technical": ("The app crashes when I open it.", "I see an error message on the screen.", "The website does not load.",
                  "The {x} does not connect to the wifi.", "The update failed with error {o}.", "The software freezes every time."),
    "account": ("I forgot my password.", "I cannot log in.", "Please change my email address.", "How do I delete my account?",
                "My username {w} does not work.", "I want to change my user name to {w}."),
    "billing": ("There is a mistake on my invoice.", "The invoice {o} is wrong.", "Please send me the invoice for the {x}.",
                "My credit card was declined.", "Can I pay by bank transfer?", "Which payment methods do you take?"),
}  # fmt: skip
TOPICS = {
    "sports": ("{n} won the final by two goals.", "The team from {p} scored in the last minute.", "{n} ran the marathon in {p}.",
               "The coach of {p} praised the players.", "The match ended in a draw.", "{n} won a gold medal in swimming."),
    "business": ("Shares of {n} rose after the merger.", "The company reported higher profits.", "The bank raised interest rates.",
                 "{n} sold the firm to investors.", "Sales at {n} fell this quarter.", "The market closed lower in {p}."),
    "science": ("Researchers in {p} discovered a new particle.", "The telescope found a distant planet.", "{n} studies cells and genes.",
                "The experiment confirmed the theory.", "Scientists measured the speed of light.", "A laboratory in {p} found a new molecule."),
    "politics": ("The parliament in {p} passed a new law.", "{n} won the election.", "The minister of {p} resigned.",
                 "The president met the senate.", "Voters in {p} go to the polls.", "The government announced a reform."),
    "music": ("The band {n} released a new album.", "{n} plays the violin in the orchestra.", "The concert in {p} was sold out.",
              "The singer wrote a new song.", "The choir sang in {p}.", "The guitar solo was recorded in {p}."),
    "food": ("The chef in {p} cooks soup with fresh herbs.", "This recipe needs butter and flour.", "The restaurant serves grilled fish.",
             "{n} baked a chocolate cake.", "The cheese from {p} is tasty.", "Dinner was pasta with tomato sauce."),
    "travel": ("The flight to {p} takes two hours.", "We booked a hotel near the beach in {p}.", "Tourists visit the castle of {p}.",
               "The train to {p} leaves from platform 3.", "Pack your suitcase and passport.", "{n} went on holiday to {p}."),
    "weather": ("It will rain in {p} tomorrow.", "A storm is coming to {p}.", "Tomorrow will be sunny and warm.",
                "Snow is expected in {p}.", "The forecast says clouds and wind.", "The temperature in {p} drops to zero."),
}  # fmt: skip
URGENCY = {
    "high": ("The server is down, help now!", "This is an emergency.", "We need it within the hour.", "Everything has stopped, please act at once.",
             "Urgent: {n} cannot work.", "Fix the {x} immediately!", "Production is down in {p}."),
    "medium": ("Please fix the {x} this week.", "Could you look at the {x} in the next days?", "We need the {x} by Friday.",
               "{n} would like an answer this week.", "Some users in {p} see a slow page."),
    "low": ("No hurry with the {x}.", "Whenever you have time, look at the {x}.", "Just a small idea for next year.",
            "{n} has a minor remark about the {x}.", "There is a small typo on the page, take your time."),
}  # fmt: skip
LANGUAGES = {
    "English": ("Good morning, how are you?", "Where is the station?", "The book is on the table.", "I would like a coffee.", "My name is {n}."),
    "French": ("Bonjour, comment allez-vous ?", "Où est la gare ?", "Le livre est sur la table.", "Je voudrais un café.", "Je m'appelle {n}."),
    "German": ("Guten Morgen, wie geht es Ihnen?", "Wo ist der Bahnhof?", "Das Buch liegt auf dem Tisch.", "Ich möchte einen Kaffee.", "Ich heiße {n}."),
    "Spanish": ("Buenos días, ¿cómo está?", "¿Dónde está la estación?", "El libro está en la mesa.", "Quisiera un café.", "Me llamo {n}."),
}  # fmt: skip
# name of the label set -> (texts by label, other spellings of the labels, what to ask)
SETS: dict[str, tuple[dict[str, tuple[str, ...]], tuple[dict[str, str], ...], tuple[str, ...], tuple[str, ...]]] = {
    "sentiment": (WHOLE, ({"positive": "good", "negative": "bad", "neutral": "neutral"},
                          {"positive": "happy", "negative": "unhappy", "neutral": "neutral"}),
                  ("What is the sentiment?", "Classify the sentiment.", "Is this review {o}?", "What is the mood of the text?"),
                  ("Which feeling does it express?",)),
    "issue": (ISSUES, ({"refund": "refunds", "shipping": "delivery", "technical": "technical", "account": "account", "billing": "billing"},),
              ("Which department is this for?", "Classify the ticket.", "What is this message about?", "Which category fits?"),
              ("Who should handle this?",)),
    "topic": (TOPICS, (), ("What is the topic?", "Classify the topic.", "What is the text about?", "Which topic fits?"),
              ("Which section does it belong in?",)),
    "urgency": (URGENCY, ({"high": "urgent", "medium": "soon", "low": "later"},),
                ("How urgent is this?", "What is the urgency?", "Classify the priority.", "Which priority does this have?"),
                ("How fast must we react?",)),
    "language": (LANGUAGES, (), ("Which language is this?", "What is the language of the text?", "Classify the language."),
                 ("In which language is it written?",)),
}  # fmt: skip

ASKS = (
    "{t}\n\n{q} Choose one of: {o}.", "{q} Choose one of: {o}.\n\n{t}", "{t}\n{q} Options: {o}", "Text: {t}\n{q}\nOptions: {o}\nAnswer:",
    "{q} Answer with one of {o}.\n{t}", "{q} ({o})\n{t}", "Choose one of: {o}.\n{q}\nMessage: {t}", "{t}\n{q} Pick one: {o}.",
    "Message: {t}\n{q} Answer only {o}.", "{t} {q} Choose from: {o}.", "Text: {t}\n\n{q} Select one of the following: {o}",
)  # fmt: skip
ASKS_NEW = ("Here is a text: {t}\nDecide: {q} Allowed answers: {o}.", "{q}\nPossible answers are {o}.\n\n{t}", "{t}\n\n{q} It must be one of {o}.")
SYSTEM_ASKS = ("{q} Answer with one of: {o}.", "You are a classifier. {q} Choose one of: {o}.", "Classify each message. {q} Options: {o}",
               "For every message answer with one of: {o}. {q}")  # fmt: skip
SYSTEM_ASKS_NEW = ("You sort messages. {q} Labels: {o}.",)


def _fill(draw: Draw, template: str) -> str:
    return template.format(
        x=draw.thing(), n=draw.first_name(), p=draw.place(), o=draw.code(), w=draw.word(), d=draw.pick(words.WEEKDAYS),
        c=draw.pick(words.COLOURS), a="",
    )  # fmt: skip


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
    asks = ("Is this right: {s}", "Is it true that: {s}", "Statement: {s} Is it true?", "True or false: {s}", "Claim: {s}")
    asks_new = ("Does the text say this: {s}", "Check this claim: {s}")
    ask = draw.say(asks, asks_new).format(s=claim)
    prompt = draw.say(ASKS, ASKS_NEW).format(t=facts.article(draw, known), q=ask, o=options)
    return chat(KIND, *draw.system(), turn("user", prompt), turn("assistant", yes if true else no))


def open_options(draw: Draw) -> Dialogue:
    """The options are values of the context (and strangers); the question singles one out."""
    known = facts.world(draw, draw.integer(1, 7))
    fact = draw.pick(known)
    options = {fact.value.lower(): fact.value}
    for value in [f.value for f in known if f.kind.label == fact.kind.label] + [fact.kind.value(draw) for _ in range(4)]:
        options.setdefault(value.lower(), value)
    shown = [fact.value, *[v for v in options.values() if v != fact.value][: draw.integer(1, 4)]]
    draw.rng.shuffle(shown)
    question, text = facts.question(draw, fact), facts.article(draw, known)
    if draw.chance(0.3):  # lettered options, answered by their letter
        mark = draw.pick(("{}) {}", "{}. {}", "({}) {}"))
        lines = "\n".join(mark.format("ABCDEF"[i], v) for i, v in enumerate(shown))
        end = draw.say(("Answer with the letter.", "Which letter is right?", "Answer with one letter."), ("Give only the letter.",))
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
    texts = ("I want the {r}.", "Please take {r}.", "I would go for {r}.", "My choice is {r}.", "It must be {r}.", "{f} {r} was mentioned.",
             "{f} They talked about {r}.", "We decided on {r}. {f}")  # fmt: skip
    text = draw.say(texts, ("{f} In the end it was {r}.",)).format(r=right, f=draw.pick(words.FILLERS))
    asks = ("Which one is named?", "Which one is it?", "Which one does the text mention?", "What was chosen?")
    ask = draw.loose(draw.say(asks, ("Which of these occurs?",)))
    prompt = draw.say(ASKS, ASKS_NEW).format(t=text, q=ask, o=_options(draw, options))
    return chat(KIND, *draw.system(), turn("user", prompt), turn("assistant", right))


def tool_choice(draw: Draw) -> Dialogue:
    """Which tool does a question need? The usual first step of a routing program."""
    sums = ("What is {a} + {b}?", "Calculate {a} * {b}.", "How much is {a} minus {b}?", "Add {a} and {b}.")
    finds = ("What is the price of the {x}?", "Who is {n}?", "Where does {n} live?", "What is the status of order {o}?",
             "What is the capital of {p}?", "How many of the {x} are in stock?")  # fmt: skip
    talk = ("Hello!", "Thank you.", "Good morning, how are you?", "Hi {n} here.", "Goodbye!", "Nice to meet you.")
    names = {"calculator": sums, "search": finds, "none": talk}
    if draw.chance(0.3):
        names = {"calculator": sums, "lookup": finds, "chat": talk}
    labels = draw.some(tuple(names), draw.integer(2, 3))
    right = draw.pick(labels)
    text = _fill(draw, draw.pick(names[right]).replace("{a}", str(draw.number(3))).replace("{b}", str(draw.number(3))))
    asks = ("Which tool is needed?", "Which tool should I use?", "To answer this, I need which tool?")
    prompt = draw.say(ASKS, ASKS_NEW).format(t=text, q=draw.loose(draw.say(asks, ("What tool fits?",))), o=_options(draw, labels))
    return chat(KIND, *draw.system(), turn("user", prompt), turn("assistant", right))


def draw_choice(draw: Draw) -> Dialogue:
    u = draw.rng.random()
    for make, share in ((closed, 0.40), (yes_no, 0.62), (open_options, 0.82), (named, 0.92)):
        if u < share:
            return make(draw)
    return tool_choice(draw)
