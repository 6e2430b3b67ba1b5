"""The word stock of the task generator: plain tuples, no logic but the plural rule."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    """Ada Alice Amir Anna Ben Bianca Bob Carla Carlos Chen Chloe Clara Daniel David Diego Elena Emil Emma Erik Eva
    Farid Felix Fiona Frank George Grace Hana Hassan Helen Henry Ida Igor Ines Ivan Jack James Jana Joan John Jonas
    Julia Karim Kate Kenji Lara Laura Leo Lena Liam Lina Lucas Lucy Maria Mark Marta Mary Max Mei Mia Mila Mona Nadia
    Nina Noah Nora Olga Oliver Omar Oscar Paul Pedro Peter Priya Ravi Rita Robin Rosa Sam Sara Sofia Tara Theo Tim Tom
    Uma Vera Victor Wei Yara Yusuf Zoe"""
)
LAST_NAMES = _words(
    """Abbott Ahmed Baker Berg Brown Castro Clark Costa Davis Diaz Evans Fischer Garcia Green Hall Hansen Hill Ito
    Jensen Jones Kaya Khan Kim King Klein Kovac Lee Lewis Lopez Martin Meyer Miller Moore Mori Nowak Olsen Park Patel
    Petrov Reed Rossi Sato Silva Singh Smith Stone Suzuki Taylor Turner Vogel Walker Weber White Wilson Wong Wood
    Young Zhang"""
)
CITIES = _words(
    """Athens Bergen Berlin Bogota Boston Bristol Brussels Budapest Cairo Chicago Cork Dakar Delhi Denver Dublin
    Florence Geneva Ghent Hamburg Helsinki Istanbul Kyoto Lagos Leeds Lima Lisbon London Lyon Madrid Milan Montreal
    Moscow Mumbai Munich Nairobi Naples Nice Osaka Oslo Paris Porto Prague Quito Riga Rome Seoul Seville Sofia Sydney
    Tallinn Tokyo Toronto Tunis Turin Valencia Venice Vienna Vilnius Warsaw York Zagreb Zurich"""
)
COUNTRIES = _words(
    """Argentina Austria Belgium Brazil Canada Chile China Croatia Denmark Egypt Estonia Finland France Germany Ghana
    Greece Hungary Iceland India Ireland Italy Japan Kenya Latvia Mexico Morocco Norway Peru Poland Portugal Spain
    Sweden Tunisia Turkey Vietnam"""
)
THINGS = _words(
    """apple backpack ball banana basket bell belt blanket book bottle bowl brick bucket button cable camera candle
    carpet chair clock coat cookie cup curtain desk door drum egg fan flute folder fork guitar hammer hat helmet jacket
    jar kettle keyboard key lamp laptop lemon lock mirror monitor mug nail napkin notebook onion orange oven paper pear
    pen pencil phone piano pillow pipe plate plum pot printer pump ring robot rope ruler saddle scarf screw shirt shovel
    sofa spoon stamp stool table tablet tent ticket tile timer tomato towel toy tray umbrella vase violin wheel
    window"""
)
ADJECTIVES = _words(
    """black blue brass brown cheap clean cotton digital electric folding glass golden green grey heavy large leather
    light long metal new old orange plain plastic portable purple red round short silver small soft square steel white
    wooden yellow"""
)
COLOURS = (
    "red",
    "blue",
    "green",
    "yellow",
    "black",
    "white",
    "orange",
    "purple",
    "grey",
    "brown",
    "pink",
    "silver",
)
JOBS = _words(
    """accountant actor architect baker barber biologist builder butcher carpenter chef chemist dancer dentist designer
    doctor driver editor electrician engineer farmer gardener geologist journalist judge lawyer librarian mechanic nurse
    painter pharmacist photographer pilot plumber poet programmer sailor singer tailor teacher translator waiter
    writer"""
)
PETS = (
    "cat",
    "dog",
    "horse",
    "parrot",
    "rabbit",
    "turtle",
    "goat",
    "hamster",
    "snake",
    "canary",
    "donkey",
    "duck",
)
FOODS = (
    "pizza",
    "soup",
    "rice",
    "pasta",
    "salad",
    "curry",
    "bread",
    "cheese",
    "noodles",
    "pancakes",
    "fish",
    "tacos",
)
SPORTS = (
    "tennis",
    "football",
    "chess",
    "golf",
    "rowing",
    "hockey",
    "judo",
    "rugby",
    "skiing",
    "cricket",
    "sailing",
)
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
NUMBER_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
CONDITIONS = ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "stormy", "clear")
STATUSES = (
    "shipped",
    "delivered",
    "pending",
    "cancelled",
    "on hold",
    "returned",
    "out for delivery",
    "being packed",
)
COMPANY_KINDS = (
    "Bakery",
    "Books",
    "Cafe",
    "Clinic",
    "Foods",
    "Garage",
    "Hotel",
    "Labs",
    "Library",
    "Motors",
    "Museum",
    "Pharmacy",
    "Studio",
    "Systems",
    "Tools",
    "Travel",
)

# Invented names are two or three syllables of these: 3,800 two-syllable and 150,000 three-syllable ones.
SYLLABLES_A = _words(
    """ba be bel bor bren bri ca cal cor da del dor dra el fa fen fer fi gal gor gra hal har hel ho is ja jo ka kel ker
    kil la len lo lu ma mal mar mel mi mo na nel nor o ol pa pel per qua ra rel ri ro sa sel sha sil so ta tel tor tra
    u ul va vel vi vo wa wil xa ya yo za zel zi zor"""
)
SYLLABLES_B = _words(
    """ba bi da den do dra fa fin ga go ka ko la lin lo mar mi mo na ni no pa per ra ri ro sa shi ta ti to tor va vi xo
    za zen zo"""
)
SYLLABLES_C = (
    "",
    "",
    "n",
    "s",
    "r",
    "l",
    "th",
    "x",
    "nd",
    "ck",
    "m",
    "st",
    "ra",
    "lia",
    "dor",
    "vik",
    "ton",
    "berg",
    "ne",
)

FILLERS = (
    "The meeting room was quiet.",
    "It had rained the night before.",
    "Nobody expected any change.",
    "Coffee was served at the entrance.",
    "The notes were written by hand.",
    "A short break followed.",
    "The report was printed twice.",
    "Everyone agreed to talk again soon.",
    "The lights were left on.",
    "More details will follow.",
    "The printer was out of paper.",
    "The street was busy that day.",
    "Please read this carefully.",
    "The team thanked all visitors.",
    "Parking is free behind the building.",
    "The garden is open to everyone.",
    "Some pages were missing.",
    "The old sign has been replaced.",
    "There was music in the hall.",
    "The weather stayed mild.",
    "Questions can be sent by post.",
    "The kitchen was closed for repairs.",
    "A new carpet was laid last year.",
    "The list is updated every week.",
)
FILLERS_NEW = (
    "The windows had just been cleaned.",
    "Two chairs were broken.",
    "The lift was slow.",
    "Visitors liked the new paint.",
    "Lunch was late again.",
    "The clock on the wall had stopped.",
)

SYSTEMS = (
    "You are a helpful assistant.",
    "You are a concise assistant.",
    "Be brief.",
    "Answer briefly and exactly.",
    "You are a careful assistant. Answer in as few words as possible.",
    "You answer questions.",
    "You are an assistant inside a program.",
    "Follow the user's instructions exactly.",
    "You are a support agent.",
    "Give short answers.",
    "You are a friendly assistant.",
    "Be helpful and accurate.",
    "You are superinfer's embedded model.",
    "Only give the answer, nothing else.",
)
SYSTEMS_NEW = (
    "You help people with small tasks.",
    "Reply with exactly what is asked for.",
    "Be polite and quick.",
    "You work at the help desk.",
)


def plural(noun: str) -> str:
    """The regular English plural; `THINGS` holds only nouns for which it is right ("knife" is not among them)."""
    if noun.endswith(("s", "x", "ch", "sh")) or noun in ("tomato", "potato"):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"
