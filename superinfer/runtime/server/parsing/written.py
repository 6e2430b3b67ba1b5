"""How each format's tool calls are written, as structural tags (`engine/structural_tag.py`): the counterpart of its
reader.

Calls have the white space that models put around them, and everything else as `json.dumps` writes it.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from superinfer.errors import UnsupportedError
from superinfer.runtime.json_schema import standing_at

Schema = dict[str, Any]
Format = dict[str, Any]


class Tool(NamedTuple):
    """A tool, and the schema of its arguments."""

    name: str
    arguments: Schema


class Spelling(NamedTuple):
    """What a model's tokenizer and chat template say of the markers. special: ids of those that are special tokens."""

    special: Mapping[str, int]
    template: str

    def marker(self, text: str) -> Format:
        """A marker, as its token where it is a special one: no text spells that."""
        if text in self.special:
            return {"type": "token", "token": self.special[text]}
        return text_of(text)


PLAINLY = Spelling({}, "")
Write = Callable[[list[Tool], Spelling, bool], Format]


def text_of(text: str) -> Format:
    """This text."""
    return {"type": "const_string", "value": text}


def schema_of(schema: Schema) -> Format:
    """JSON of a schema."""
    return {"type": "json_schema", "json_schema": schema}


def either(*formats: Format) -> Format:
    """One of them."""
    return {"type": "or", "elements": list(formats)} if len(formats) > 1 else formats[0]


def _row(*formats: Format) -> Format:
    return {"type": "sequence", "elements": list(formats)}


def _maybe(format: Format) -> Format:
    return {"type": "optional", "content": format}


def _some(format: Format, one: bool) -> Format:
    return format if one else {"type": "plus", "content": format}


def _listed(tags: list[Format], separator: str, one: bool) -> Format:
    return {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": separator,
        "at_least_one": True,
        "stop_after_first": one,
    }


def _tag(begin: str, content: Format, end: str) -> Format:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def call_schema(tools: list[Tool], key: str) -> Schema:
    """An object `{"name": ..., key: ...}` for one of the tools."""
    arguments = {f"arguments of tool {at}": tool.arguments for at, tool in enumerate(tools)}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, key: {"$ref": f"#/$defs/{name}"}},
            "required": ["name", key],
            "additionalProperties": False,
        }
        for name, tool in zip(arguments, tools, strict=True)
    ]
    defined = {name: standing_at(f"#/$defs/{name}", schema) for name, schema in arguments.items()}
    return {"$defs": defined} | (calls[0] if len(calls) == 1 else {"anyOf": calls})


def list_schema(tools: list[Tool], one: bool) -> Schema:
    """A list of such objects, with the key `arguments`."""
    call = call_schema(tools, "arguments")
    defined = call.pop("$defs")
    return {"$defs": defined, "type": "array", "minItems": 1, "items": call} | ({"maxItems": 1} if one else {})


def tagged(tools: list[Tool], spelling: Spelling, one: bool) -> Format:
    """As TaggedReader reads them."""
    line = _maybe(text_of("\n"))
    body = schema_of(call_schema(tools, "arguments"))
    call = [spelling.marker("<tool_call>"), line, body, line, spelling.marker("</tool_call>")]
    return _some(_row(*call, *([] if one else [line])), one)


def bare(tools: list[Tool], spelling: Spelling, one: bool) -> Format:
    """As JsonReader reads them."""
    return _listed([_tag("", schema_of(call_schema(tools, "parameters")), "")], "; ", one)


def mistral(tools: list[Tool], spelling: Spelling, one: bool) -> Format:
    """As MistralReader reads them: by name where the template knows that way, else a list."""
    begin = spelling.marker("[TOOL_CALLS]")
    if "[ARGS]" not in spelling.template:
        return _row(begin, _maybe(text_of(" ")), schema_of(list_schema(tools, one)))
    call_id: list[Format] = []
    if "[CALL_ID]" in spelling.template:
        call_id = [spelling.marker("[CALL_ID]"), {"type": "regex", "pattern": "[a-zA-Z0-9]{9}"}]
    calls = [_row(text_of(tool.name), *call_id, spelling.marker("[ARGS]"), schema_of(tool.arguments)) for tool in tools]
    return _some(_row(begin, either(*calls)), one)


def pythonic(tools: list[Tool], spelling: Spelling, one: bool) -> Format:
    """As PythonicReader reads them, with values in JSON. Raises UnsupportedError for what Python cannot write so."""
    return _row(text_of("["), _listed([_python_call(tool) for tool in tools], ", ", one), text_of("]"))


def _python_call(tool: Tool) -> Format:
    schema = tool.arguments
    properties, required = schema.get("properties", {}), schema.get("required", [])
    wrong = [name for name in tool.name.split(".") + list(properties) if not _is_name(name)]
    if wrong:
        why = f"{wrong[0]!r:.80} is no name in Python"
    elif schema.get("type", "object") != "object" or not schema.keys() <= _PLAIN:
        why = f"parameters={schema!r:.80} is more than an object's type, properties and required"
    else:
        why = ""
    if why:
        raise UnsupportedError(
            f"tool {tool.name!r:.80} beside a format: {why}, so that it cannot be called as this model writes calls, "
            "in Python; change it, or leave the tool or the format out"
        )
    shared = {word: schema[word] for word in ("$defs", "definitions") if word in schema}

    def given(name: str, after: bool) -> Format:
        one = properties[name]
        value = schema_of(one | shared if isinstance(one, dict) else one)
        return _row(text_of(f"{', ' if after else ''}{name}="), value)

    def way(first: list[str], rest: list[str]) -> Format:
        begin = [given(name, at > 0) for at, name in enumerate(first)]
        return _row(*begin, *(_maybe(given(name, True)) for name in rest))

    must = [name for name in properties if name in required]
    may = [name for name in properties if name not in required]
    if must:
        written = way(must, may)
    else:  # the first to be written has no comma before it
        written = either(text_of(""), *(way([name], may[at + 1 :]) for at, name in enumerate(may)))
    return _tag(f"{tool.name}(", written, ")")


_PLAIN = {"type", "properties", "required", "additionalProperties", "title", "description", "$defs", "definitions"} | {
    "$schema", "$id", "$comment"
}  # fmt: skip


def _is_name(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)
