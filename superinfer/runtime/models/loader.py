"""From a model's name to a model with weights: finding the folder, streaming safetensors into fused parameters."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from superinfer.errors import CheckpointNotFoundError, ModelLoadError, UnsupportedError
from superinfer.runtime.config import EMBEDDED
from superinfer.runtime.memory import free_memory
from superinfer.runtime.models.config import ModelConfig, load_config
from superinfer.runtime.models.decoder import CausalLM
from superinfer.runtime.models.layers import FusedLinear, RMSNorm
from superinfer.runtime.models.moe import Experts
from superinfer.runtime.models.registry import model_class

Progress = Callable[[str, float], None]

# What names of tensors end with where others quantize: GPTQ and AWQ, bitsandbytes, and scales of 8 bits.
QUANTIZED = (".qweight", ".qzeros", ".scales", ".g_idx", ".absmax", ".quant_map", "_scale", "_scale_inv", "_packed")
EMBEDDING = "model.embed_tokens.weight"
DUMMY_PIECE = 1 << 26  # numbers drawn at once, 256 MiB
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
HUB_COPIES = ["consolidated*", "original/*"]  # the same weights once more, in their makers' own format


def resolve_model(model: str) -> Path:
    """The folder of a checkpoint: the embedded one, a local folder, or a hub name's downloaded snapshot.

    Raises CheckpointNotFoundError when there is no such folder or repository, ModelLoadError when the hub cannot be
    reached and nothing is cached.
    """
    if model == EMBEDDED:
        from superinfer.embedded import model_path

        return Path(model_path())
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        raise CheckpointNotFoundError(
            f"model={model!r} is a GGUF file, which is not read; take the safetensors checkpoint that it was made from"
        )
    if path.exists():
        raise CheckpointNotFoundError(
            f"model={model!r} is a file; give the folder that holds config.json and *.safetensors"
        )
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model):
        raise CheckpointNotFoundError(
            f"model={model!r} is not an existing folder, a hub name (owner/name), or {EMBEDDED!r}; check the path"
        )
    return _download(model)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=HUB_COPIES))
    except Exception as error:  # HTTP, DNS, authentication and cache errors share no base class
        unknown = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
        raise (CheckpointNotFoundError if unknown else ModelLoadError)(
            f"model={name!r} is no local folder and could not be had from the Hugging Face hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}); "
            "check the name and the network, or give a folder"
        ) from error


def load_model(
    path: Path,
    config: ModelConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    load_format: str = "auto",
    seed: int = 0,
    on_progress: Progress | None = None,
) -> CausalLM:
    """The model of a checkpoint folder, ready for inference.

    config: from `load_config(path)`, where the caller has it already. dtype: weights are converted to it.
    load_format: "auto" reads the folder's safetensors; "dummy" draws weights from `seed`.
    on_progress: called with a label and the fraction of tensors loaded, or of parameters drawn, 0..1.
    Raises ModelLoadError naming the file and tensor at fault, UnsupportedError for features not implemented.
    """
    config = config or load_config(path)
    model = _empty_model(model_class(config.architecture), config, dtype, device)
    if load_format == "dummy":
        _fill_dummy(model, seed, on_progress)
    elif load_format == "auto":
        _load_weights(model, path, on_progress)
    else:
        raise UnsupportedError(f"load_format={load_format!r} is not known; use 'auto' or 'dummy'")
    return model


def _empty_model(cls: type[CausalLM], config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> CausalLM:
    """Parameters without values. Raises ModelLoadError where there is no memory for them."""
    with _default_dtype(dtype):
        with torch.device("meta"):
            needed = sum(parameter.nbytes for parameter in cls(config).parameters())
        free = free_memory(torch.device(device))
        if needed > free:
            raise ModelLoadError(
                f"the weights take {needed / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}, and {device} has "
                f"{free / 2**30:.1f} GiB free; take a smaller model or dtype, or a larger device"
            )
        with torch.device(device):
            return cls(config).requires_grad_(False).eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a checkpoint's tensor goes: a parameter or a slice of one. fills: the tensors, by their published names,
    that are then no longer missing."""

    tensor: torch.Tensor
    fills: tuple[str, ...]


def checkpoint_targets(model: CausalLM) -> dict[str, Target]:
    """Checkpoint tensor name -> where it goes.

    Under the names that models are published with, projections and experts each apart, and under the names of this
    model's own parameters, which is how transformers 5 writes experts with `save_original_format=False`.
    """
    published: dict[str, Target] = {}
    own: dict[str, Target] = {}
    for path, module in model.named_modules():
        at = _published_path(path, model)
        for kind, parameter in module.named_parameters(recurse=False):
            if isinstance(module, FusedLinear):
                parts = {
                    f"{at.rpartition('.')[0]}.{name}": part for name, part in module.checkpoint_parts(kind).items()
                }
            elif isinstance(module, Experts):
                parts = {f"{at}.{name}": part for name, part in module.checkpoint_parts(kind).items()}
            else:
                parts = {f"{at}.{kind}": parameter}
            published |= {name: Target(part, (name,)) for name, part in parts.items()}
            own[f"{path}.{kind}"] = Target(parameter, tuple(parts))
    targets = own | published
    if model.config.tie_word_embeddings:
        targets.pop("lm_head.weight", None)
    return targets


def _published_path(path: str, model: CausalLM) -> str:
    return ".".join(model.checkpoint_names.get(name, name) for name in path.split("."))


