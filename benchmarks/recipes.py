"""What benchmarks.training_step compares: the predecessor's recipe, Hugging Face's Trainer, and our own step.

The model has ChatGLM3-6B's shape and random weights: speed does not depend on them. Without a GPU it is the tiny model.
"""

from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import GlmForCausalLM

from benchmarks.random_checkpoint import native_config, random_state
from chatglm3 import load_model
from chatglm3.quantization import NF4
from pipelines.compute.batches import Padding, batches_ahead
from pipelines.compute.blocks import Block
from pipelines.compute.step import compile_layers, recompute_layers, run_batches, with_adapters

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
ANSWERS = [1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 6, 6, 6, 7, 8, 11, 14, 19, 33, 337]
FIVE = [567, 1187, 1269, 1330, 1377, 1421, 1455, 1492, 1526, 1559, 1594, 1634, 1670, 1712, 1757, 1804, 1856, 1922, 2016]
QUANTILES = {
    # 0, 5, ... 100 % of the prompts' tokens, then of the answers': 3,245 real questions on Chinese encyclopaedia
    # articles, ChatGLM3's tokenizer, the document with the answer alone or among four others.
    "one-document": (
        [63, 167, 210, 231, 247, 261, 277, 288, 300, 313, 328, 342, 357, 373, 392, 416, 450, 490, 548, 629, 1901],
        ANSWERS,
    ),
    "five-documents": ([*FIVE, 2173, 5896], ANSWERS),
}

LONGEST = {"five-documents": 8192}
"""What `Padding.longest` grows to within an epoch, where that is more than it starts with: compiled once, not again."""

PREDECESSOR_STEPS = 4
"""Different steps of the predecessor."""

Lengths = tuple[int, int]
"""Tokens of an example's prompt and answer."""
Tick = Callable[[int, int], bool]
"""Told the tokens and answer tokens of a step that is done; says whether another one is wanted."""


def example_lengths(kind: str) -> Iterator[Lengths]:
    """Prompt and answer lengths without end, the same in every run."""
    chance = np.random.default_rng(1)
    while True:
        if kind == "long-answers":
            prompt = np.clip(np.exp(chance.normal(6.35, 0.55)), 64, 1022)
            answer = np.clip(np.exp(chance.normal(4.2, 0.6)), 8, 511)
        else:
            points = np.linspace(0, 1, 21)
            prompt, answer = (np.interp(chance.random(), points, values) for values in QUANTILES[kind])
        yield int(prompt) + 2, int(answer) + 1


def packed_lengths(budget: int, kind: str) -> Iterator[list[Lengths]]:
    """Blocks of lengths without end, filled as `pipelines.run.packing` fills them: first fit, longest first."""
    chance = np.random.default_rng(2)
    lengths = example_lengths(kind)
    while True:
        blocks: list[list[Lengths]] = []
        for example in sorted(islice(lengths, 1024), key=sum, reverse=True):
            fitting = (block for block in blocks if sum(map(sum, block)) + sum(example) <= budget)
            if (block := next(fitting, None)) is None:
                blocks.append([example])
            else:
                block.append(example)
        for number in chance.permutation(len(blocks) - 1):  # without the last, which other examples would have filled
            yield blocks[number]


def random_block(lengths: list[Lengths], vocabulary: int) -> Block:
    """A block of random ids."""
    is_target = np.concatenate([np.arange(prompt + answer) >= prompt for prompt, answer in lengths])
    ids = np.random.default_rng(3).integers(3, vocabulary, len(is_target)).astype(np.int32)
    return Block(ids, is_target, [prompt + answer for prompt, answer in lengths], ["a"], int(is_target.sum()))


def base_model(layers: int, base_format: str) -> GlmForCausalLM:
    """The base on the GPU, random, or the tiny model; in NF4 or in bfloat16, which the CPU takes for fp32."""
    quantization = NF4 if base_format == "nf4" else None
    if not ON_GPU:
        dtype = torch.float32 if base_format == "fp32" else torch.bfloat16
        return load_model("tiny", dtype=dtype, quantization_config=quantization, device_map={"": DEVICE})
    config = native_config(layers)
    return GlmForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=random_state(config, DEVICE),
        dtype=torch.bfloat16,
        quantization_config=quantization,
        device_map={"": DEVICE},
    )


