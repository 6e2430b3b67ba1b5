"""Character classes of grammars, written so that what the compiler makes of them is UTF-8.

As xgrammar 0.2 compiles them, negated classes take bytes of surrogates (ED A0 80), and in a schema's `pattern` `.` and
other classes of several ranges take overlong forms as well (E0 80 80, F0 80 80 80). No such bytes are characters: a
decoder puts several U+FFFD in their place. Ranges without surrogates are compiled exactly, in a pattern if a class has
one of them.
"""

from __future__ import annotations

import itertools
import json
import re

Ranges = list[tuple[int, int]]  # of code points, both ends included

VALID: Ranges = [(0x00, 0xD7FF), (0xE000, 0x10FFFF)]
IN_JSON: Ranges = [(0x20, 0x21), (0x23, 0x5B), (0x5D, 0xD7FF), (0xE000, 0x10FFFF)]  # what a JSON text holds unescaped

_LAST = 0x10FFFF
_BY_LENGTH: Ranges = [(0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, _LAST)]  # of their UTF-8, over ASCII

_SETS: dict[str, Ranges] = {
    "d": [(0x30, 0x39)],
    "w": [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)],
    "s": [(0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0)],
}
_LETTERS = {"0": 0, "b": 8, "t": 9, "n": 10, "v": 11, "f": 12, "r": 13}
_MEMBER = re.compile(
    r"""\\x(?P<x>[0-9a-fA-F]{2}) | \\u(?P<u>[0-9a-fA-F]{4})
    | \\u\{(?P<braced>[0-9a-fA-F]{1,6})\} | \\(?P<letter>.) | (?P<plain>.)""",
    re.VERBOSE | re.DOTALL,
)
_CLASS, _CLASS_STAR = 1, 2  # kinds of expression: [kind, length, whether negated, first, last, first, last, ...]
_ESCAPE = re.compile(r"\\(?:x(?P<x>[0-9a-f]{2})|.)", re.DOTALL)

# Any four digits behind a \u, as the compiler has it in JSON's texts; and those alone that are a character.
_DIGIT = "[A-Fa-f0-9]"
_ANY_NUMBER = f'"u" {_DIGIT} {_DIGIT} {_DIGIT} {_DIGIT}'
_NUMBER = (
    f'"u" (([A-CE-Fa-ce-f0-9] {_DIGIT} {_DIGIT} {_DIGIT}) | ([Dd] [0-7] {_DIGIT} {_DIGIT})'
    f' | ([Dd] [89ABab] {_DIGIT} {_DIGIT} "\\\\u" [Dd] [C-Fc-f] {_DIGIT} {_DIGIT}))'
)


def code_points(written: str) -> Ranges | None:
    r"""What `.`, `\d` and the like, or a class in brackets stands for; None if it is none that is known here."""
    if written == ".":
        return [(0, _LAST)]
    if not written.startswith("["):
        return _named(written[1:])
    negated = written.startswith("[^")
    found: Ranges = []
    pending = -1  # a character that may begin a range
    dash = False
    for member in _MEMBER.finditer(written, 1 + negated, len(written) - 1):
        number = member["x"] or member["u"] or member["braced"]
        letter = member["letter"]
        if member[0] == "-" and pending >= 0 and not dash:
            dash = True
            continue
        if letter is not None and letter.isalnum() and letter not in _LETTERS:
            ranges = _named(letter)
            if ranges is None or dash:
                return None
            found += ranges
            pending = -1
            continue
        one = int(number, 16) if number else _LETTERS.get(letter, -1) if letter else -1
        one = ord(letter or member["plain"]) if one < 0 else one
        if dash:
            if one < pending:
                return None
            found.append((pending, one))
            pending, dash = -1, False
        else:
            found.append((one, one))
            pending = one
    if dash:
        found.append((ord("-"), ord("-")))
    return _others(found) if negated else _merged(found)


def in_pattern(ranges: Ranges) -> str:
    """An expression for one of these characters: for a `pattern`, where a class of one range is exact."""
    parts = ["".join(_between(low, high) for low, high in _common(ranges, [(0, 0x7F)]))]
    parts += [_between(low, high) for low, high in _common(ranges, _BY_LENGTH)]
    return "(?:" + "|".join(f"[{part}]" for part in parts if part) + ")"


def in_utf8(serialized: str, among: Ranges) -> str:
    """A grammar as the compiler serializes it, whose negated classes and those beyond ASCII take only what is `among`
    these characters. Nothing else is touched. A class with none of them stays as it is."""
    tree = json.loads(serialized)
    starts, data = tree["grammar_expr_indptr"], tree["grammar_expr_data"]
    found: list[int] = []
    begins = []
    for start, end in itertools.pairwise([*starts, len(data)]):
        begins.append(len(found))
        kind, _, *content = data[start:end]
        if kind in (_CLASS, _CLASS_STAR):
            ranges = _merged(list(zip(content[1::2], content[2::2], strict=True)))
            kept = _common(_others(ranges) if content[0] else ranges, among)
            if kept and (content[0] or ranges[-1][1] > 0x7F):
                content = [0, *itertools.chain.from_iterable(kept)]
        found += [kind, len(content), *content]
    return json.dumps(tree | {"grammar_expr_indptr": begins, "grammar_expr_data": found})


def numbers_of_characters(ebnf: str) -> str:
    r"""A grammar of JSON as the compiler prints it, without `\ud800` in a text that has no other half behind it."""
    return readable(ebnf).replace(_ANY_NUMBER, _NUMBER)


def readable(ebnf: str) -> str:
    """A grammar as the compiler prints it, so that the compiler reads the same."""
    return _ESCAPE.sub(_four_digits, ebnf)


def _four_digits(escape: re.Match[str]) -> str:
    r"""`\x80` before an `a` is printed as `\x80a`, and read as another character."""
    return f"\\u{int(escape['x'], 16):04x}" if escape["x"] else escape[0]


def character(code: int) -> str:
    """An ASCII way to write it, in patterns."""
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\u{{{code:x}}}"


def _named(letter: str) -> Ranges | None:
    found = _SETS.get(letter.lower())
    return _others(found) if found and letter.isupper() else found


def _between(low: int, high: int) -> str:
    return character(low) if low == high else f"{character(low)}-{character(high)}"


def _merged(ranges: Ranges) -> Ranges:
    found: Ranges = []
    for low, high in sorted(ranges):
        if found and low <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(high, found[-1][1]))
        else:
            found.append((low, high))
    return found


def _others(ranges: Ranges) -> Ranges:
    found, after = [], 0
    for low, high in _merged(ranges):
        if low > after:
            found.append((after, low - 1))
        after = high + 1
    return [*found, (after, _LAST)] if after <= _LAST else found


def _common(some: Ranges, others: Ranges) -> Ranges:
    pairs = ((max(a, c), min(b, d)) for a, b in some for c, d in others)
    return sorted((low, high) for low, high in pairs if low <= high)
