"""Hardware profiles as data: what a machine moves and computes, and where each figure comes from.

Peaks are the vendor's datasheet (dense, without sparsity; bytes and FLOP per second). What a real engine gets out of a
peak is an `Efficiency`. Two were measured: one H100 80GB HBM3 under vLLM 0.24 and one H200 under this engine (both
PCIe 5 x16, driver 580, CUDA 13.0, torch 2.11, FlashInfer 0.6.12, November 2026). Other GPUs are given the H100's shares
of their own peaks, which is an assumption until somebody measures them.
"""

from __future__ import annotations

from typing import NamedTuple

from superinfer.errors import InvalidRequestError

TERA, GIGA = 1e12, 1e9


class Efficiency(NamedTuple):
    """Shares of the peaks that a running engine reaches, and what each step and request costs beside.

    weights, kv: of memory bandwidth, reading weights in a narrow matmul, and the KV cache in decode attention.
    matmul, attention: of peak FLOP/s, in prefill's wide matmuls and in its causal attention.
    step_s: seconds a step takes beyond what its bytes and FLOP explain: launches, sampling, host.
    decode_s: seconds each decoding request adds beyond the KV it reads.
    pieces_s, eager_s: seconds a step with prefill chunks takes beyond all that, as the device waits for the host: where
        the engine replays graphs between the layers' attention, and where it has more tokens than it has graphs for and
        launches each kernel. 0: not measured.
    captured: tokens of the largest step with prefill chunks that it has a graph for.
    """

    weights: float
    kv: float
    matmul: float
    attention: float
    step_s: float
    decode_s: float
    pieces_s: float = 0.0
    eager_s: float = 0.0
    captured: int = 1024


# From an H100, each figure over the datasheet's 3.35 TB/s and 989 TFLOP/s:
# weights    4096 -> 14336 linear, M = 1: 2.73 TB/s of weights.
# kv         FlashInfer decode, 128 x 1024 tokens: 2.73 (CUDA cores) to 2.86 TB/s (tensor cores).
# step_s     vLLM TPOT at batch 1, 6.50 ms, less 15.0 GB of weights at 2.73 TB/s.
# decode_s   vLLM TPOT at batch 256 of 609 tokens each, 15.84 ms, less weights, 20.4 GB of
#            KV at 2.8 TB/s and step_s, over 256.
# matmul, attention: the two that give vLLM's 42,600 tok/s at 2,048-token and 38,200 tok/s at 8,000-token prompts of
#            Llama-3-8B (1,024 and 4,000 positions attended on average, 0.52 MFLOP each; step_s taken off).
HOPPER = Efficiency(
    weights=2.73 / 3.35, kv=2.80 / 3.35, matmul=680 / 989, attention=578 / 989, step_s=1.0e-3, decode_s=8.0e-6
)  # fmt: skip

# From an H200 under this engine, what benchmarks/sim_calibrate.py prints (results/sim-calibration-h200.json), over the
# datasheet's 4.8 TB/s and 989 TFLOP/s. No run behind a server went into it.
# weights    of a product of few rows; what a step with prefill chunks costs is then told from what one without does.
# others     least squares over 915 steps of an engine under load, each with its very rows (h200-online-steps.json),
#            and, as many as 20 steps each, TPOT at batch 1 and 32 and prefill of 2,048 and 8,000 tokens.
# decode_s   0: what a decode costs grows with its context.
# pieces_s, eager_s: with padding to the sizes of graphs, and what the device waits for the host.
HOPPER_H200 = Efficiency(
    weights=0.844, kv=0.583, matmul=0.724, attention=0.473, step_s=0.731e-3, decode_s=0.0, pieces_s=2.60e-3,
    eager_s=7.51e-3, captured=2048,
)  # fmt: skip


class HardwareProfile(NamedTuple):
    """One accelerator with its host memory. Bytes, bytes/s, FLOP/s.

    memory_bytes, memory_rate: capacity and bandwidth of the device's memory. flops: bf16, dense.
    link_in, link_out: host to device and back, alone. link_duplex: both directions at once, in total.
    sources: where each figure is from.
    """

    name: str
    memory_bytes: float
    memory_rate: float
    flops: float
    link_in: float
    link_out: float
    link_duplex: float
    efficiency: Efficiency
    sources: str


