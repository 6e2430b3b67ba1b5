"""Runs step plans on a model with plain torch kernels, in this process: the executor of CPU engines."""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np
import torch

from superinfer.errors import InvalidRequestError, ModelLoadError, UnsupportedError
from superinfer.kernels.attention import PagedAttention, layer_views
from superinfer.kernels.sampling import token_logprobs
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.engine.constraints import split_forced
from superinfer.runtime.engine.executor import ExecutorLimits, TierLimits
from superinfer.runtime.engine.grammar import GrammarCompiler
from superinfer.runtime.engine.readback import split_scores, without_score, without_token
from superinfer.runtime.engine.sampling_state import Sampled, SamplingState
from superinfer.runtime.engine.step_inputs import BlockTables, StepAssembler, StepInputs, Wanted
from superinfer.runtime.kv.duplex_cpu import CpuDuplex
from superinfer.runtime.kv.link_profile import LinkProfile
from superinfer.runtime.kv.pinned import RESERVE_BYTES
from superinfer.runtime.memory import free_memory, zeros_on_demand
from superinfer.runtime.models.config import ModelConfig, load_config
from superinfer.runtime.models.decoder import CausalLM
from superinfer.runtime.models.loader import Progress, load_model, resolve_model
from superinfer.runtime.protocol import TokenLogprob
from superinfer.runtime.scheduler.plan import StepPlan, StepResult

if TYPE_CHECKING:
    from superinfer.runtime.engine.cuda_executor import CudaExecutor

log = logging.getLogger("superinfer.engine")

# Default pool: room for every slot at this length, within this share of the memory that is free.
DEFAULT_SEQUENCE_TOKENS = 2048
DEFAULT_MEMORY_SHARE = 0.25


