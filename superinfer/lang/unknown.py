"""What a variable holds while a program is traced: text that nobody knows yet."""

from __future__ import annotations

from typing import Any, NoReturn

UNKNOWN_MARK = "‹"  # begins every text that is not known


class DataDependent(Exception):
    """The program looked into text that a trace does not have. `what`: which variable, and how."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


class Unknown(str):
    """The text of a variable in a trace. It can be appended, joined and formatted; looking into it raises
    DataDependent, so that no tool is called with made-up arguments."""

    _name: str

    def __new__(cls, name: str) -> Unknown:
        text = super().__new__(cls, f"{UNKNOWN_MARK}{name}›")
        text._name = name
        return text

    def _look(self, how: str) -> NoReturn:
        raise DataDependent(f"it looks into {self._name!r} ({how})")

    def __str__(self) -> str:
        return f"{UNKNOWN_MARK}{self._name}›"

    def __format__(self, spec: str) -> str:
        return f"{UNKNOWN_MARK}{self._name}›"

    def __hash__(self) -> int:
        self._look("hash")

    def __add__(self, other: Any) -> Any:
        return str(self) + other if isinstance(other, str) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return other + str(self) if isinstance(other, str) else NotImplemented


def _looking(name: str) -> Any:
    def method(self: Unknown, *args: Any, **kwargs: Any) -> NoReturn:
        self._look(name.strip("_"))

    method.__name__ = name
    return method


_APPENDING = {"__add__", "__radd__", "__str__", "__format__", "__hash__", "__new__", "__repr__"}
_KEPT = _APPENDING | {"__init__", "__class__", "__doc__", "__getattribute__", "__setattr__", "__delattr__", "__slots__"}
_KEPT |= {"__init_subclass__", "__subclasshook__", "__dir__", "__sizeof__", "__reduce__", "__reduce_ex__"}
for _name in {*dir(str), "__bool__", "__int__", "__float__", "__index__"} - _KEPT:
    setattr(Unknown, _name, _looking(_name))


def as_text(value: str) -> str:
    """Plain text for a transcript, of an Unknown too."""
    return str(value) if isinstance(value, Unknown) else value
