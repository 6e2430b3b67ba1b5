"""Take a note from each of several documents at the same time, then merge the notes into one answer.

    python examples/documents_fork_join.py

`fork` makes branches that share all text before; `join` brings their notes back as a list.
"""

import superinfer as si

DOCUMENTS = {
    "Ghent": "The printer was out of paper. Ghent is in Belgium. The garden is open to everyone.",
    "Anna": "The weather stayed mild. Max plays the guitar. Anna works as a pilot.",
    "lamp": "The lamp costs $45. The office is closed on Sunday. More details will follow.",
}


@si.function(deadline=60.0)
def summarise(s, documents):
    """One note per document, side by side; then one answer."""
    s += si.system("Answer briefly and exactly.")
    forks = s.fork(len(documents))
    for fork, (subject, text) in zip(forks, documents.items(), strict=True):
        fork += si.user(f"{text}\n\nWrite one note about {subject}.")
        fork += si.assistant(si.gen("note", max_tokens=32, temperature=0))
    forks.join()
    s += si.user("Merge the notes into one answer:\n" + "\n".join(f"- {note}" for note in s["note"]))
    s += si.assistant(si.gen("summary", max_tokens=96, temperature=0))


def main() -> None:
    """Print the notes, the summary and the report."""
    with si.default_backend():
        state = summarise.run(DOCUMENTS)
        for subject, note in zip(DOCUMENTS, state["note"], strict=True):
            print(f"{subject}: {note}")
        print(f"\n{state['summary']}\n\n{state.slo_report()}")


if __name__ == "__main__":
    main()
