"""A backend whose model is a function of the prompt, and one whose engine is real."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent)]

from scripted_client import ScriptedClient  # noqa: E402
from slow_engine import SlowEngine, slow_engine  # noqa: E402

from superinfer.lang.backend import RuntimeEndpoint, TextBackend, set_default_backend  # noqa: E402
from superinfer.runtime import client as client_module  # noqa: E402
from superinfer.runtime.config import EngineConfig  # noqa: E402
from superinfer.runtime.launch import EngineProcess, launch_engine  # noqa: E402

CHAT_TEMPLATE = (
    "{%- for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>' }}{%- endif %}"
)


@pytest.fixture(autouse=True, scope="module")  # a session's would be for the other folders' tests, too
def patient_links() -> Iterator[None]:
    """Clients of this process take an engine to be frozen after a minute: a machine may stand still for a second. How
    soon they are to notice it, and that they do, is for tests/runtime/test_client.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_module, "HEARTBEAT_TIMEOUT_MS", 60_000)
        yield


@pytest.fixture
def model() -> Iterator[ScriptedClient]:
    """The scripted client behind the default backend of this test."""
    client = ScriptedClient()
    set_default_backend(TextBackend(client))  # type: ignore[arg-type]
    yield client
    set_default_backend(None)


@pytest.fixture(scope="session")
def talking_llama(random_llama: Path) -> Path:
    """The random checkpoint with a tokenizer: bytes, three special tokens, a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|pad|>", "<|begin|>", "<|end|>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(random_llama)
    return random_llama


@pytest.fixture
def fresh_engine(talking_llama: Path) -> Iterator[EngineProcess]:
    """An engine that the test may break."""
    config = EngineConfig(model=str(talking_llama), kv_tokens=4096, max_batch_tokens=128, max_batch_size=16, threads=1)
    with launch_engine(config) as process:
        yield process


@pytest.fixture(scope="session")
def talking_engine(talking_llama: Path) -> Iterator[EngineProcess]:
    """One engine for the tests that leave it whole."""
    config = EngineConfig(model=str(talking_llama), kv_tokens=4096, max_batch_tokens=128, max_batch_size=16, threads=1)
    with launch_engine(config) as process:
        yield process


@pytest.fixture(scope="session")
def slow(talking_llama: Path) -> Iterator[SlowEngine]:
    """An engine on which a request of 900 tokens lasts for 18 s: what tests interrupt has not ended before."""
    with slow_engine(talking_llama, step_s=0.02) as engine:
        yield engine


@pytest.fixture
def endpoint(talking_engine: EngineProcess) -> Iterator[RuntimeEndpoint]:
    """The default backend of this test: a connection to the engine."""
    with RuntimeEndpoint(talking_engine.address) as backend:
        assert isinstance(backend, RuntimeEndpoint)
        set_default_backend(backend)
        yield backend
        set_default_backend(None)
