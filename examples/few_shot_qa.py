"""Answer questions about texts, taught by two examples in the prompt.

    python examples/few_shot_qa.py

All questions run at once. Whoever comes second finds the KV of the shared examples in the cache.
"""

import superinfer as si

SHOTS = [
    ("Blue Bakery is closed on Monday. Blue Bakery is owned by Mira Smith.", "Who owns Blue Bakery?", "Mira Smith"),
    ("The timer weighs 300 g. The timer is in the office.", "Where is the timer?", "the office"),
]
QUESTIONS = [
    ("The lamp costs $45. The lamp is in the kitchen.", "How much does the lamp cost?"),
    ("Anna works as a pilot. Anna was born in Lisbon.", "What is the job of Anna?"),
    ("The mayor of Ghent is Tom Berg. Ghent is in Belgium.", "Who is the mayor of Ghent?"),
]


@si.function(deadline=30.0)
def answer(s, context, question):
    """One question after the examples."""
    for shot in SHOTS:
        s += "Context: {}\nQ: {}\nA: {}\n\n".format(*shot)
    s += f"Context: {context}\nQ: {question}\nA:"
    s += si.gen("answer", max_tokens=16, stop="\n", temperature=0)


def main() -> None:
    """Ask all questions, print all answers."""
    with si.default_backend():
        states = answer.run_batch(QUESTIONS)
        for (_, question), state in zip(QUESTIONS, states, strict=True):
            cached = state.get_meta_info("answer")["cached_tokens"]
            print(f"{question}  {state['answer'].strip()}  ({cached} prompt tokens were cached)")


if __name__ == "__main__":
    main()
