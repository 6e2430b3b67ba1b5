"""The command line as a person starts it: a process of its own."""

from command_line import run, start

__all__ = ["run", "start"]