def _load_weights(model: CausalLM, path: Path, on_progress: Progress | None) -> None:
    targets = checkpoint_targets(model)
    files = _weight_files(path)
    _check_names(targets, path, files, model.config)
    missing = {name for target in targets.values() for name in target.fills}
    total, head = len(missing), None
    for file in files:
        for name, tensor in _read_tensors(file):
            if _is_table(name):
                continue
            if name == "lm_head.weight" and model.config.tie_word_embeddings:
                head = tensor
                continue
            _fill(targets, name, tensor, file)
            missing.difference_update(targets[name].fills)
            if on_progress is not None:
                on_progress("loading weights", 1.0 - len(missing) / total)
    if head is not None and EMBEDDING in missing:  # of a shared tensor one name was kept, and it is the head's
        _fill(targets, EMBEDDING, head, path)
    if head is not None and not torch.equal(head.to(model.lm_head.weight), model.lm_head.weight):
        raise ModelLoadError(
            f"{path} says tie_word_embeddings=true, but its 'lm_head.weight' is not 'model.embed_tokens.weight'; "
            "set tie_word_embeddings to false in config.json to use both"
        )


def _check_names(targets: dict[str, Target], path: Path, files: list[Path], config: ModelConfig) -> None:
    """Raises ModelLoadError where tensors are missing or have no place: files name theirs at their beginning, so that
    nobody waits for gigabytes to be read first."""
    missing = {name for target in targets.values() for name in target.fills}
    total = len(missing)
    for file in files:
        with _opened(file) as tensors:
            names = [name for name in tensors.keys() if not _is_table(name)]  # noqa: SIM118 - not a dict
        for name in names:
            if name == "lm_head.weight" and config.tie_word_embeddings:
                missing.discard(EMBEDDING)
            elif name in targets:
                missing.difference_update(targets[name].fills)
            else:
                reason = "config.json and weights are not of the same model"
                if name.endswith(QUANTIZED):
                    reason = "it belongs to quantized weights; take the model's unquantized ones"
                raise ModelLoadError(
                    f"{file} holds tensor {name!r}, which {config.architecture} has no place for; {reason}"
                )
    if missing:
        raise ModelLoadError(
            f"{path} lacks {len(missing)} of {total} tensors, the first is {min(missing)!r}; "
            "download the checkpoint again, all of its files, or take the config.json that belongs to it"
        )


def _is_table(name: str) -> bool:
    """Old Llamas carry tables that follow from the config."""
    return ".rotary_emb." in name


def _fill(targets: dict[str, Target], name: str, tensor: torch.Tensor, file: Path) -> None:
    """Copy one tensor to its place, converting it. Raises ModelLoadError where it does not fit."""
    target = targets[name].tensor
    if tensor.shape != target.shape:
        raise ModelLoadError(
            f"{file}: tensor {name!r} is {list(tensor.shape)}, but config.json asks for {list(target.shape)}"
        )
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        raise ModelLoadError(
            f"{file}: tensor {name!r} holds {tensor.dtype}, which is no weight but a quantized one; take the model's "
            "unquantized weights"
        )
    target.copy_(tensor)
    if not _is_finite(target):
        if _is_finite(tensor):
            dtype = str(target.dtype).removeprefix("torch.")
            raise ModelLoadError(
                f"{file}: tensor {name!r} holds numbers beyond {dtype}; take dtype bfloat16 or float32"
            )
        raise ModelLoadError(f"{file}: tensor {name!r} holds NaN or infinity, which is no weight; download it again")


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.stack(tensor.aminmax()).isfinite().all())  # NaN is passed on; no second copy is made


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        single = path / "model.safetensors"
        if not single.is_file():
            if next(path.glob("model-*.safetensors"), None) is not None:
                raise ModelLoadError(f"{path} holds parts of a model, but not {index.name}; download it too")
            raise ModelLoadError(
                f"{path} holds neither model.safetensors nor {index.name}; other formats are not read: "
                "load the model with transformers and save it with save_pretrained"
            )
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("weight_map does not name files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{index} is damaged ({type(error).__name__}: {error}); download it again") from error
    for name in names:
        if not (path / name).is_file():
            raise ModelLoadError(f"{path / name}, listed in {index.name}, does not exist; download it again")
    return [path / name for name in names]


def _read_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """One tensor at a time, so that the file is never in memory as a whole."""
    with _opened(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a dict
            yield name, tensors.get_tensor(name)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file, its header read. Raises ModelLoadError where it, or what is read of it, is damaged."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{file} is damaged or incomplete ({error}); download it again") from error


def _fill_dummy(model: CausalLM, seed: int, on_progress: Progress | None) -> None:
    """Weights as a fresh model has them; the same for the same seed."""
    # Drawn where the weights lie: 8 billion normals take a GPU a second and a CPU a minute.
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    places = [(m, name, parameter) for m in model.modules() for name, parameter in m.named_parameters(recurse=False)]
    slow = sum(parameter.numel() for _, _, parameter in places) > DUMMY_PIECE  # else done before it can be read
    for done, (module, name, parameter) in enumerate(places, 1):
        if isinstance(module, RMSNorm):
            parameter.fill_(1.0)
        elif name == "bias":
            parameter.zero_()
        else:
            _fill_normal(parameter, model.config.initializer_range, generator)
        if on_progress is not None and slow:
            on_progress("drawing weights", done / len(places))


def _fill_normal(parameter: torch.Tensor, deviation: float, generator: torch.Generator) -> None:
    """A piece at a time: stacked experts are gigabytes, and the float32 noise beside them as much again."""
    flat = parameter.view(-1)
    for piece in flat.split(DUMMY_PIECE):
        noise = torch.randn(piece.shape, generator=generator, dtype=torch.float32, device=generator.device)
        piece.copy_(noise.mul_(deviation))
