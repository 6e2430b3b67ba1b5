"""JSON schemas rewritten, before they are compiled, where the compiler's own way gives wrong JSON or is slow.

- `minLength` and `maxLength` become a `pattern`. Compiled as they are, they let control characters through, which JSON
  does not allow within a text, and near the end of a bounded text a mask takes milliseconds (docs/constrained.md has
  the numbers). Neither way writes escapes within such a text.
- What a `pattern` demands and JSON writes with an escape (a quote, a backslash, a control character) is demanded as
  that escape. The compiler would write it raw. From character classes it leaves such characters out.
- Character classes of a `pattern` that reach beyond ASCII are written so that they are UTF-8 (`grammar_utf8`), other
  characters beyond it by their number: a pattern that holds one plainly is compiled in another way, whose classes do
  take what JSON must escape.
"""

from __future__ import annotations

import json
import re
from typing import Any

from superinfer.runtime.engine.grammar_utf8 import character, code_points, in_pattern
from superinfer.runtime.json_schema import with_inner

AT_ONCE = 100  # characters of one repetition: the compiler does not unfold one of over 128, and masks are slow then


def rewrite(schema: Any) -> Any:
    """The schema with lengths of texts as patterns; what is shared with the given one is not changed."""
    if not isinstance(schema, dict):
        return schema
    found = with_inner(schema, rewrite)
    least, most = found.get("minLength", 0), found.get("maxLength")
    if ("minLength" in found or "maxLength" in found) and are_lengths(least, most):
        found.pop("minLength", None)
        found.pop("maxLength", None)
        found["pattern"] = f"^{_any(least, most)}$"
    if isinstance(found.get("pattern"), str):
        found["pattern"] = escaped(found["pattern"])
    return found


# A class, or one character as it may be written: escaped, by its number, or plain.
_PIECE = re.compile(
    r"""(?P<class>\[(?:\^)?\]?(?:\\.|[^\]\\])*\]|\\[dDwWsS]|\.)
    |\\x(?P<x>[0-9a-fA-F]{2}) | \\u(?P<u>[0-9a-fA-F]{4}) | \\u\{(?P<braced>[0-9a-fA-F]{1,6})\}
    |\\(?P<letter>.) | (?P<plain>["\x00-\x1f\x80-\U0010ffff])""",
    re.VERBOSE | re.DOTALL,
)
_LETTERS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0", '"': '"', "\\": "\\"}


def escaped(pattern: str) -> str:
    """The pattern, in ASCII, of a JSON text's characters as JSON writes them."""

    def piece(match: re.Match[str]) -> str:
        if match["class"]:
            ranges = code_points(match["class"])
            return in_pattern(ranges) if ranges and ranges[-1][1] > 0x7F else match[0]
        number = match["x"] or match["u"] or match["braced"]
        code = int(number, 16) if number else ord(match["plain"] or _LETTERS.get(match["letter"], match["letter"]))
        if code < 0x20 or chr(code) in '"\\':
            written = json.dumps(chr(code))[1:-1]
            return f"({written.replace(chr(92), chr(92) * 2)})"
        return character(code) if code > 0x7F or match["braced"] else match[0]

    return _PIECE.sub(piece, pattern)


def are_lengths(least: Any, most: Any) -> bool:
    """Whether they mean something; what does not is for the compiler to refuse."""
    numbers = [least] if most is None else [least, most]
    return all(type(number) is int and number >= 0 for number in numbers) and (most is None or least <= most)


def _any(least: int, most: int | None) -> str:
    """An expression for any `least` to `most` characters, which for each text has one way to match."""
    must = f".{{{AT_ONCE}}}" * (least // AT_ONCE) + (f".{{{least % AT_ONCE}}}" if least % AT_ONCE else "")
    if most is None:
        return f"{must}.*"
    rounds, last = divmod(most - least, AT_ONCE)
    may = f".{{0,{last}}}" if last else ""
    for _ in range(rounds):
        may = f"(.{{0,{AT_ONCE - 1}}}|.{{{AT_ONCE}}}{may})"
    return must + may
