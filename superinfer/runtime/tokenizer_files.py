"""The files of a checkpoint's tokenizer: what must be there, and what transformers does not look for."""

from __future__ import annotations

from pathlib import Path

import msgspec

from superinfer.errors import ModelLoadError

OTHER_FILES = ("tokenizer.model", "tekken.json", "vocab.json")  # SentencePiece's, Mistral's, GPT-2's


class ProcessorFields(msgspec.Struct):
    """chat_template.json, where checkpoints for transformers' processors keep their chat template."""

    chat_template: str | dict[str, str]


def check_tokenizer(folder: Path) -> None:
    """Raises ModelLoadError where there is none that is read."""
    if (folder / "tokenizer.json").is_file():
        return
    other = next((name for name in OTHER_FILES if (folder / name).is_file()), None)
    if other is not None:
        raise ModelLoadError(
            f"{folder} has {other}, but no tokenizer.json, which is what is read; convert it: "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one"
        )
    raise ModelLoadError(
        f"{folder} has no tokenizer; copy tokenizer.json and tokenizer_config.json from the model that it was made of"
    )


def template_beside(folder: Path) -> str | dict[str, str] | None:
    """The template of chat_template.json; None where there is none. Raises ModelLoadError."""
    file = folder / "chat_template.json"
    if not file.is_file():
        return None
    try:
        return msgspec.json.decode(file.read_bytes(), type=ProcessorFields).chat_template
    except (OSError, msgspec.DecodeError) as error:
        raise ModelLoadError(f"{file} holds no chat template: {error}") from error