_C2C = "NVLink-C2C 900 GB/s in total, datasheet; both ways at once bounded by LPDDR5X at about 500 GB/s"

PROFILES = {
    profile.name: profile
    for profile in (
        HardwareProfile(
            "h100-pcie5", 80 * GIGA, 3.35 * TERA, 989 * TERA, 53.2 * GIGA, 51.5 * GIGA, 92 * GIGA, HOPPER,
            "H100 SXM datasheet: 80 GB HBM3, 3.35 TB/s, 989 TFLOP/s; PCIe 5 x16 measured with pinned memory, 1 GiB: "
            "53.2 in, 49-54 out, 89-95 GB/s both at once",
        ),
        HardwareProfile(
            "h200-pcie5", 141 * GIGA, 4.8 * TERA, 989 * TERA, 54.1 * GIGA, 53.9 * GIGA, 96.4 * GIGA, HOPPER_H200,
            "H200 SXM datasheet: 141 GB HBM3e, 4.8 TB/s, 989 TFLOP/s; PCIe 5 x16 measured with the engine's own copies "
            "of 2 MiB: 54.1 in, 53.9 out, 96.4 GB/s both at once",
        ),
        HardwareProfile(
            "gh200-96", 96 * GIGA, 4.0 * TERA, 990 * TERA, 450 * GIGA, 450 * GIGA, 500 * GIGA, HOPPER,
            f"GH200 datasheet: 96 GB HBM3, 4.0 TB/s, 990 TFLOP/s; {_C2C}",
        ),
        HardwareProfile(
            "gh200-144", 144 * GIGA, 4.9 * TERA, 990 * TERA, 450 * GIGA, 450 * GIGA, 500 * GIGA, HOPPER,
            f"GH200 datasheet: 144 GB HBM3e, 4.9 TB/s, 990 TFLOP/s; {_C2C}",
        ),
        HardwareProfile(
            "gb200", 186 * GIGA, 8.0 * TERA, 2500 * TERA, 225 * GIGA, 225 * GIGA, 250 * GIGA, HOPPER,
            "GB200 NVL72 datasheet, one of the superchip's two GPUs: 186 GB HBM3e, 8 TB/s, 2.5 PFLOP/s; half of the "
            f"Grace CPU's link and memory, which both share: {_C2C}",
        ),
        HardwareProfile(
            "cpu", 8 * GIGA, 10.7 * GIGA, 100 * GIGA, 10.7 * GIGA, 10.7 * GIGA, 10.7 * GIGA,
            Efficiency(weights=0.9, kv=0.5, matmul=0.5, attention=0.25, step_s=1.0e-3, decode_s=5.0e-5),
            "two cores of a cloud server, numpy float32: copy of 256 MB 10.7 GB/s read and written, matmul 1024^3 "
            "50 GFLOP/s a core; the efficiencies are guesses",
        ),
    )
}  # fmt: skip


def profile_of(name: str) -> HardwareProfile:
    """The profile of this name. Raises InvalidRequestError for a name nobody has."""
    found = PROFILES.get(name)
    if found is None:
        raise InvalidRequestError(f"hardware {name!r} is unknown; choose one of {', '.join(PROFILES)}")
    return found


def profile_of_device(device_name: str, memory_bytes: float) -> HardwareProfile | None:
    """The profile that fits a device as its driver names it ("NVIDIA H100 80GB HBM3", "cpu"); None where none does."""
    name = device_name.upper()
    if name == "CPU":
        return PROFILES["cpu"]
    if "GH200" in name:
        return PROFILES["gh200-144" if memory_bytes > 120 * GIGA else "gh200-96"]
    for part, profile in (("GB200", "gb200"), ("H200", "h200-pcie5"), ("H100", "h100-pcie5")):
        if part in name:
            return PROFILES[profile]
    return None
