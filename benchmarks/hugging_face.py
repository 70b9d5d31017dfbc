"""transformers' own Trainer on the lengths of benchmarks.recipes: what a careful user of today's libraries gets."""

import tempfile
from itertools import accumulate, islice
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.recipes import ON_GPU, Lengths, Tick, example_lengths, is_budget, packed_lengths, padded, random_block
from pipelines.compute.packed_attention import flash_attention_2

GROUPED_EXAMPLES = {"one-document": 4, "five-documents": 2, "long-answers": 4}
"""Examples of a batch under group_by_length: the longest ones come first, and must fit in 80 GB."""


class _Examples(Dataset[dict[str, list[int]]]):
    """Examples as the Trainer's sampler groups them by the length of `input_ids`."""

    def __init__(self, kind: str, count: int = 2000) -> None:
        self.lengths = list(islice(example_lengths(kind), count))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": [0] * sum(self.lengths[index]), "lengths": list(self.lengths[index])}


class _Blocks(Dataset[list[Lengths]]):
    """Packed blocks, each a batch of its own."""

    def __init__(self, budget: int, kind: str, count: int = 100) -> None:
        self.blocks = list(islice(packed_lengths(budget, kind), count))

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> list[Lengths]:
        return self.blocks[index]


class _Collator:
    """Makes the batches, and remembers how many tokens and answer tokens each has."""

    def __init__(self, vocabulary: int, flash: bool) -> None:
        self.vocabulary, self.flash = vocabulary, flash
        self.flatten = DataCollatorWithFlattening()
        self.counts: list[tuple[int, int]] = []

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        if isinstance(features[0], dict):
            batch = padded([tuple(feature["lengths"]) for feature in features], self.vocabulary, multiple=8)
            tokens = int(batch["attention_mask"].sum())
        else:
            batch = self._flattened(features[0])
            tokens = batch["input_ids"].numel()
        self.counts.append((tokens, int((batch["labels"] >= 0).sum())))
        return batch

    def _flattened(self, lengths: list[Lengths]) -> dict[str, Any]:
        ids = iter(random_block(lengths, self.vocabulary).input_ids.tolist())
        examples = []
        for prompt, answer in lengths:
            own = list(islice(ids, prompt + answer))
            examples.append({"input_ids": own, "labels": [-100] * prompt + own[prompt:]})
        batch: dict[str, Any] = self.flatten(examples)
        if self.flash:
            ends = list(accumulate(map(sum, lengths), initial=0))
            batch |= {"boundaries": torch.tensor(ends, dtype=torch.int32), "longest": max(map(sum, lengths))}
        return batch


class _Ticking(TrainerCallback):
    def __init__(self, collator: _Collator, tick: Tick) -> None:
        self.collator, self.tick = collator, tick

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step, and end the training when there are enough."""
        control.should_training_stop = not self.tick(*self.collator.counts[state.global_step - 1])


def _flash_2(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """What the package flash-attn would do, by PyTorch's own kernel."""
    flat = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output = flash_attention_2(*flat, kwargs["boundaries"], kwargs["longest"], kwargs["scaling"])
    return output[None], None


ALL_ATTENTION_FUNCTIONS.register("varlen_of_torch", _flash_2)
ATTENTION = {"flex": "flex_attention", "flash": "varlen_of_torch"}


def run_trainer(model: PeftModel, words: list[str], kind: str, tick: Tick) -> None:
    """Batches of the Trainer, `hf-grouped` or `hf-packed-8k-sdpa` and its like, until `tick` wants no more."""
    model.get_base_model().set_attn_implementation(ATTENTION.get(words[-1], "sdpa"))
    grouped = words[1] == "grouped"
    collator = _Collator(model.config.vocab_size, words[-1] == "flash")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=GROUPED_EXAMPLES[kind] if grouped else 1,
            train_sampling_strategy="group_by_length" if grouped else "sequential",
            max_steps=10_000,
            learning_rate=1e-4,
            optim="adamw_torch_fused" if ON_GPU else "adamw_torch",
            bf16=True,
            use_cpu=not ON_GPU,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=_Examples(kind) if grouped else _Blocks(_budget(words), kind),
            data_collator=collator,
            callbacks=[_Ticking(collator, tick)],
        )
        trainer.train()


def _budget(words: list[str]) -> int:
    return next(int(word[:-1]) * 1024 for word in words if is_budget(word))
