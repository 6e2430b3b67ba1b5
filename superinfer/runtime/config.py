"""Settings of one engine process, as given on the command line or to `launch_engine`."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from superinfer.errors import InvalidRequestError

EMBEDDED = "embedded"

Admission = Literal["accept", "refuse", "degrade"]  # EngineConfig.admission


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How to run one engine.

    model: "embedded", a folder with a Hugging Face checkpoint, or a hub name (needs a network).
    address: ZMQ endpoint to bind, ipc://... or tcp://host:port; port 0 or "*" picks a free one. "": a private ipc path.
    dtype: "auto" is float32 on CPU, the checkpoint's own on CUDA.
    page_size: tokens in a KV block.
    kv_tokens: size of the KV pool in tokens; None: what suits the device.
    dram_tokens: size of a second KV tier in host memory, in tokens, for rotated and finished sequences; 0: none.
        Where memory is short it is smaller, with a warning.
    link_gbps: speed of the link between the tiers, 10^9 bytes/s each way, for the CPU; None: that of memory.
    max_model_len: longest prompt plus output in tokens, at most what the model has positions for; None: that. Where the
        KV pool holds fewer, so many.
    max_batch_size: sequences computed in one step.
    max_batch_tokens: tokens computed in one step; longer prompts are computed in chunks.
    max_queue: unfinished requests held before further ones are refused with QueueFullError.
    admission: what becomes of a request whose promise cannot be kept, as far as can be foreseen when it comes: "accept"
        (it runs in what the others leave; should load fall, its promise may be kept after all), "degrade" (it runs
        without its promise from the start, so that it never competes with those that came later), or "refuse"
        (OverloadedError, which says when to try again). Only policy "rota" foresees; the others accept.
    prefix_cache: share the KV of equal prefixes.
    jump_forward: take text that a grammar forces without sampling it, token by token; see docs/constrained.md.
    tune_products: measure at the start which algorithm each matrix product is to take, on a GPU in half precision. Some
        seconds; two starts may choose differently, and then round differently.
    plan_late: plan each step just before the GPU is done with the one before, so that whoever comes until then is in
        it; off: as soon as that one begins. See docs/architecture.md.
    load_format: "auto" reads safetensors; "dummy" makes random weights from the config alone.
    seed: of everything random in the engine.
    threads: torch CPU threads; None: all cores. Where there is other work, fewer are quicker: each waits for all.
    trace: file for a trace of steps, copies and requests, see docs/tracing.md; "": none.
    """

    model: str = EMBEDDED
    address: str = ""
    policy: str = "fcfs"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    page_size: int = 16
    kv_tokens: int | None = None
    dram_tokens: int = 0
    link_gbps: float | None = None
    max_model_len: int | None = None
    max_batch_size: int = 64
    max_batch_tokens: int = 512
    max_queue: int = 4096
    admission: Literal["accept", "refuse", "degrade"] = "accept"
    prefix_cache: bool = True
    jump_forward: bool = True
    tune_products: bool = True
    plan_late: bool = True
    load_format: Literal["auto", "dummy"] = "auto"
    seed: int = 0
    threads: int | None = None
    trace: str = ""

    def __post_init__(self) -> None:
        if not self.model.strip():  # as where a shell's variable was not set
            raise InvalidRequestError(
                f"model={self.model!r} names no model; give --model 'embedded', the folder of a checkpoint or a hub "
                "name (owner/name), or leave it out for the embedded one"
            )
        for name in ("page_size", "max_batch_size", "max_batch_tokens", "max_queue"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("kv_tokens", "max_model_len", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequestError(f"{name}={value} must be at least 1")
        if self.admission != "accept" and self.policy != "rota":
            raise InvalidRequestError(
                f"admission={self.admission!r} needs policy 'rota', which foresees; policy is {self.policy!r}"
            )
        if self.dram_tokens != 0 and self.dram_tokens < self.page_size:
            raise InvalidRequestError(
                f"dram_tokens={self.dram_tokens} holds no block of page_size={self.page_size}; raise it, or give 0"
            )
        if self.link_gbps is not None and not 0 < self.link_gbps < math.inf:
            raise InvalidRequestError(f"link_gbps={self.link_gbps} must be above 0 and finite")
        if self.max_batch_tokens < self.max_batch_size:
            raise InvalidRequestError(
                f"max_batch_tokens={self.max_batch_tokens} is below max_batch_size={self.max_batch_size}: "
                "every running sequence needs one token a step; raise max_batch_tokens or lower max_batch_size"
            )
