"""Tokens per second of the CPU executor against transformers' generate, on a random model of the embedded size.

OMP_NUM_THREADS=1 python benchmarks/cpu_decode.py --batch 1 16
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from superinfer.runtime.config import EngineConfig
from superinfer.runtime.engine.model_executor import ModelExecutor, build_executor
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.scheduler.plan import SlotInit, SlotWork, StepPlan

PAGE = 16
SAMPLING = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(),
    "top_k 50": SamplingParams(top_k=50),
    "top_p 0.9": SamplingParams(top_p=0.9),
}


def make_checkpoint(folder: Path, hidden: int, layers: int, vocab: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.2,  # logits as peaked as a trained model's: top_p keeps a few tokens, not half of them
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def time_transformers(model: LlamaForCausalLM, prompts: list[list[int]], tokens: int) -> float:
    """Seconds for the prompts one after another."""
    started = time.perf_counter()
    for prompt in prompts:
        model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
    return time.perf_counter() - started


def time_executor(executor: ModelExecutor, prompts: list[list[int]], tokens: int, sampling: SamplingParams) -> float:
    """Seconds for the prompts as one batch: a prefill step, then decode steps."""
    blocks = -(-(len(prompts[0]) + tokens) // PAGE)
    started = time.perf_counter()
    inits = tuple(SlotInit(slot, sampling, slot, tuple(prompt)) for slot, prompt in enumerate(prompts))
    work = tuple(
        SlotWork(slot, 0, len(prompt), tuple(prompt), tuple(range(slot * blocks, (slot + 1) * blocks)), sample=True)
        for slot, prompt in enumerate(prompts)
    )
    executor.submit(StepPlan(0, work, inits, tuple(range(len(prompts)))))
    executor.collect()
    for step in range(1, tokens):
        work = tuple(SlotWork(slot, len(prompt) + step - 1, 1, sample=True) for slot, prompt in enumerate(prompts))
        executor.submit(StepPlan(step, work))
        executor.collect()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", type=int, default=4, help="how many of the prompts transformers is timed on")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_checkpoint(Path(folder), args.hidden, args.layers, args.vocab)
        executor = build_executor(EngineConfig(model=folder, max_batch_size=max(args.batch)))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{millions:.1f} M parameters, {torch.get_num_threads()} torch threads")
    print(f"prompt {args.prompt} tokens, output {args.tokens} tokens, best of {args.rounds} alternating rounds")
    generator = torch.Generator().manual_seed(1)
    for batch in args.batch:
        prompts = torch.randint(args.vocab, (batch, args.prompt), generator=generator).tolist()
        ours: dict[str, list[float]] = {name: [] for name in SAMPLING}
        theirs = []
        for _ in range(args.rounds):  # alternating: whatever else the machine does hits both
            alone = prompts[: args.alone]
            theirs.append(len(alone) * args.tokens / time_transformers(model, alone, args.tokens))
            for name, sampling in SAMPLING.items():
                ours[name].append(batch * args.tokens / time_executor(executor, prompts, args.tokens, sampling))
        print(f"batch {batch:3d} transformers, one by one, greedy: {max(theirs):7.1f} tokens/s")
        for name, rates in ours.items():
            print(
                f"batch {batch:3d} superinfer, {name:12s}: {max(rates):7.1f} tokens/s, {max(rates) / max(theirs):.2f} x"
            )


if __name__ == "__main__":
    main()
