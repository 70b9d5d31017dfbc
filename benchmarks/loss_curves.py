"""The loss of fine-tuning one base in several formats, on the same blocks in the same order, and the final scores.

    python -m benchmarks.loss_curves                                  # the tiny model, nf4, fp8, bf16, fp32
    python -m benchmarks.loss_curves --base DIR --steps 200 --seeds 3 nf4 fp8 bf16

A format followed by `-16bit`, as in `bf16-16bit`, has adapters and optimizer in bfloat16 too; the others have adapters
in fp32, which are cast at each use. Questions are those of the tiny model's demo world, which it was not trained on;
the last eighth is held out. A seed draws the adapters and the order of blocks: what differs between seeds is the noise
beside which formats are to be seen. Without a GPU it takes smaller blocks and fewer steps:

    python -m benchmarks.loss_curves --block-tokens 512 --steps 80 --lessons 600 --seeds 2 bf16 fp8 nf4
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel

from chatglm3.chat import render
from chatglm3.tiny.exam import demo_lessons, exact_match
from chatglm3.tiny.lessons import Lesson
from chatglm3.tokenizer import ChatGlmTokenizer, load_tokenizer
from pipelines.compute.batches import Padding, batches_ahead
from pipelines.compute.blocks import Block, BlockOrder
from pipelines.compute.step import answer_loss, run_batches, trainable_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXAM = 256  # questions that the tuned model answers
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]


def padding(tokens: int) -> Padding | None:
    """Sizes for a GPU's kernels; a CPU computes what there is."""
    return Padding(tokens) if DEVICE.type == "cuda" else None


def packed_lessons(lessons: list[Lesson], tokenizer: ChatGlmTokenizer, tokens: int) -> Iterator[Block]:
    """Lessons in the chat format, packed as they come."""
    waiting: list[tuple[list[int], list[bool]]] = []
    for lesson in lessons:
        ids, targets = render(tokenizer, lesson.messages)
        if sum(len(i) for i, _ in waiting) + len(ids) > tokens:
            yield _block(waiting)
            waiting = []
        waiting.append((ids, targets))
    yield _block(waiting)


def _block(examples: list[tuple[list[int], list[bool]]]) -> Block:
    is_target = np.concatenate([targets for _, targets in examples])
    ids = np.concatenate([ids for ids, _ in examples]).astype(np.int32)
    return Block(ids, is_target, [len(ids) for ids, _ in examples], ["lesson"], int(is_target.sum()))


def fine_tune(
    name: str, seed: int, blocks: list[Block], held_out: list[Block], options: argparse.Namespace
) -> tuple[PeftModel, list[float], list[tuple[int, float]]]:
    """Train; returns the model, the loss of each step, and (step, loss on what was held out) now and then."""
    base_format, _, bits = name.partition("-")
    torch.manual_seed(seed)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = trainable_model(options.base, base_format, lora, DEVICE)  # type: ignore[arg-type]
    parameters = [p for p in model.parameters() if p.requires_grad]
    if bits:
        for parameter in parameters:
            parameter.data = parameter.data.bfloat16()
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, fused=True)
    warmup = max(1, options.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (options.steps - step) / max(1, options.steps - warmup))
    )
    order = BlockOrder(len(blocks), 1, seed=seed)
    chosen = [blocks[order.step(step)[0]] for step in range(options.steps)]
    losses, dev = [], []
    for step, batch in enumerate(batches_ahead(chosen, DEVICE, padding(options.block_tokens))):
        losses.append(run_batches(model, [batch], chosen[step].target_count, str(step)))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % max(1, options.steps // 8) == 0:
            dev.append((step + 1, mean_loss(model, held_out, options.block_tokens)))
    return model, torch.stack(losses).tolist(), dev


@torch.no_grad()
def mean_loss(model: PeftModel, blocks: list[Block], tokens: int) -> float:
    """Mean over all answer tokens."""
    batches = batches_ahead(blocks, DEVICE, padding(tokens))
    total = torch.stack([answer_loss(model, batch) for batch in batches]).sum()
    return total.item() / sum(block.target_count for block in blocks)


def score(model: PeftModel, tokenizer: ChatGlmTokenizer, lessons: list[Lesson]) -> float:
    """Exact match of greedy answers."""
    glm = model.get_base_model()
    glm.set_attn_implementation("sdpa")
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=glm.dtype == torch.bfloat16):
        return exact_match(glm, tokenizer, lessons)["all"]


def draw(results: dict[str, list[dict[str, Any]]], picture: Path) -> None:
    """Smoothed training losses, the mean of all seeds, and held-out losses as dots, one for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, runs in results.items():
        losses = np.mean([run["losses"] for run in runs], 0)
        width = max(1, len(losses) // 20)
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        (line,) = axes.plot(np.arange(len(smooth)) + width, smooth, label=name, alpha=0.8)
        for run in runs:
            axes.plot(*zip(*run["dev"], strict=True), "o", color=line.get_color(), markersize=3, alpha=0.8)
    axes.set(xlabel="step", ylabel="loss per answer token", yscale="log", title="Base formats; dots: held out")
    axes.legend()
    figure.savefig(picture, dpi=120)


def summary(name: str, runs: list[dict[str, Any]]) -> str:
    """A row of the table: the mean over seeds, and from the least to the most."""
    last = [float(np.mean(run["losses"][-len(run["losses"]) // 10 :])) for run in runs]
    held_out, exact = [run["dev"][-1][1] for run in runs], [100 * run["exact_match"] for run in runs]
    return f"| {name} | {_range(last, 4)} | {_range(held_out, 4)} | {_range(exact, 1)} |"


def _range(values: list[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    """Read the command line, train each format with each seed, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", default=["fp32", "bf16", "fp8", "nf4"], help="what to compare")
    parser.add_argument("--base", default="tiny", help="model folder (default: tiny)")
    parser.add_argument("--steps", type=int, default=300, help="steps of one block each (default: 300)")
    parser.add_argument("--block-tokens", type=int, default=8192, help="tokens of a block (default: 8192)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each format (default: 1)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="its peak (default: 0.001)")
    parser.add_argument("--lessons", type=int, default=4000, help="questions, held-out ones included (default: 4000)")
    parser.add_argument(
        "--out", type=Path, default=Path("loss_curves.json"), help="file for all figures; an .svg beside"
    )
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.base)
    lessons = demo_lessons(options.lessons)
    kept = options.lessons // 8
    blocks = list(packed_lessons(lessons[:-kept], tokenizer, options.block_tokens))
    held_out = list(packed_lessons(lessons[-kept:], tokenizer, options.block_tokens))
    print(f"{len(blocks)} blocks to train on, {len(held_out)} held out", flush=True)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in options.formats}
    for seed in range(options.seeds):
        for name in options.formats:
            model, losses, dev = fine_tune(name, seed, blocks, held_out, options)
            exact = score(model, tokenizer, lessons[-kept:][:EXAM])
            results[name].append({"seed": seed, "losses": losses, "dev": dev, "exact_match": exact})
            print(summary(f"{name}, seed {seed}", results[name][-1:]), flush=True)
            options.out.write_text(json.dumps(results) + "\n")
    print("| base | last train loss | held-out loss | exact match, % |\n|---|--:|--:|--:|")
    print("\n".join(summary(name, runs) for name, runs in results.items()))
    draw(results, options.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
