"""Tokenizers as the supported families have them: text to tokens, and back in whatever pieces they come."""

from __future__ import annotations

import asyncio
import json
import random
import re
from pathlib import Path

import pytest
from published_tokenizers import BUILT, OTHER_SCRIPTS, write_tokenizer

from superinfer.errors import ModelLoadError
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import launch_engine
from superinfer.runtime.protocol import Grammar, SamplingParams
from superinfer.runtime.text import TextClient, TextRequest
from superinfer.runtime.tokenization import Tokenizer

KINDS = sorted(BUILT)
BYTE_FALLBACK = ["llama2", "mistral"]
TEXTS = [OTHER_SCRIPTS, "  two spaces lead", "a  b\n\nc ", "é", " ", "{'a': [1, 22, 333]}\n"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: write_tokenizer(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def tokenizers(folders) -> dict[str, Tokenizer]:
    return {kind: Tokenizer(str(folder)) for kind, folder in folders.items()}


def random_ids(tokenizer: Tokenizer, rng: random.Random) -> list[int]:
    """Of any tokens, often those of single bytes, and of ids that the tokenizer has none for, as padded models do."""
    vocab = tokenizer._backend.get_vocab_size()
    return [rng.randrange(vocab + 5) if rng.random() < 0.6 else rng.randrange(300) for _ in range(rng.randrange(1, 14))]


@pytest.mark.parametrize("skip_special", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_any_tokens_one_by_one_are_the_text_of_all_at_once(tokenizers, kind, skip_special):
    tokenizer, rng = tokenizers[kind], random.Random(7)
    for _ in range(500):
        ids = random_ids(tokenizer, rng)
        detokenizer = tokenizer.detokenizer(skip_special=skip_special)
        pieces = [detokenizer.push([token_id]) for token_id in ids]
        assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids, skip_special=skip_special), ids


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_a_text_are_read_as_the_library_reads_them(tokenizers, kind):
    tokenizer, backend, rng = tokenizers[kind], tokenizers[kind]._backend, random.Random(7)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special=skip) == backend.decode(ids, skip_special_tokens=skip)
        assert tokenizer.decode(ids).lstrip(" ") == text.lstrip(" ")
    plain = [i for i in range(backend.get_vocab_size()) if not (backend.id_to_token(i) or "").startswith("<0x")]
    for _ in range(200):
        ids = rng.choices(plain, k=9)
        assert tokenizer.decode(ids) == backend.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", BYTE_FALLBACK)
def test_bytes_that_are_no_character_cost_no_character_beside_them(tokenizers, kind):
    """The library would replace every byte of such a run, and raise where a stream has given some of them out."""
    tokenizer = tokenizers[kind]
    ids = [tokenizer._backend.token_to_id(f"<0x{byte:02X}>") for byte in b"o\xc3\xa9\xffk\xe6\x97\xa5\xe6"]
    assert tokenizer.decode(ids) == "oé\ufffdk日\ufffd"


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_goes_on_from_the_text_before_it(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for text in ("the token of the request", "an answer  of\n two lines"):
        ids = tokenizer.encode(text)
        for cut in range(2, len(ids)):
            before, after = ids[:cut], ids[cut:]
            detokenizer = tokenizer.detokenizer(begun=tokenizer.is_text(before))
            assert tokenizer.decode(before) + detokenizer.push(after) + detokenizer.flush() == text
        assert tokenizer.decode(ids[:2]) + "".join(tokenizer.piece(token_id) for token_id in ids[2:]) == text


def write_model(folder: Path) -> None:
    """config.json of a small Llama with eleven tokens more than the tokenizer beside it."""
    tokens = json.loads((folder / "tokenizer.json").read_text())
    vocab = 1 + max(*tokens["model"]["vocab"].values(), *(token["id"] for token in tokens["added_tokens"]))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab + 11, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 1024,
        "eos_token_id": None,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_engine_answers_goes_on_from_the_prompt_whatever_it_says(folders, tokenizers, kind):
    """A model of random weights: its tokens are any tokens, bytes of no character among them."""
    write_model(folders[kind])
    prompt = "The capital of France is"
    sampling = SamplingParams(max_tokens=100, n=4, seed=3, ignore_eos=True)
    pattern = " (it is|they are)  the é日 (first|second) answer"
    constrained = SamplingParams(seed=3, grammar=Grammar(kind="regex", source=pattern))
    config = EngineConfig(model=str(folders[kind]), load_format="dummy", device="cpu", kv_tokens=4096, threads=1)

    async def answers():
        with launch_engine(config) as engine:
            async with await TextClient.connect(engine.address) as text:
                free = await text.complete(TextRequest(prompt=prompt, sampling=sampling))
                return free, [
                    (await text.complete(TextRequest(prompt=before, sampling=constrained)))[0].text
                    for before in (prompt, next(iter(tokenizer.special_tokens)))
                ]

    tokenizer = tokenizers[kind]
    results, forced = asyncio.run(answers())
    assert all(re.fullmatch(pattern, text) for text in forced), forced
    assert all(len(result.token_ids) == 100 for result in results)
    for result in results:
        assert prompt + result.text == tokenizer.decode(tokenizer.encode(prompt) + result.token_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_that_share_a_beginning_are_tokenized_as_each_alone(tokenizers, kind):
    tokenizer, rng = tokenizers[kind], random.Random(5)
    parts = ["a", " the", "  ", "\n", "é", "日本", "12", "<|im_end|>", "</s>", "[INST]", "don't", " request"]
    for _ in range(150):
        text = "".join(rng.choices(parts, k=rng.randrange(60)))
        ends = ["".join(rng.choices(parts, k=rng.randrange(1, 5))) for _ in range(2)]
        prompt, each = tokenizer.encode_each(text, ends)
        assert prompt == tokenizer.encode(text)
        assert each == [tokenizer.encode(text + end) for end in ends], (text, ends)


@pytest.mark.parametrize("kind", KINDS)
def test_a_length_that_the_tokenizer_was_trained_with_cuts_and_fills_no_prompt(tmp_path, tokenizers, kind):
    write_tokenizer(tmp_path, kind)
    file = tmp_path / "tokenizer.json"
    told = json.loads(file.read_text())
    told["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    told["padding"] = {
        "strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<unk>",
    }  # fmt: skip
    file.write_text(json.dumps(told))
    tokenizer = Tokenizer(str(tmp_path))
    for text in ("é", "the token of the request " * 4):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text)[-1] != 0


@pytest.mark.parametrize(
    "files,match",
    [
        ([], r"has no tokenizer; copy tokenizer\.json and tokenizer_config\.json from the model"),
        (["tokenizer.model"], r"has tokenizer\.model, but no tokenizer\.json.*convert it.*save_pretrained"),
        (["vocab.json", "merges.txt"], r"has vocab\.json, but no tokenizer\.json"),
        (["tekken.json"], r"has tekken\.json, but no tokenizer\.json"),
    ],
)
def test_a_model_without_its_tokenizer_is_refused_before_an_engine_is_started(folders, tmp_path, files, match):
    write_model(folders["qwen"])
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((folders["qwen"] / name).read_text())
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelLoadError, match=match):
        launch_engine(EngineConfig(model=str(tmp_path), address="ipc:///nowhere/engine"), for_text=True)
    with pytest.raises(ModelLoadError, match=match):
        Tokenizer(str(tmp_path))
