"""Train the embedded model from nothing, save it as a Hugging Face folder and evaluate it: one command.

    python -m tools.embedded_model.train --device cuda --out DIR --seed 0 --minutes 8

The learning rate follows the clock (`--minutes`) or the step count (`--steps`, for a run that repeats exactly).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from tools.embedded_model import tokenizer as tokenizers_
from tools.embedded_model.data import ANSWER, Batch, Batches
from tools.embedded_model.evaluate import evaluate
from tools.embedded_model.muon import Muon
from tools.embedded_model.network import Network, block_mask, config_dict, dense_mask

# Weights of a token's loss. Prompts are mostly drawn at random; the first token of an answer is where a wrong fact is
# picked, the rest is copying.
PROMPT_WEIGHT, ANSWER_WEIGHT = 0.05, 1.0
SIZES = {
    "full": {"hidden": 384, "layers": 8, "heads": 6, "kv_heads": 2, "head_dim": 64, "mlp": 1024},
    "tiny": {
        "hidden": 64,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 32,
        "mlp": 128,
    },  # to try the script
}


def save(network: Network, tokenizer: PreTrainedTokenizerFast, folder: Path, shard: int = 14 << 20) -> None:
    """The Hugging Face folder; weights in shards of at most `shard` bytes, or one file if they fit."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        **network.config,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    config.save_pretrained(folder)
    ends = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, do_sample=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = total = 0
    for name, tensor in network.checkpoint().items():
        if size + tensor.nbytes > shard:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", {"format": "pt"})
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, part in zip(names, shards, strict=True):
        save_file(part, folder / name, {"format": "pt"})
    index = {
        "metadata": {"total_size": total},
        "weight_map": {k: n for n, p in zip(names, shards, strict=True) for k in p},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def rate(progress: float, step: int, warmup: int) -> float:
    """Share of the peak learning rate: `warmup` steps, flat, then linear to zero over the last 65 % of the run."""
    return min(1.0, (step + 1) / warmup) * min(1.0, max(0.0, 1.0 - progress) / 0.65)


class Trainer:
    """Network, optimisers and the compiled step."""

    def __init__(self, args: argparse.Namespace, vocab: int) -> None:
        self.device = torch.device(args.device)
        torch.manual_seed(args.seed)
        self.network = Network(config_dict(vocab, **SIZES[args.size]), args.carry > 0).to(self.device)
        if args.init:
            weights = {k: v for file in args.init.glob("*.safetensors") for k, v in load_file(file).items()}
            loaded = self.network.load_state_dict({k.removeprefix("model."): v for k, v in weights.items()}, False)
            if loaded.unexpected_keys or any(not k.startswith("carry") for k in loaded.missing_keys):
                raise ValueError(f"the weights in {args.init} are not those of this network: {loaded}")
        matrices = [p for n, p in self.network.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in self.network.named_parameters() if p.ndim == 1 or "embed" in n]
        cuda = self.device.type == "cuda"
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=args.lr),
            torch.optim.AdamW(others, lr=args.lr_embed, betas=(0.9, 0.95), weight_decay=0.0, fused=cuda),
        ]
        self.peaks = [args.lr, args.lr_embed]
        self.cuda, self.bf16 = cuda, args.bf16
        self.prompt_weight, self.first_weight, self.carry = args.prompt_weight, args.first_weight, args.carry
        self.forward = torch.compile(self.network, dynamic=False) if cuda else self.network
        self.mask = torch.compile(block_mask, dynamic=False) if cuda else dense_mask

    def step(self, batch: Batch, share: float) -> tuple[torch.Tensor, ...]:
        """One update; the loss, the shares of answer tokens and of first ones predicted right, the carry loss.

        All stay on the device.
        """
        tokens, segments, roles = (
            t.to(self.device, non_blocking=True).int() for t in (batch.tokens, batch.segments, batch.roles)
        )
        targets = tokens.roll(-1, 1).long()
        own = segments.roll(-1, 1) == segments  # the next token belongs to the same dialogue
        own[:, -1] = False
        answer = (roles.roll(-1, 1) == ANSWER) & own
        first = answer & (roles != ANSWER)
        weights = torch.where(answer, ANSWER_WEIGHT, self.prompt_weight) + first * self.first_weight
        weights = weights * (own & (segments > 0))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss, right, carry = self.forward(tokens, targets, weights, self.mask(segments), *self.lessons(batch))
        (loss + self.carry * carry).backward()
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return (
            loss.detach(),
            (right & answer).sum() / answer.sum(),
            (right & first).sum() / first.sum(),
            carry.detach(),
        )

    def lessons(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Flat places [n] of values that know a subject, its tokens [n, 2]; n is fixed, the rest is empty."""
        carried = batch.carried.flatten(1)
        room = carried.shape[1] // 16
        found = carried[0].nonzero()[:room, 0]
        places, subjects = torch.arange(room), torch.zeros(room, 2, dtype=torch.long)
        places[: len(found)], subjects[: len(found)] = found, carried[:, found].T.long()
        if self.cuda:
            places, subjects = places.pin_memory(), subjects.pin_memory()
        return places.to(self.device, non_blocking=True), subjects.to(self.device, non_blocking=True)


def train(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, float]:
    trainer = Trainer(args, len(tokenizer))
    batches = Batches(
        str(folder / "tokenizer.json"), args.seed, args.steps or 10**7, args.rows, args.length, args.focus
    )
    loader = torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        shuffle=False,
        num_workers=args.workers,
        pin_memory=trainer.cuda,
        prefetch_factor=4 if args.workers else None,
    )
    start = saved = time.monotonic()
    budget, step, answers = args.minutes * 60, 0, 0
    for batch in islice(loader, args.steps):
        if step == 3:
            start = time.monotonic()  # the clock leaves out compilation
        elapsed = time.monotonic() - start
        progress = step / args.steps if args.steps else elapsed / budget
        if progress >= 1:
            break
        loss, right, first, carry = trainer.step(batch, rate(progress, step, args.warmup))
        step += 1
        answers += int((batch.roles == ANSWER).sum())
        if step % args.log == 0 or step <= 3:
            speed = step * args.rows * args.length / max(time.monotonic() - start, 1e-9) / 1e6
            print(
                f"step {step} {elapsed:.0f} s loss {loss.item():.4f} right {right.item():.4f} "
                f"first {first.item():.4f} carry {carry.item():.4f} {speed:.4f} Mtok/s",
                flush=True,
            )
        if time.monotonic() - saved > 120:
            saved = time.monotonic()
            save(trainer.network, tokenizer, folder)
    save(trainer.network, tokenizer, folder)
    return {
        "steps": step,
        "tokens": step * args.rows * args.length,
        "answer_tokens": answers,
        "minutes": round((time.monotonic() - start) / 60, 2),
        "parameters": sum(v.numel() for v in trainer.network.checkpoint().values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=8.0, help="length of the training proper")
    parser.add_argument("--steps", type=int, default=None, help="fixed number of steps instead of a time")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=0.02, help="peak rate of the matrices (Muon)")
    parser.add_argument("--lr-embed", type=float, default=0.004, help="peak rate of embedding and norms (AdamW)")
    parser.add_argument("--first-weight", type=float, default=4.0, help="extra weight of an answer's first token")
    parser.add_argument("--warmup", type=int, default=100, help="steps over which the rates rise to their peaks")
    parser.add_argument("--prompt-weight", type=float, default=PROMPT_WEIGHT, help="weight of a prompt's tokens")
    parser.add_argument("--focus", type=float, default=0.0, help="share of dialogues that are reversed-question drills")
    parser.add_argument("--carry", type=float, default=0.0, help="weight of the carry loss (carry.py); needs --focus")
    parser.add_argument("--bf16", action="store_true", help="bf16 products on a CPU too, where it is fast at them")
    parser.add_argument("--init", type=Path, help="go on from this folder's weights and tokenizer")
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 1))
    parser.add_argument("--tokenizer-dialogues", type=int, default=30_000)
    parser.add_argument("--log", type=int, default=250)
    parser.add_argument("--eval", type=int, default=500, help="held-out dialogues per kind; 0 skips the evaluation")
    args = parser.parse_args()
    args.bf16 |= args.device == "cuda"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    torch.set_float32_matmul_precision("high")
    if args.init:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.init)
    else:
        tokenizer = tokenizers_.train(args.seed, args.tokenizer_dialogues)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)
    run = train(args, tokenizer, args.out)
    print(json.dumps(run), flush=True)
    (args.out / "training.json").write_text(
        json.dumps({**run, "seed": args.seed, "rows": args.rows, "torch": torch.__version__})
    )
    if args.eval:
        figures = evaluate(args.out, args.device, {"heldout": args.eval, "unseen": args.eval})
        (args.out / "evaluation.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
