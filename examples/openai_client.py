"""The OpenAI client against `superinfer serve`, with an SLO beside the messages.

python examples/openai_client.py                      # starts a server of its own
python examples/openai_client.py http://HOST:PORT/v1  # asks one that runs
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import openai


@contextlib.contextmanager
def server() -> Iterator[str]:
    """`superinfer serve` on a free port, for the length of the block; gives its URL."""
    command = [sys.executable, "-m", "superinfer", "serve", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout or ():
            if line.startswith("serving at"):
                yield line.split()[2]
                break
        else:
            raise SystemExit("the server did not start; it said why above")
    finally:
        process.terminate()
        process.wait()


def ask(url: str, question: str) -> None:
    """Stream one answer that is promised to start within 2 s and to be complete within 20 s."""
    client = openai.OpenAI(base_url=url, api_key="none")
    model = next(iter(client.models.list())).id
    chunks = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=64,
        stream=True,
        extra_body={"slo": {"ttft_ms": 2000, "deadline_ms": 20_000}},
    )
    for chunk in chunks:
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="", flush=True)
    slo = chunk.slo  # the last chunk says what became of the promise
    kept = "met" if slo["met"] else f"missed ({slo['why']})"
    print(f"\n{kept}: first token after {slo['ttft_ms']:.0f} ms, all after {slo['e2e_ms']:.0f} ms")


def main() -> None:
    """Ask one question."""
    with contextlib.nullcontext(sys.argv[1]) if len(sys.argv) > 1 else server() as url:
        ask(url, "Hello! What can you do?")


if __name__ == "__main__":
    main()
