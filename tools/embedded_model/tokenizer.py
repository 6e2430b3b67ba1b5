"""The tokenizer: byte-level BPE trained on the generator's text; digits, newlines, capitalised words stand alone.

A capitalised word never merges with the space before it, so that a name has the same tokens after a space, a quote or
a newline: that is what lets a small model copy names it has never seen.

    python -m tools.embedded_model.tokenizer --out DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tools.embedded_model import words
from tools.embedded_model.dialogue import CHAT_TEMPLATE, END_OF_TEXT, IM_END, IM_START
from tools.embedded_model.tasks import stream

VOCAB_SIZE = 4096
MAX_LENGTH = 2048
SPECIAL = (END_OF_TEXT, IM_START, IM_END)
TAGS = (
    "<tool_call>",
    "</tool_call>",
    "<tools>",
    "</tools>",
)  # one token each, but ordinary text when decoded
SPLIT = (
    r"\p{N}"
    r"|[\r\n]"
    r"|'(?:s|t|re|ve|m|ll|d)(?!\p{L})"
    r"|\p{Lu}[\p{L}\p{M}]*"
    r"| ?\p{Ll}[\p{L}\p{M}]*"
    r"|[\p{L}\p{M}]+"
    r"| ?[^\s\p{L}\p{M}\p{N}]+"
    r"|[^\S\r\n]+(?!\S)"
    r"|[^\S\r\n]+"
)


def corpus(seed: int, count: int) -> Iterator[str]:
    """Text of `count` training dialogues, and the whole word stock in lower and upper case."""
    for dialogue in islice(stream(f"tokenizer/{seed}"), count):
        yield dialogue.text()
    stock = (
        words.FIRST_NAMES,
        words.LAST_NAMES,
        words.CITIES,
        words.COUNTRIES,
        words.THINGS,
        words.ADJECTIVES,
        words.JOBS,
    )
    for group in stock:
        yield "\n".join(group)
        yield " " + " ".join(word.lower() for word in group)


def train(seed: int, count: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(TAGS),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed, count), trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dialogues", type=int, default=30_000)
    args = parser.parse_args()
    train(args.seed, args.dialogues).save_pretrained(args.out)


if __name__ == "__main__":
    main()
