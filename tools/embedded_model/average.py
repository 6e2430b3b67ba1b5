"""Write the mean of model folders' weights as one file, or one folder's shards as one file, with config and tokenizer.

    python -m tools.embedded_model.average stage1 stage2 --out mean
    python -m tools.embedded_model.average stage4 --out superinfer/embedded
    python -m tools.embedded_model.average stage4 stage3 --weights 0.7 0.3 --out superinfer/embedded

The mean of a run and of its continuation lies nearer the middle of the basin than either (Wortsman et al., "Model
soups", 2022). Config and tokenizer come from the last folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

COPIED = ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja")
KEPT = ("clean_up_tokenization_spaces", "eos_token", "extra_special_tokens", "model_max_length", "pad_token")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, float32."""
    return {k: v.float() for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def average(folders: Sequence[Path], out: Path, shares: Sequence[float] = ()) -> None:
    """Write the mean, in bf16, as one file. shares: of the folders, summing to 1; none: equal ones.

    ValueError if the folders hold different tensors or none, or the shares are not theirs.
    """
    shares = shares or [1 / len(folders)] * len(folders)
    if len(shares) != len(folders) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"weights {shares} must be one for each of {len(folders)} folders and sum to 1")
    parts = [weights(folder) for folder in folders]
    for folder, part in zip(folders, parts, strict=True):
        if not part or part.keys() != parts[0].keys():
            odd = sorted(part.keys() ^ parts[0].keys())[:4]
            raise ValueError(
                f"{folder} holds other tensors than {folders[0]}, or none: {odd}; name folders of one model"
            )
    out.mkdir(parents=True, exist_ok=True)
    mean = {k: sum(s * p[k] for s, p in zip(shares, parts, strict=True)).bfloat16() for k in parts[0]}
    save_file(mean, out / "model.safetensors", {"format": "pt"})
    last = folders[-1]
    for name in COPIED:
        shutil.copyfile(last / name, out / name)
    # Only what describes the tokenizer, under the class name that every transformers release knows.
    settings = json.loads((last / "tokenizer_config.json").read_text())
    kept = {key: settings[key] for key in KEPT} | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (out / "tokenizer_config.json").write_text(json.dumps(kept, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--weights", type=float, nargs="+", default=[], help="of the folders; equal if not given")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    average(args.folders, args.out, args.weights)


if __name__ == "__main__":
    main()