def lora(adapters: str, dropout: float) -> LoraConfig:
    """LoRA of rank 4 on q, k, v or of rank 16 on all linear layers."""
    attention = ["q_proj", "k_proj", "v_proj"]
    targets = attention if adapters == "qkv" else [*attention, "o_proj", "gate_up_proj", "down_proj"]
    rank = 4 if adapters == "qkv" else 16
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")


def model_key(words: list[str]) -> str:
    """What a recipe's model depends on: recipes with the same key are measured on one model."""
    return "-".join(word for word in words if word != "recompute" and not is_budget(word))


def is_budget(word: str) -> bool:
    """Whether a recipe's word is a block's tokens, as 8k is."""
    return word.endswith("k") and word[:-1].isdigit()


def make_model(words: list[str], layers: int) -> PeftModel:
    """The model of a recipe."""
    if words[0] == "predecessor":
        model = prepare_model_for_kbit_training(base_model(layers, "nf4"), use_gradient_checkpointing=True)
        return get_peft_model(model, lora("qkv", 0.05)).train()
    if words[0] == "hf":
        return get_peft_model(base_model(layers, "nf4"), lora("qkv", 0.0)).train()
    assert words[0] in ("nf4", "fp8", "bf16", "fp32"), words
    config = lora("all" if "all" in words else "qkv", 0.05 if "dropout" in words else 0.0)
    model = with_adapters(base_model(layers, words[0]), words[0], config)  # type: ignore[arg-type]
    if "16bit" in words:
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16() if parameter.requires_grad else parameter.data
    if ON_GPU and "eager" not in words:
        compile_layers(model)
    return model


def run_predecessor(model: PeftModel, kind: str, tick: Tick) -> None:
    """Steps of 8 batches of 4 examples as they come, prompts and answers cut, each batch padded to its longest.

    The same few steps come again and again: at a width that is new, memory is taken and kernels are loaded, which in
    a long run is soon over.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    cut = ((min(prompt, 1022), min(answer, 511)) for prompt, answer in example_lengths(kind))
    lengths = cycle(list(islice(cut, PREDECESSOR_STEPS * 8 * 4)))
    wanted = True
    while wanted:
        tokens = answers = 0
        for _ in range(8):
            batch = padded(list(islice(lengths, 4)), model.config.vocab_size)
            tokens += int(batch["attention_mask"].sum())
            answers += int((batch["labels"] >= 0).sum())
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
                loss = model(**{name: tensor.to(DEVICE) for name, tensor in batch.items()}, use_cache=False).loss
            (loss / 8).backward()
        optimizer.step()
        optimizer.zero_grad()
        wanted = tick(tokens, answers)


def padded(lengths: list[Lengths], vocabulary: int, multiple: int = 1) -> dict[str, torch.Tensor]:
    """Examples of random ids side by side, padded to the longest."""
    width = -(-max(map(sum, lengths)) // multiple) * multiple
    ids = torch.randint(3, vocabulary, (len(lengths), width))
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(lengths):
        labels[row, prompt : prompt + answer] = ids[row, prompt : prompt + answer]
        mask[row, : prompt + answer] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def run_packed(model: PeftModel, words: list[str], kind: str, tick: Tick) -> None:
    """Our step, one block a step."""
    budget = next(int(word[:-1]) * 1024 for word in words if is_budget(word))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=ON_GPU)
    padding = Padding(budget, longest=LONGEST.get(kind, 2048)) if ON_GPU else None
    counts: list[tuple[int, int]] = []

    def counted() -> Iterator[Block]:
        for lengths in packed_lengths(budget, kind):
            block = random_block(lengths, model.config.vocab_size)
            counts.append((len(block.input_ids), block.target_count))
            yield block

    for number, batch in enumerate(batches_ahead(counted(), DEVICE, padding)):
        run_batches(model, [batch], counts[number][1], str(number))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not tick(*counts[number]):
            return


def run(model: PeftModel, words: list[str], kind: str, tick: Tick) -> None:
    """Steps of a recipe until `tick` wants no more."""
    if words[0] == "predecessor":
        run_predecessor(model, kind, tick)
    elif words[0] == "hf":
        from benchmarks.hugging_face import run_trainer

        run_trainer(model, words, kind, tick)
    else:
        _set_recompute(model, "recompute" in words)
        run_packed(model, words, kind, tick)


def _set_recompute(model: PeftModel, wanted: bool) -> None:
    glm: Any = model.get_base_model()
    if wanted:
        recompute_layers(model)
    elif glm.is_gradient_checkpointing:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
