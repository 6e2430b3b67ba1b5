"""What is measured side by side: each arm is one server with its flags, ours or vLLM 0.24's.

Equal for every arm: model folder, random weights in bf16, KV blocks of 16 tokens, their number, longest request,
sequences and tokens in a step; where there is a second tier, its bytes. What differs is named in the arm.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = 16  # tokens in a KV block, ours and vLLM's default


@dataclass(frozen=True)
class Sizes:
    """What all arms share. Blocks are of PAGE tokens; block_bytes: K and V of all layers of one.

    ample, tight, half, turns: KV blocks of the pools that phases ask for. dram_bytes: of the second tier.
    weight_bytes: of the model. around_bytes: what a server holds of a GPU besides weights and blocks, at most.
    traced: our servers write `ARM.trace` in their folder (docs/tracing.md).
    """

    model: str
    block_bytes: int = 2 << 20
    ample: int = 24_000
    tight: int = 9_600
    half: int = 4_800
    turns: int = 4_096
    dram_bytes: int = 64 << 30
    weight_bytes: int = 16_060_522_496
    around_bytes: int = 6 << 30
    max_model_len: int = 8192
    max_seqs: int = 512
    batch_tokens: int = 8192
    dummy: bool = True
    own_flags: tuple[str, ...] = ()
    traced: bool = False

    def blocks(self, pool: str) -> int:
        """KV blocks of a pool by name."""
        return int(getattr(self, pool))

    def gpu_bytes(self, pool: str) -> int:
        """What a server with that pool holds of a GPU's memory, at most."""
        return self.weight_bytes + self.blocks(pool) * self.block_bytes + self.around_bytes


@dataclass(frozen=True)
class Arm:
    """One server. engine: superinfer or vllm. pool: which of Sizes' pools. flags: beyond what all arms share.

    send_slo, priority: what its client adds to each request; see bench serve.
    """

    name: str
    engine: str
    pool: str
    flags: tuple[str, ...] = ()
    dram: bool = False
    send_slo: bool = False
    priority: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def known_arms() -> dict[str, Arm]:
    """Every arm by name."""
    edf = ("--scheduling-policy", "priority")
    found = [
        # The flag has the usage say how many prompt tokens were cached, which `bench programs` records.
        Arm("vllm", "vllm", "ample", ("--enable-prompt-tokens-details",)),
        Arm("vllm-tight", "vllm", "tight"),
        Arm("vllm-edf", "vllm", "tight", edf, priority="edf"),
        Arm("vllm-offload", "vllm", "tight", dram=True),
        Arm("vllm-turns", "vllm", "turns"),
        Arm("vllm-turns-offload", "vllm", "turns", dram=True),
        Arm("ours", "superinfer", "ample", ("--policy", "fcfs")),
        Arm("ours-at-once", "superinfer", "ample", ("--policy", "fcfs", "--no-plan-late")),
        Arm("ours-fcfs", "superinfer", "tight", ("--policy", "fcfs")),
        Arm("ours-edf", "superinfer", "tight", ("--policy", "edf"), send_slo=True),
        Arm("ours-rota", "superinfer", "tight", ("--policy", "rota"), dram=True, send_slo=True),
        Arm("ours-fcfs-half", "superinfer", "half", ("--policy", "fcfs")),
        Arm("ours-rota-half", "superinfer", "half", ("--policy", "rota"), dram=True, send_slo=True),
        Arm("ours-turns", "superinfer", "turns", ("--policy", "fcfs")),
        Arm("ours-turns-tiers", "superinfer", "turns", ("--policy", "rota"), dram=True),
    ]
    return {arm.name: arm for arm in found}


def command_of(arm: Arm, sizes: Sizes, port: int, engine: str, stand_in: bool = False) -> list[str]:
    """The command that starts an arm. engine: the address that ours has beside its port; vLLM has none.
    stand_in: ours in vLLM's place, to try the harness where there is no vLLM."""
    if arm.engine == "vllm" and not stand_in:
        return _vllm(arm, sizes, port)
    return _superinfer(arm, sizes, port, engine)


def _superinfer(arm: Arm, sizes: Sizes, port: int, engine: str) -> list[str]:
    tier = ["--dram-tokens", str(sizes.dram_bytes // sizes.block_bytes * PAGE)] if arm.dram else []
    trace = ["--trace", f"{arm.name}.trace"] if sizes.traced else []
    return [
        sys.executable, "-m", "superinfer", "serve", "--model", sizes.model, "--model-name", "m",
        "--host", "127.0.0.1", "--port", str(port), "--engine-address", engine, "--no-page", "--no-access-log",
        *(["--load-format", "dummy"] if sizes.dummy else []),
        "--kv-tokens", str(sizes.blocks(arm.pool) * PAGE), "--page-size", str(PAGE),
        "--max-model-len", str(sizes.max_model_len), "--max-batch-size", str(sizes.max_seqs),
        "--max-batch-tokens", str(sizes.batch_tokens),
        *sizes.own_flags, *tier, *trace, *(arm.flags if arm.engine == "superinfer" else ()),
    ]  # fmt: skip


def _vllm(arm: Arm, sizes: Sizes, port: int) -> list[str]:
    # --kv-cache-memory-bytes spares the profiling of memory, so that start-up is shorter and other servers may hold the
    # same GPU; it is a part of the compile cache's key, so it is the same for all arms. The pool's size is set by
    # --num-gpu-blocks-override, which is no part of it. --gpu-memory-utilization is then a check at start and no more.
    tier = []
    if arm.dram:
        extra = {"cpu_bytes_to_use": sizes.dram_bytes, "offload_prompt_only": False, "eviction_policy": "arc"}
        config = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
        tier = ["--kv-transfer-config", json.dumps(config)]
    return [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", sizes.model, "--served-model-name", "m",
        "--host", "127.0.0.1", "--port", str(port), "--load-format", "dummy", "--dtype", "bfloat16",
        "--max-model-len", str(sizes.max_model_len), "--max-num-seqs", str(sizes.max_seqs),
        "--max-num-batched-tokens", str(sizes.batch_tokens), "--num-gpu-blocks-override", str(sizes.blocks(arm.pool)),
        "--kv-cache-memory-bytes", str(16 << 30), "--gpu-memory-utilization", "0.4", "--disable-uvicorn-access-log",
        *tier, *arm.flags,
    ]  # fmt: skip


def environment_of(arm: Arm, gpu: int | None, scratch: Path) -> dict[str, str]:
    """The environment of an arm's server. gpu: which it sees; None: as it is here. scratch: of shared caches."""
    found = dict(os.environ) | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        # vLLM alone reads these. Its FlashInfer sampler serves random sampling only, which no phase asks for; without
        # it nothing is compiled for it at start.
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CACHE_ROOT": str(scratch / "vllm-cache"),
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }
    # OWN_PACKAGES: a folder with what our server wants in another version than vLLM pins.
    own = f"{os.environ['OWN_PACKAGES']}:" if arm.engine == "superinfer" and "OWN_PACKAGES" in os.environ else ""
    found["PYTHONPATH"] = f"{own}{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    if gpu is not None:
        found["CUDA_VISIBLE_DEVICES"] = str(gpu)
    return found | arm.environment
