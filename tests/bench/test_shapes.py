"""The tokenizer of a model without weights: every id has a text, and texts are as long as they were asked to be."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tokenizers

from superinfer.bench.shapes import CONFIGS, write_shape, write_tokenizer
from superinfer.embedded import model_path
from superinfer.errors import InvalidRequestError
from superinfer.runtime.engine.grammar_worker import load_tokenizer_info
from superinfer.runtime.models.config import load_config
from superinfer.runtime.tokenization import Tokenizer

KNOWN = 4092  # tokens of the embedded model but for those of tool calls


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shape("llama-3-8b", tmp_path_factory.mktemp("shape"), tokenizer=True)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(str(folder))


def size_of(folder: Path) -> int:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()


def test_it_is_as_large_as_the_model_and_every_id_has_a_text(folder: Path, tokenizer: Tokenizer):
    assert load_config(folder).vocab_size == size_of(folder) == 128256
    assert tokenizer.eos_token_id == 2 and load_config(folder).eos_token_ids == (2,)
    assert all(tokenizer.decode([i], skip_special=False) for i in range(128256))


def test_what_random_weights_write_is_as_many_tokens_when_it_is_read_again(tokenizer: Tokenizer):
    rng = random.Random(0)
    fillers = [rng.randrange(KNOWN, 128256) for _ in range(2000)]
    assert tokenizer.encode(tokenizer.decode(fillers)) == fillers
    any_ids = [rng.randrange(3, 128256) for _ in range(20_000)]
    assert len(tokenizer.encode(tokenizer.decode(any_ids))) == pytest.approx(20_000, rel=0.08)


def test_it_writes_chats_and_json_as_the_embedded_model_does(tokenizer: Tokenizer):
    embedded = Tokenizer(str(model_path()))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    assert tokenizer.render_chat(messages) == embedded.render_chat(messages)
    text = '{"name": "Ann", "ages": [3, 14], "city": "Rome"}'
    assert tokenizer.encode(text) == embedded.encode(text)


def test_a_grammar_sees_its_bytes(folder: Path):
    info = load_tokenizer_info(str(folder), 128256, (2,))
    assert info.vocab_type.name == "BYTE_LEVEL" and info.decoded_vocab[KNOWN] == b" babab"


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_shape_may_have_one(name: str, tmp_path: Path):
    path = write_shape(name, tmp_path, layers=1, tokenizer=True)
    assert size_of(path) == CONFIGS[name]["vocab_size"]


def test_a_vocabulary_too_small_for_it_is_refused(tmp_path: Path):
    with pytest.raises(InvalidRequestError, match="vocab_size=4000 must be at least 4092"):
        write_tokenizer(tmp_path, 4000)
