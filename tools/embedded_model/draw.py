"""Seeded draws: the one source of chance of the generator, which also keeps the three splits apart.

Splits: "train"; "heldout" (seen phrasings, values that training never has); "unseen" (held-out values in phrasings
that training never has either). Invented words are split by the hash of the word, and `tasks.draw_dialogue` splits
whole instances by the hash of their text, so that no held-out instance can occur in training.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar
from zlib import crc32

from tools.embedded_model import words

T = TypeVar("T")
SPLITS = ("train", "heldout", "unseen")


class Draw:
    """A `random.Random` with the vocabulary of the tasks on top, bound to one split."""

    def __init__(self, seed: int | str, split: str = "train") -> None:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
        self.rng = random.Random(f"{split}/{seed}")
        self.split = split
        self.held = split != "train"

    # -- plain chance -------------------------------------------------------------------------------------------
    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.rng.random() * len(items))]

    def some(self, items: Sequence[T], n: int) -> list[T]:
        return self.rng.sample(items, min(n, len(items)))

    def integer(self, low: int, high: int) -> int:
        """Uniform in [low, high]."""
        return low + int(self.rng.random() * (high - low + 1))

    # -- splits -------------------------------------------------------------------------------------------------
    def say(self, seen: Sequence[T], new: Sequence[T]) -> T:
        """A phrasing: of `seen`, or of `new` in the split of unseen phrasings."""
        return self.pick(new if self.split == "unseen" and new else seen)

    def fresh(self, key: str, share: int = 16) -> bool:
        """Does the instance named by `key` belong to this split? One in `share` is held out."""
        return (crc32(key.encode()) % share == 0) == self.held

    # -- words --------------------------------------------------------------------------------------------------
    def word(self) -> str:
        """An invented lower-case word; one in 8 words is kept for the held-out splits."""
        while True:
            parts = [self.pick(words.SYLLABLES_A), self.pick(words.SYLLABLES_B), self.pick(words.SYLLABLES_C)]
            if self.chance(0.25):
                parts.insert(1, self.pick(words.SYLLABLES_B))
            if self.chance(0.06):  # spelling outside the syllables, so that any name can be copied
                parts = [self.pick("abcdefghijklmnopqrstuvwxyz") for _ in range(self.integer(3, 8))]
            word = "".join(parts)
            if len(word) > 2 and self.fresh(word, 8):
                return word

    def name_word(self) -> str:
        return self.word().capitalize()

    def first_name(self) -> str:
        return self.pick(words.FIRST_NAMES) if self.chance(0.5) else self.name_word()

    def last_name(self) -> str:
        return self.pick(words.LAST_NAMES) if self.chance(0.4) else self.name_word()

    def person(self) -> str:
        return self.first_name() if self.chance(0.6) else f"{self.first_name()} {self.last_name()}"

    def full_name(self) -> str:
        return f"{self.first_name()} {self.last_name()}"

    def place(self) -> str:
        return self.pick(words.CITIES) if self.chance(0.45) else self.name_word()

    def country(self) -> str:
        return self.pick(words.COUNTRIES) if self.chance(0.6) else self.name_word()

    def company(self) -> str:
        return f"{self.name_word()} {self.pick(words.COMPANY_KINDS)}" if self.chance(0.7) else self.name_word()

    def thing(self) -> str:
        """A singular lower-case noun phrase: "lamp", "red lamp", "dorvik"."""
        u = self.rng.random()
        if u < 0.5:
            return self.pick(words.THINGS)
        if u < 0.8:
            return f"{self.pick(words.ADJECTIVES)} {self.pick(words.THINGS)}"
        return self.word()

    # -- values -------------------------------------------------------------------------------------------------
    def number(self, digits: int = 3) -> int:
        """A positive number of 1 to `digits` digits, every length as likely."""
        n = self.integer(1, digits)
        return self.integer(10 ** (n - 1), 10**n - 1)

    def amount(self) -> int | float:
        """A price: whole, or with two decimals of which the last is not 0 (so that JSON keeps its spelling)."""
        if self.chance(0.6):
            return self.number(4)
        return (self.number(3) * 100 + self.integer(0, 9) * 10 + self.integer(1, 9)) / 100

    def price(self) -> str:
        return self.pick(("${}", "{} euros", "{} dollars", "€{}", "{} EUR", "£{}")).format(self.amount())

    def clock(self) -> str:
        if self.chance(0.7):
            return f"{self.integer(0, 23)}:{self.pick(('00', '00', '15', '30', '45', '10', '20', '50'))}"
        return f"{self.integer(1, 12)} {self.pick(('am', 'pm'))}"

    def hours(self) -> str:
        return f"{self.clock()} {self.pick(('to', '-'))} {self.clock()}"

    def date(self) -> str:
        day, month, year = self.integer(1, 28), self.pick(words.MONTHS), self.integer(1950, 2030)
        return self.pick(
            (
                f"{day} {month}",
                f"{month} {day}",
                f"{day} {month} {year}",
                f"{year}-{self.integer(1, 12):02d}-{day:02d}",
            )
        )

    def code(self) -> str:
        letters = "".join(self.pick("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(self.integer(1, 3)))
        return self.pick(("{}-{}", "{}{}", "#{1}")).format(letters, self.integer(10, 99999))

    def phone(self) -> str:
        return f"{self.integer(100, 999)}-{self.integer(1000, 9999)}"

    def email(self) -> str:
        return f"{self.word()}@{self.word()}.{self.pick(('com', 'org', 'net', 'io'))}"

    # -- phrasing -----------------------------------------------------------------------------------------------
    def loose(self, template: str) -> str:
        """A template as a person in a hurry may type it; called before the slots are filled, so values keep case."""
        if self.chance(0.15):
            template = template.lower() if self.chance(0.5) else template[0].lower() + template[1:]
        if template.endswith("?") and self.chance(0.1):
            template = template[:-1]
        if template.endswith("?") and self.chance(0.12):
            template = self.pick(("Please tell me: ", "Tell me, ", "Hi! ", "Quick question: ", "Question: ")) + template
        elif template.endswith(".") and self.chance(0.1):
            template = self.pick(("Please: ", "Now: ", "Next: ", "Task: ")) + template
        return template

    def system(self, p: float = 0.35) -> list[dict[str, str]]:
        """No message, or one general system message (which never changes the right answer)."""
        if not self.chance(p):
            return []
        return [{"role": "system", "content": self.say(words.SYSTEMS, words.SYSTEMS_NEW)}]
