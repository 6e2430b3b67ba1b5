"""`superinfer bench kernels`: each kernel against its roofline and its alternatives."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from superinfer.errors import InvalidRequestError, UnsupportedError

if TYPE_CHECKING:
    from superinfer.bench.ceilings import Ceilings
    from superinfer.bench.kernel_cases import Case


def kernels(
    device: Annotated[
        str, typer.Option(help="cuda; or cpu: the torch functions that CPU engines run, no kernels.")
    ] = "cuda",
    model: Annotated[str, typer.Option(help="Whose layer's sizes: a name as in simulate, or a folder.")] = "llama-3-8b",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    tokens: Annotated[int, typer.Option(help="Rows of elementwise kernels, tokens of prefill.")] = 4096,
    batch: Annotated[int, typer.Option(help="Sequences that decode, rows that are sampled.")] = 128,
    context: Annotated[int, typer.Option(help="Tokens each of them attends to.")] = 1024,
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 1024,
    only: Annotated[str, typer.Option(help="Only kernels whose name contains this.")] = "",
    repeats: Annotated[int, typer.Option(help="Timed calls of each; medians are shown, all are written.")] = 20,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything here.")] = None,
) -> None:
    """Time every kernel of this package beside what its bytes and arithmetic would take at the machine's ceilings."""
    import torch

    from superinfer.bench.ceilings import measure_here
    from superinfer.bench.engine import save
    from superinfer.bench.kernel_cases import CASES, Setting
    from superinfer.bench.progress import Bar
    from superinfer.out_file import check_writable
    from superinfer.runtime.sim.shapes import shape_of

    check_writable(json_path)
    if device not in ("cuda", "cpu"):
        raise InvalidRequestError(f"device={device!r} must be cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(
            "bench kernels measures kernels of a GPU and torch sees none here; --device cpu times the torch functions "
            "that CPU engines run instead"
        )
    if dtype not in ("bfloat16", "float16", "float32"):
        raise InvalidRequestError(f"dtype={dtype!r} must be bfloat16, float16 or float32")
    if min(tokens, batch, context, prompt, repeats) < 1:
        raise InvalidRequestError("tokens, batch, context, prompt and repeats must be at least 1")
    shape = shape_of(model)
    setting = Setting(shape, torch.device(device), getattr(torch, dtype), tokens, batch, context, prompt)
    chosen = [case for case in CASES if only in case.__name__]
    if not chosen:
        raise InvalidRequestError(f"--only {only!r}: the kernels are {', '.join(case.__name__ for case in CASES)}")
    roof = measure_here(device, dtype)
    print(f"ceilings: copy {roof.copy / 1e9:,.1f} GB/s, matrix product {roof.matmul / 1e12:,.3f} TFLOP/s")
    found = []
    with Bar("kernels", len(chosen)) as bar, torch.inference_mode():
        for make in chosen:
            found.append(_time(make(setting), device, roof, repeats))
            bar.advance()
    _show(found, f"{model}, {dtype}, on {_device_name(device)}")
    settings = dict(
        device=device, model=model, dtype=dtype, tokens=tokens, batch=batch, context=context, prompt=prompt,
        repeats=repeats, threads=torch.get_num_threads(),
    )  # fmt: skip
    save(json_path, {"settings": settings, "ceilings": roof._asdict(), "kernels": found})


def _time(case: Case, device: str, roof: Ceilings, repeats: int) -> dict[str, Any]:
    """A variant that fails is recorded with its error; the others are timed."""
    from superinfer.bench.ceilings import times_s

    floor_s = max(case.bytes / roof.copy, case.flops / roof.matmul)
    variants: dict[str, Any] = {}
    for name, run in case.variants.items():
        try:
            times = times_s(run, device, repeats)
        except Exception as error:
            variants[name] = {"error": f"{type(error).__name__}: {error}"}
            continue
        median = statistics.median(times)
        variants[name] = {"median_s": median, "roofline_share": floor_s / median, "times_s": times}
    bound = "memory" if case.bytes / roof.copy >= case.flops / roof.matmul else "arithmetic"
    sizes = {"kernel": case.name, "sizes": case.sizes, "bytes": case.bytes, "flops": case.flops}
    return {**sizes, "floor_s": floor_s, "bound": bound, "variants": variants}


def _show(found: list[dict[str, Any]], title: str) -> None:
    import sys

    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("kernel", "sizes", "variant"):
        table.add_column(name, no_wrap=True)
    for name in ("time", "floor", "of roofline"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found:
        shown = one["kernel"], one["sizes"]
        for name, timed in one["variants"].items():
            if "error" in timed:
                table.add_row(*shown, name, f"failed: {timed['error']:.60}", "", "")
            else:
                share = f"{timed['roofline_share']:.0%} ({one['bound']})"
                table.add_row(*shown, name, _micros(timed["median_s"]), _micros(one["floor_s"]), share)
            shown = "", ""
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _micros(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} µs"


def _device_name(device: str) -> str:
    import torch

    from superinfer.bench.record import cpu_name

    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()
