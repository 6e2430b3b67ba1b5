"""Tokenizers built as the published ones are, from this repository's texts: Llama 2's and 3's, Mistral's, Qwen's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
    "<|python_tag|>",
]  # fmt: skip
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_PLAIN = ["<tool_call>", "</tool_call>", "<think>", "</think>"]  # added, but not special: they are text
MISTRAL_SPECIAL = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"]
SENTENCE = ["<unk>", "<s>", "</s>"]


OTHER_SCRIPTS = "日本語のテキスト、素晴らしい。 Zoë naïve façade — “quotes” … 😀👍🏽 Привет мир"


def corpus() -> list[str]:
    docs = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))[:6]
    return [OTHER_SCRIPTS, *(path.read_text(encoding="utf-8") for path in docs)]


def byte_level(words: str, digits_nfc: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=not digits_nfc))
    if digits_nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def llama3() -> Tokenizer:
    tokenizer = byte_level(LLAMA3_WORDS, False)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in LLAMA3_SPECIAL])
    bos = LLAMA3_SPECIAL[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
            ),
        ]
    )
    return tokenizer


def qwen() -> Tokenizer:
    tokenizer = byte_level(LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}"), True)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in QWEN_SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in QWEN_PLAIN])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def sentencepiece(metaspace: bool, special: list[str]) -> Tokenizer:
    """metaspace: as Mistral 7B v0.3 has it; else by normalizers, as Llama 2 has it."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    reserved = [*SENTENCE, *special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=1500, special_tokens=reserved, limit_alphabet=120, show_progress=False)
    )
    told = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in told["merges"]]
    tokenizer = Tokenizer(models.BPE(told["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in [*SENTENCE, *special]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def llama2() -> Tokenizer:
    return sentencepiece(False, [])


def mistral() -> Tokenizer:
    return sentencepiece(True, MISTRAL_SPECIAL)


BUILT = {"llama2": llama2, "llama3": llama3, "mistral": mistral, "qwen": qwen}
ENDS = {"llama2": "</s>", "llama3": "<|eot_id|>", "mistral": "</s>", "qwen": "<|im_end|>"}
BEGINS = {"llama2": "<s>", "llama3": "<|begin_of_text|>", "mistral": "<s>", "qwen": None}


def write_tokenizer(folder: Path, kind: str, **config: Any) -> Path:
    """tokenizer.json and tokenizer_config.json of `kind`, a key of BUILT; config: further values of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    BUILT[kind]().save(str(folder / "tokenizer.json"))
    stated: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": ENDS[kind]}
    if BEGINS[kind] is not None:
        stated["bos_token"] = BEGINS[kind]
    (folder / "tokenizer_config.json").write_text(json.dumps(stated | config))
    return folder
