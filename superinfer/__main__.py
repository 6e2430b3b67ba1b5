"""`python -m superinfer` is the command line."""

from superinfer.cli import main

main()
