"""The lesson that a value belongs to the subject before it: what each token of a stated value should carry.

A causal model answers "Who lives in Oslo?" from "Anna lives in Oslo." only if the tokens of "Oslo" carry "Anna": when
it read "Anna", the value was still to come. Answers alone teach this slowly (README, "Why reversed questions fail"), so
training can also ask it of the hidden states halfway up, wherever a drill states a fact (`train.py --carry`).
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from tools.embedded_model.facts import Fact

NONE = 0  # no lesson at this token; the id of <|endoftext|>, which no subject begins with


def stated(text: str, fact: Fact) -> tuple[int, int, int] | None:
    """Where `text` states the fact: start of the subject, start and end of the value, in characters.

    None if it does not, or if the value comes first: its tokens cannot know a subject that is still to come.
    """
    if fact.value not in text or fact.subject[1:] not in text:  # nearly always, and quick to see
        return None
    lines = (f"{fact.subject} {mark} {fact.kind.label}: {fact.value}" for mark in "-/|")
    told = next((t for t in (fact.sentence, *lines) if t in text), None)
    if told is None:
        return None
    at = text.find(told)
    end = at + len(told)
    subject = text.lower().find(fact.subject.lower(), at, end)  # a sentence may begin with it, in upper case
    value = text.rfind(fact.value, at, end)
    if subject < 0 or value < subject + len(fact.subject):
        return None
    return subject, value, value + len(fact.value)


def targets(tokenizer: Tokenizer, text: str, n: int, facts: Sequence[Fact]) -> tuple[list[int], list[int]]:
    """Of each token of a value in `text`, `n` tokens, the first and the second token of its subject; NONE elsewhere.

    The second, since many names begin with the same letters. A space between words does not count; NONE if there is no
    second.
    """
    firsts, seconds = [NONE] * n, [NONE] * n
    places = [(len(fact.subject), place) for fact in facts if (place := stated(text, fact))]
    if not places:
        return firsts, seconds
    encoded = tokenizer.encode(text, add_special_tokens=False)
    ids, offsets = encoded.ids, encoded.offsets
    owner = [0] * len(text)  # the token that a character is in; a token's offsets may leave out its leading space
    for i, (a, b) in enumerate(offsets):
        owner[a:b] = [i] * (b - a)
    for length, (subject, start, end) in places:
        name = range(owner[subject], owner[subject + length - 1] + 1)
        words = [ids[i] for i in name if text[slice(*offsets[i])].strip()] + [NONE]
        for i in range(owner[start], owner[end - 1] + 1):
            firsts[i], seconds[i] = words[:2]
    return firsts, seconds
