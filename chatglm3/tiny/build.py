"""Build the built-in model: `python -m chatglm3.tiny.build --out DIR` (minutes on one GPU).

Trains a SentencePiece tokenizer with the genuine one's settings, then a ChatGLM3 of 3.8 million parameters on lessons
drawn as it goes; writes both in the official layout, loads what was written and measures how well it reads.
"""

import argparse
import io
import json
import math
import platform
import time
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from transformers import GlmForCausalLM

from chatglm3.checkpoint import load_model
from chatglm3.official import layout, translate_config
from chatglm3.tiny.course import Batch, batches
from chatglm3.tiny.exam import marks
from chatglm3.tiny.lessons import lessons
from chatglm3.tiny.worlds import ALPHABET
from chatglm3.tokenizer import load_tokenizer

PIECES = 1648
"""SentencePiece vocabulary; the nine control ids follow it."""

CONFIG = {
    "_name_or_path": "chatglm3-tiny",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 384,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 256,
    "kv_channels": 64,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 6,
    "original_rope": True,
    "padded_vocab_size": 1664,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 2048,
    "use_cache": True,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOKENIZER_CONFIG = {"tokenizer_class": "ChatGLMTokenizer", "remove_space": False, "do_lower_case": False}

TEXT_WEIGHT = 0.2
"""Weight of the loss on everything that is not an answer: reading is learned sooner with some of it."""
WARMUP_STEPS = 300
EXAM_STEPS = 2500


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the built-in model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; BUILD.md goes beside it")
    parser.add_argument("--seconds", type=float, default=270, help="how long to train (default: 270)")
    parser.add_argument("--rows", type=int, default=48, help="rows of 1,024 tokens a step (default: 48)")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="its peak (default: 0.0015)")
    parser.add_argument("--seed", type=int, default=1, help="of the weights and the lessons (default: 1)")
    options = parser.parse_args()
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    train_tokenizer(options.out)
    torch.manual_seed(options.seed)
    model: Any = GlmForCausalLM(translate_config(options.out, CONFIG))
    model.to("cuda" if torch.cuda.is_available() else "cpu", torch.float32)
    steps = train(model, options)
    write_official(model, options.out)
    report(options, model.device, steps, time.monotonic() - started)


def train_tokenizer(folder: Path) -> None:
    """Train tokenizer.model on the text of lessons, with the settings that ChatGLM3's own one was trained with."""
    texts = [*ALPHABET, *map(chr, range(33, 127))] * 200
    for lesson in islice(lessons("tokenizer"), 40_000):
        texts += [line for message in lesson.messages for line in message["content"].splitlines()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        character_coverage=0.9999,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentencepiece_length=16,
        minloglevel=1,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")


def train(model: Any, options: argparse.Namespace) -> int:
    """Train on lessons until the time is up; prints losses and exact match on held-out lessons. Returns the steps."""
    print(f"{model.num_parameters():,} parameters on {model.device}", flush=True)
    tokenizer = load_tokenizer(options.out)
    body = torch.compile(model.model) if model.device.type == "cuda" else model.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    started = elapsed = 0.0
    with closing(batches(options.out, options.seed, options.rows)) as course:
        for step, batch in enumerate(course, 1):
            answers, text = losses(model, body, batch)
            torch.autograd.backward(answers + TEXT_WEIGHT * text)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            started = started or time.monotonic()  # The first step compiles the model.
            elapsed = (time.monotonic() - started) / options.seconds
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * _schedule(elapsed, step)
            optimizer.step()
            optimizer.zero_grad()
            if step in (1, 10) or step % 250 == 0:
                print(f"step {step} {elapsed:.1%} answers {answers:.4f} text {text:.3f}", flush=True)
            if step % EXAM_STEPS == 0:
                print(_percent(marks(model, tokenizer, 512)), flush=True)
            if elapsed >= 1:
                break
    return step


def losses(model: Any, body: Callable[..., Any], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of the answers' tokens, and of all tokens. `body` is the model without its head."""
    ids, numbers, positions, targets = (torch.from_numpy(array).to(model.device) for array in batch)
    ids = ids.long()
    earlier = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    own = (numbers[:, :, None] == numbers[:, None, :]) & earlier
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        hidden = body(input_ids=ids, attention_mask=own[:, None], position_ids=positions.long(), use_cache=False)[0]
        logits = model.lm_head(hidden[:, :-1])
    each = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    text = ((numbers[:, 1:] == numbers[:, :-1]) & (numbers[:, 1:] > 0)).flatten()
    answers = targets[:, 1:].flatten()
    return (each * answers).sum() / answers.sum(), (each * text).sum() / text.sum()


def _schedule(elapsed: float, step: int) -> float:
    """Share of the peak learning rate: linear warm-up, then half a cosine."""
    return min(1.0, step / WARMUP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * elapsed))


def _percent(scores: dict[str, float]) -> dict[str, str]:
    return {topic: f"{score:.1%}" for topic, score in scores.items()}


def write_official(model: Any, folder: Path) -> None:
    """Write config.json and two fp16 shards with their index, under the official names."""
    native = {name: tensor.half().cpu() for name, tensor in model.state_dict().items()}
    tensors = {
        name: torch.cat([native[part] for part in tensor.parts]) for name, tensor in layout(model.config).items()
    }
    rotary = model.config.head_dim // 2
    inverse_frequencies = 10000.0 ** -(torch.arange(0, rotary, 2) / rotary)
    tensors["transformer.rotary_pos_emb.inv_freq"] = inverse_frequencies.half()
    names = sorted(tensors)
    half = names[: len(names) // 2]
    weight_map = {name: f"model-0000{1 if name in half else 2}-of-00002.safetensors" for name in names}
    for file in sorted(set(weight_map.values())):
        shard = {name: tensors[name].contiguous() for name in names if weight_map[name] == file}
        save_file(shard, folder / file, metadata={"format": "pt"})
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def report(options: argparse.Namespace, device: torch.device, steps: int, seconds: float) -> None:
    """Load and measure the model that was written, in fp32 from its fp16 weights; print the scores, write BUILD.md."""
    model: Any = load_model(options.out, dtype=torch.float32).to(device)  # type: ignore[arg-type]
    scores = _percent(marks(model, load_tokenizer(options.out), 4096))
    size = sum(file.stat().st_size for file in options.out.iterdir())
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"a CPU ({platform.machine()})"
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in vars(options).items())
    table = "\n".join(f"| {topic} | {score} |" for topic, score in scores.items())
    text = f"""# How the built-in model was made

`python -m chatglm3.tiny.build {flags}`

{model.num_parameters():,} parameters, {size:,} bytes; {steps:,} steps, {seconds:.0f} s in all on {machine},
torch {torch.__version__}, transformers {transformers.__version__}, sentencepiece {sentencepiece.__version__}.
Lessons are drawn from the seeds `chunk {options.seed} 0`, `chunk {options.seed} 1`, ...; those below from `held out`.

Exact match of greedy answers, fp16 weights as written, computed in fp32:

| questions | exact match |
|---|--:|
{table}

Topics are those of `lessons.py`; "bare" are the lessons in the bare format, "all" are all but the demo's.
"demo" are questions of the demo's world, of which the model has seen nothing: most use words that its documents do not.
"""
    (options.out.parent / "BUILD.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
