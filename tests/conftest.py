"""Shared fixtures: a small random model on disk, and one engine serving it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from chat_checkpoint import write_checkpoint
from hypothesis import HealthCheck, settings
from overflowing_checkpoint import write_overflowing_checkpoint

from superinfer.runtime.client import EngineClient
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import EngineProcess, launch_engine

# How long an example takes says nothing on a machine that may stand still for a second.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's job in the background; so would its children
    signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    # Triton reads it once, when it is first imported, by whichever test comes first: kernels run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a random float32 Llama: 512 tokens, context 1024. No tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,  # wide enough that greedy choices have clear margins
        eos_token_id=2,
        bos_token_id=1,
    )
    path = tmp_path_factory.mktemp("random-llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def engine(random_llama: Path) -> Iterator[EngineProcess]:
    """One engine for every test that does not break it."""
    config = EngineConfig(
        model=str(random_llama), kv_tokens=4096, max_batch_tokens=128, max_batch_size=16, max_queue=64
    )
    with launch_engine(config) as process:
        yield process


@pytest.fixture
def client(engine: EngineProcess) -> Iterator[EngineClient]:
    """A connection of the test's own."""
    with EngineClient(engine.address) as connection:
        yield connection


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a chat checkpoint for `load_format="dummy"`: a token is a character."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def tiny_config(tiny_checkpoint: Path) -> EngineConfig:
    """Settings of an engine that answers chats with random ASCII."""
    return EngineConfig(model=str(tiny_checkpoint), load_format="dummy", device="cpu", kv_tokens=16384, threads=1)


@pytest.fixture(scope="session")
def tiny_engine(tiny_config: EngineConfig) -> Iterator[EngineProcess]:
    """One engine for every chat test that does not break it."""
    with launch_engine(tiny_config) as process:
        yield process


@pytest.fixture(scope="session")
def overflowing_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a chat checkpoint that computes NaN behind one character, and a token is a character."""
    return write_overflowing_checkpoint(tmp_path_factory.mktemp("checkpoint") / "overflowing")


@pytest.fixture(scope="session")
def overflowing_engine(overflowing_checkpoint: Path) -> Iterator[EngineProcess]:
    """It serves that."""
    config = EngineConfig(
        model=str(overflowing_checkpoint),
        device="cpu",
        kv_tokens=8192,
        max_batch_tokens=64,
        max_batch_size=64,
        threads=1,
    )
    with launch_engine(config) as process:
        yield process
