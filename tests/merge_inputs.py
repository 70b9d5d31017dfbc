"""What tests merge: adapters with a receipt of train, and rows to measure on; how far two models are apart."""

import json
from itertools import cycle, islice
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from chatglm3 import load_model, load_tokenizer
from chatglm3.quantization import NF4
from chatglm3.tiny.exam import demo_lessons
from cluster import storage
from pipelines.model_folders import open_model
from pipelines.weights.agreement import shuffled_examples
from pipelines.weights.merge_rows import data_digest

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


def tuned_tiny(out: Path, data: str = "", **more: str) -> str:
    """An adapter on the tiny model that changes a little, trained, its receipt says, on a base in NF4 and on `data`."""
    facts = {"base": "tiny", "base_digest": digest("tiny"), "tokenizer": load_tokenizer("tiny").fingerprint}
    facts = {**FACTS, **facts, "prompt_format": "chat", **more}
    settings, inputs = ({"data": data}, {data: data_digest(Path(data))}) if data else ({}, {})
    receipt = storage.Receipt("train", {"base_format": "nf4", **settings}, inputs=inputs, facts=facts)
    with storage.publish(out, receipt) as folder:
        tuned_adapter("tiny", folder, std=0.2)
    return str(out)


def trained_tiny(out: Path, data: str, steps: int = 40) -> str:
    """An adapter that has learned from prepared rows, on the tiny model in NF4, as train does; it takes 15 seconds."""
    tiny = open_model("tiny", "--base")
    examples = cycle(shuffled_examples(Path(data), "train", tiny.path, "chat"))
    torch.manual_seed(1)
    base = load_model("tiny", dtype=torch.bfloat16, quantization_config=NF4)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=4e-3)
    for _ in range(steps):
        for example in islice(examples, 4):
            ids, is_target = torch.tensor([example.ids]), torch.tensor(example.is_target[1:])
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1][is_target]
            cross_entropy(logits.float(), ids[0, 1:][is_target]).backward()
        optimizer.step()
        optimizer.zero_grad()
    facts = {"base": "tiny", "base_digest": tiny.weights_digest, "tokenizer": tiny.tokenizer, "prompt_format": "chat"}
    settings = {"base_format": "nf4", "learning_rate": 4e-3, "epochs": 0.5, "batch_size": 4, "seed": 1, "data": data}
    inputs = {data: data_digest(Path(data))}
    with storage.publish(out, storage.Receipt("train", settings, inputs=inputs, facts=FACTS | facts)) as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
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
