"""Extract fields from messages as JSON, many messages at once, each to its own deadline.

    python examples/json_extraction.py

An `async def` program: a batch of thousands needs no thread for each. A message that fails harms no other.
"""

import json

import superinfer as si

FIELDS = ("name", "city", "phone")
MESSAGES = [
    "Hello, my name is Anna Berg. I live in Lisbon. My phone number is 271-2675. Thanks!",
    "I am Max Patel. I want a lamp. I am writing from Oslo.",
    "Good morning. Phone: 529-3099. I am from Ghent. The customer is Mira Smith.",
]


@si.function(deadline=30.0)
async def extract(s, message):
    """The fields of one message; null where it says nothing."""
    s += si.user(f"Extract {', '.join(FIELDS)} as JSON.\n\n{message}")
    s += si.assistant(si.gen("json", max_tokens=64, temperature=0))
    return json.loads(await s.get("json"))


def main() -> None:
    """Print each message's fields."""
    with si.default_backend():
        for state in extract.run_batch([(message,) for message in MESSAGES], progress_bar=False):
            if state.error():
                print(f"could not be read: {state.error()}")
            else:
                print(json.dumps(state.ret_value))


if __name__ == "__main__":
    main()