class ModelExecutor:
    """Implements `Executor`. `submit` runs the step at once; `collect` returns its result or raises what it raised.

    A step that raised has still freed, initialised and extended the slots its plan names; its tokens are lost, later
    plans run as usual. Its copies have been started all the same.
    """

    def __init__(
        self,
        model: CausalLM,
        limits: ExecutorLimits,
        *,
        model_name: str,
        path: str,
        num_dram_blocks: int = 0,
        link_bytes_per_s: float | None = None,
    ) -> None:
        weight = model.lm_head.weight
        config = model.config
        self.limits = limits
        self.depth = 1
        self.waited_s = 0.0
        self.model_name = model_name
        self.path = path
        self.architecture = config.architecture
        self.eos_token_ids = config.eos_token_ids
        self.dtype = str(weight.dtype).removeprefix("torch.")
        self.device = str(weight.device)
        self.captured_tokens = 0  # see CudaExecutor

        page = limits.page_size
        shape = (limits.num_blocks, config.num_layers, 2, page, config.num_kv_heads, config.head_dim)
        self.cache = zeros_on_demand(shape, weight.dtype)  # memory is taken as blocks are first used
        self.duplex: CpuDuplex | None = None
        self.tier: TierLimits | None = None
        num_dram_blocks = _dram_blocks(num_dram_blocks, self.cache)
        if num_dram_blocks:
            self.duplex = CpuDuplex(self.cache, num_dram_blocks, bytes_per_s=link_bytes_per_s)
            link = None
            if link_bytes_per_s is not None:
                link = LinkProfile.symmetric("as configured", self.cache[0].nbytes, link_bytes_per_s)
            self.tier = TierLimits(num_dram_blocks, self.cache[0].nbytes, link)
        self._model = model
        self._device = weight.device
        self._views = layer_views(self.cache)
        blocks_per_slot = -(-limits.max_model_len // page)
        self._tables = BlockTables(limits.num_slots, blocks_per_slot, limits.num_blocks, config.num_layers * 2 * page)
        token_bytes = 2 * config.kv_row * weight.dtype.itemsize
        self._assembler = StepAssembler(self._tables, page, token_bytes, config.windows, weight.dtype, self._device)
        self.grammars = GrammarCompiler(path, config.vocab_size, config.eos_token_ids)
        self._sampling = SamplingState(limits.num_slots, config.vocab_size, self._device, self.grammars)
        self._last_tokens = torch.zeros(limits.num_slots, dtype=torch.int64, device=self._device)
        self._results: deque[StepResult | Exception] = deque()

    def submit(self, plan: StepPlan) -> None:
        started = time.perf_counter()
        try:
            with torch.inference_mode():
                result = self._run(plan)
        except Exception as error:
            self._results.append(error)
            return
        if self.duplex is not None:
            result.copied, result.failed_copies, result.link = self.duplex.report()
        result.elapsed = time.perf_counter() - started
        self._results.append(result)

    def collect(self) -> StepResult:
        """Raises what the step raised; RuntimeError when no step is waiting to be collected."""
        if not self._results:
            raise RuntimeError("collect() without a submitted step")
        result = self._results.popleft()
        if isinstance(result, Exception):
            raise result
        return result

    @property
    def busy(self) -> bool:
        """See Executor: a step is done when it has been submitted."""
        return False

    def close(self) -> None:
        """Results not collected are dropped; the executor cannot be used afterwards."""
        self.grammars.close()
        self._results.clear()
        self._views.clear()
        self.cache = torch.empty(0)
        self.duplex = None

    def _run(self, plan: StepPlan) -> StepResult:
        if self.duplex is not None:
            self.duplex.start(plan.copies, plan.waits)
        for slot in plan.freed:
            self._tables.clear(slot)
            self._sampling.release(slot)
        for init in plan.init:
            self._tables.clear(init.slot)
            self._sampling.start(init)
        for work in plan.work:
            self._tables.append(work.slot, work.new_blocks)
        result = StepResult(plan.step)
        if self.duplex is not None:
            self.duplex.wait(plan.waits)
        if plan.work:
            inputs = self._assembler.assemble(plan.work)
            wanted = inputs.wanted()
            hidden = self._forward(inputs, wanted.rows)
            self._sample(inputs, wanted, hidden, result)
            self._score(inputs, wanted, hidden, result)
        return result

    def _forward(self, inputs: StepInputs, wanted: np.ndarray) -> torch.Tensor:
        """[wanted, hidden]. wanted: rows of the step."""
        if inputs.continued is not None:
            rows, slots = inputs.continued
            inputs.ids.index_copy_(0, rows, self._last_tokens.index_select(0, slots))
        kv_heads = self._model.config.num_kv_heads
        attention = PagedAttention(self._views, kv_heads, inputs.key_index, inputs.value_index, inputs.groups)
        some = None
        if not np.array_equal(wanted, np.arange(len(inputs.ids))):
            some = torch.from_numpy(wanted).to(self._device)
        hidden: torch.Tensor = self._model(inputs.ids, inputs.positions, attention, some)
        return hidden

    def _sample(self, inputs: StepInputs, wanted: Wanted, hidden: torch.Tensor, result: StepResult) -> None:
        picked = wanted.sampled
        if not picked:
            return
        slots = np.array([inputs.work[i].slot for i in picked], dtype=np.int64)
        for i in picked:
            if not inputs.work[i].is_decode:
                self._sampling.caught_up(inputs.work[i].slot, inputs.work[i].start + inputs.work[i].length)
        sampled = self._sampling.sample(self._model.logits(hidden[: len(picked)]), slots)
        self._last_tokens.index_copy_(0, torch.from_numpy(slots).to(self._device), sampled.tokens)
        assert sampled.told is not None
        tokens = sampled.told.tolist()
        self._sampling.told(slots, lambda: tokens)
        result.not_finite = without_token(slots, sampled.told.numpy())
        result.tokens = dict(zip(slots.tolist(), tokens, strict=True))
        result.logprobs = self._logprobs(sampled, slots, tokens)
        result.forced, _ = split_forced(sampled.forced, (), ())

    def _logprobs(self, sampled: Sampled, slots: np.ndarray, tokens: list[int]) -> dict[int, TokenLogprob]:
        if sampled.logprobs is None or sampled.logprob_rows is None:
            return {}
        found = {}
        chosen, ids, values = (part.tolist() for part in sampled.logprobs)
        for i, row in enumerate(sampled.logprob_rows.tolist()):
            slot = int(slots[row])
            top = list(zip(ids[i], values[i], strict=True))[: self._sampling.top_logprobs(slot)]
            found[slot] = TokenLogprob(tokens[row], chosen[i], top)
        return found

    def _score(self, inputs: StepInputs, wanted: Wanted, hidden: torch.Tensor, result: StepResult) -> None:
        """Logits of all scored positions of the step at once; most steps score nothing."""
        scored = wanted.scored
        if not scored:
            return
        tokens = np.concatenate([np.array(inputs.work[i].score, dtype=np.int64) for i in scored])
        logits = self._model.logits(hidden[len(wanted.sampled) :])
        works = [inputs.work[i] for i in scored]
        tops = [self._sampling.top_logprobs(work.slot) for work in works]
        values = token_logprobs(logits, torch.from_numpy(tokens).to(self._device), max(tops))
        result.scores = split_scores(works, tops, values)
        result.not_finite |= without_score(result.scores)


def build_executor(config: EngineConfig, on_progress: Progress | None = None) -> ModelExecutor | CudaExecutor:
    """Load the model that `config` names and make room for its KV cache.

    on_progress: called with a label and a fraction 0..1 while loading.
    Raises ModelLoadError (no such checkpoint, or damaged), UnsupportedError (known, but not implemented here), or
    InvalidRequestError (settings that cannot work together).
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = resolve_device(config)
    path = resolve_model(config.model)
    model_config = load_config(path)
    length = model_length(config, model_config)
    own_dtype = model_config.dtype if device.type == "cuda" else torch.float32
    dtype = own_dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    limits = None
    if device.type == "cpu":  # before minutes of loading, not after
        limits = executor_limits(config, model_config, length, _pool_tokens(config, model_config, dtype, length))
    model = load_model(
        path,
        model_config,
        dtype=dtype,
        device=device,
        load_format=config.load_format,
        seed=config.seed,
        on_progress=on_progress,
    )
    if limits is None:
        from superinfer.runtime.engine.cuda_build import build_cuda_executor  # needs triton

        return build_cuda_executor(config, model, length, str(path), on_progress)
    return ModelExecutor(
        model,
        limits,
        model_name=config.model,
        path=str(path),
        num_dram_blocks=config.dram_tokens // config.page_size,
        link_bytes_per_s=config.link_gbps * 1e9 if config.link_gbps is not None else None,
    )


def resolve_device(config: EngineConfig) -> torch.device:
    """Raises UnsupportedError for a GPU that torch does not see."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("device='cuda' is not available: torch sees no GPU; use device='cpu'")
    on_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def model_length(config: EngineConfig, model: ModelConfig) -> int:
    """The longest sequence wanted, in tokens. Raises InvalidRequestError for more than the model has positions for."""
    if config.max_model_len is not None and config.max_model_len > model.max_length:
        raise InvalidRequestError(
            f"max_model_len={config.max_model_len} is more than the {model.max_length} positions of this model; lower "
            "it, or leave it out"
        )
    return config.max_model_len or model.max_length


def executor_limits(config: EngineConfig, model: ModelConfig, length: int, pool_tokens: int) -> ExecutorLimits:
    """length: from `model_length`. Raises InvalidRequestError for a pool without room for a block."""
    num_blocks = pool_tokens // config.page_size
    if num_blocks < 1:
        raise InvalidRequestError(
            f"the KV pool of {config.kv_tokens} tokens holds no block of page_size={config.page_size}; "
            "raise kv_tokens or lower page_size"
        )
    return ExecutorLimits(
        num_blocks=num_blocks,
        page_size=config.page_size,
        num_slots=config.max_batch_size,
        max_model_len=min(length, num_blocks * config.page_size),
        vocab_size=model.vocab_size,
    )


def _pool_tokens(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, model_len: int) -> int:
    per_token, free = model.kv_bytes_per_token(dtype), free_memory(torch.device("cpu"))
    if config.kv_tokens is not None:
        if config.kv_tokens * per_token > free:
            raise InvalidRequestError(
                f"kv_tokens={config.kv_tokens} takes {config.kv_tokens * per_token / 2**30:.1f} GiB, and "
                f"{free / 2**30:.1f} GiB of memory are free; lower it to {free // per_token} at most"
            )
        return config.kv_tokens
    page = config.page_size
    per_sequence = -(-min(model_len, DEFAULT_SEQUENCE_TOKENS) // page) * page
    tokens = min(config.max_batch_size * per_sequence, int(free * DEFAULT_MEMORY_SHARE) // per_token)
    if tokens < page:
        raise ModelLoadError(
            f"{free >> 20} MiB of free memory leave no room for one KV block of {page * per_token} bytes"
        )
    return tokens


def _dram_blocks(wanted: int, cache: torch.Tensor) -> int:
    """How many of the blocks wanted for the second tier there is memory for, once all of `cache` is in use."""
    if not wanted:
        return 0
    block_bytes, free = cache[0].nbytes, free_memory(torch.device("cpu"))
    most = max(0, free - cache.nbytes - RESERVE_BYTES) // block_bytes
    if most < wanted:
        held, asked = (blocks * block_bytes / 2**30 for blocks in (most, wanted))
        log.warning(
            "the DRAM tier has %.1f GiB instead of %.1f: %.1f GiB of memory are free, of which the KV pool takes %.1f "
            "and %.1f stay so",
            held, asked, free / 2**30, cache.nbytes / 2**30, RESERVE_BYTES / 2**30,
        )  # fmt: skip
    return min(most, wanted)
