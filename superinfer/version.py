"""Which superinfer this is."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """Of the installed package; "0+source" where it runs from its source tree and was never installed."""
    try:
        return metadata.version("superinfer")
    except metadata.PackageNotFoundError:
        return "0+source"
