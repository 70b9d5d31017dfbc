"""What tests merge: adapters with a receipt of train, and rows to measure on; how far two models are apart."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from chatglm3 import load_model, load_tokenizer
from chatglm3.tiny.exam import demo_lessons
from cluster import storage
from pipelines.model_folders import open_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
FACTS = {"prompt_format": "bare", "prompt_digest": "d", "preset": "seed"}


def tuned_adapter(base: Path | str, folder: Path, std: float) -> None:
    """Write an adapter that changes every linear layer; `std` says how much."""
    torch.manual_seed(1)
    model = get_peft_model(load_model(base), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=std)
    model.save_pretrained(folder, save_embedding_layers=False)


def tuned_tiny(out: Path) -> str:
    """An adapter on the tiny model that changes a little, trained, its receipt says, on a base in NF4."""
    facts = {"base": "tiny", "base_digest": digest("tiny"), "tokenizer": load_tokenizer("tiny").fingerprint}
    receipt = storage.Receipt("train", {"base_format": "nf4"}, facts={**FACTS, **facts, "prompt_format": "chat"})
    with storage.publish(out, receipt) as folder:
        tuned_adapter("tiny", folder, std=0.2)
    return str(out)


def demo_rows(folder: Path, number: int = 24) -> str:
    """Some of the demo's questions as rows to train and to measure on."""
    pairs = [[message["content"] for message in lesson.messages] for lesson in demo_lessons(number)]
    rows = [json.dumps({"instruction": asked, "output": answer}) for asked, answer in pairs]
    for split in ("train", "dev"):
        (folder / split).mkdir(parents=True)
        (folder / split / "part-00000.jsonl").write_text("\n".join(rows) + "\n")
    return str(folder)


def digest(folder: Path | str) -> str:
    return open_model(str(folder), "--base").weights_digest


def kl(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence of the next token over all positions."""
    a, b = wanted.log_softmax(-1), found.log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).mean())
