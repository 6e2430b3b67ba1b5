"""Chat with the model; its answers appear as they are written.

    python examples/streaming_chat.py                     # a conversation; leave with Ctrl-D
    python examples/streaming_chat.py "What is TTFT?"     # ask this and leave

A person waits for the first word and reads at a steady pace: `SLO(ttft=..., tbt=...)` promises exactly that.
"""

import sys
from collections.abc import Iterable, Iterator

import superinfer as si


def ask() -> Iterator[str]:
    """What the person types."""
    while True:
        try:
            yield input("You:   ")
        except EOFError:
            return


@si.function(slo=si.SLO(ttft=2.0, tbt=0.5))
def chat(s, questions: Iterable[str]):
    """Answer each question in turn, in one conversation."""
    for i, question in enumerate(questions):
        s += si.user(question)
        s += si.assistant(si.gen(f"answer {i}", max_tokens=160, temperature=0))
        print("Model: ", end="")
        for text in s.text_iter(f"answer {i}"):
            print(text, end="", flush=True)
        print()


def main() -> None:
    """Chat, then say how the promises were kept."""
    with si.default_backend():
        state = chat.run(sys.argv[1:] or ask())
        print(f"\n{state.slo_report()}")


if __name__ == "__main__":
    main()
