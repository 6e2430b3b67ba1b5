"""Average the weights of two model folders that share their start: the last step of making the embedded model.

    python -m tools.embedded_model.average STAGE1 STAGE2 --out superinfer/embedded

The mean of a run and of its continuation lies nearer the middle of the basin than either (Wortsman et al., "Model
soups", 2022); here it halves the errors of both. Config and tokenizer come from the second folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

COPIED = ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja")
KEPT = ("clean_up_tokenization_spaces", "eos_token", "extra_special_tokens", "model_max_length", "pad_token")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, float32."""
    return {k: v.float() for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def average(first: Path, second: Path, out: Path) -> None:
    """Write the mean, in bf16, as one file. ValueError if the folders hold different tensors."""
    a, b = weights(first), weights(second)
    if a.keys() != b.keys():
        raise ValueError(f"{first} and {second} hold different tensors: {sorted(a.keys() ^ b.keys())[:4]}")
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: ((a[k] + b[k]) / 2).bfloat16() for k in a}, out / "model.safetensors", {"format": "pt"})
    for name in COPIED:
        shutil.copyfile(second / name, out / name)
    # Only what describes the tokenizer, under the class name that every transformers release knows.
    settings = json.loads((second / "tokenizer_config.json").read_text())
    kept = {key: settings[key] for key in KEPT} | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (out / "tokenizer_config.json").write_text(json.dumps(kept, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    average(args.first, args.second, args.out)


if __name__ == "__main__":
    main()
