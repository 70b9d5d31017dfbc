"""What a merged model is measured against: the model that was trained, with its adapters live."""

import asyncio
import gc
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModelForCausalLM, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from transformers import GlmForCausalLM

from chatglm3 import load_model, load_tokenizer
from chatglm3.adapters import load_adapter, native_adapter
from chatglm3.chat import PromptFormat
from chatglm3.engines import Sampling
from chatglm3.engines.transformers_engine import TransformersEngine
from chatglm3.quantization import NF4
from pipelines.scores.answering import ask_all
from pipelines.scores.metrics import Score, summarize
from pipelines.scores.questions import groups_of, read_questions, score_answer
from pipelines.weights.agreement import MOST_TOKENS, Agreement, answer_distributions, compare, shuffled_examples, take
from pipelines.weights.folding import MergedWeights

# It would say for each layer and token that it casts what is in bf16.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

BATCH = 16  # questions that are answered at a time


@dataclass(frozen=True)
class Measured:
    """A model beside the reference."""

    agreement: Agreement
    scores: dict[str, Score] = field(default_factory=dict)
    """Of its own answers to questions; empty if none was asked."""
    same_answers: int = 0
    """How many of these are the reference's, to the letter."""
    questions: int = 0


class Yardstick:
    """Dev rows, and how the first model that is measured did on them: the reference for all others."""

    def __init__(
        self, data: Path, base: Path, prompt_format: PromptFormat, score_rows: int, longest_answer: int
    ) -> None:
        drawn = shuffled_examples(data, "dev", base, prompt_format)
        self.examples = take(drawn, MOST_TOKENS, lambda example: sum(example.is_target))
        self.questions = read_questions(data / "dev", score_rows) if score_rows else []
        self.results: dict[str, Measured] = {}
        self._tokenizer, self._prompt_format = load_tokenizer(base), prompt_format
        self._sampling = Sampling(max_tokens=longest_answer)
        self._distributions: list[torch.Tensor] = []
        self._answers: list[str] = []

    @property
    def tokens(self) -> int:
        """Answer tokens whose distributions are compared."""
        return sum(sum(example.is_target) for example in self.examples)

    @property
    def reference_name(self) -> str:
        """The name of the model that was measured first."""
        return next(iter(self.results))

    def measure(self, name: str, model: GlmForCausalLM) -> Measured:
        """How far the model, which is not to be used again, is from the reference; kept in `results` by name."""
        found = answer_distributions(model, self.examples, name)
        answers = self._answered(model) if self.questions else []
        if not self.results:
            self._distributions, self._answers = found, answers
        points = [score_answer(row, answer) for row, answer in zip(self.questions, answers, strict=True)]
        self.results[name] = Measured(
            compare(self._distributions, found, self.examples),
            summarize(points, groups_of(self.questions)) if points else {},
            sum(map(str.__eq__, answers, self._answers)),
            len(answers),
        )
        return self.results[name]

    def _answered(self, model: GlmForCausalLM) -> list[str]:
        engine = TransformersEngine(model, self._tokenizer, max_batch=BATCH)
        instructions = [row["instruction"] for row in self.questions]
        try:
            asked = ask_all(engine, self._tokenizer, instructions, self._prompt_format, self._sampling, BATCH)
            return [answer.text for answer in asyncio.run(asked)]
        finally:
            engine.close()


def live_model(base: Path, adapters: Mapping[str, float], in_nf4: bool) -> GlmForCausalLM:
    """The base, in NF4 if that is asked for, and PEFT's layers for the adapters and their factors: none is folded."""
    model = load_model(
        base, dtype=torch.bfloat16, quantization_config=NF4 if in_nf4 else None, device_map=_emptied_device()
    )
    if not adapters:
        return model
    first, *others = adapters
    adapted = load_adapter(model, first)
    names = {"default": adapters[first]} | {str(number): adapters[path] for number, path in enumerate(others)}
    for number, path in enumerate(others):
        config, tensors = native_adapter(path, model.config)
        adapted.add_adapter(str(number), config)
        set_peft_model_state_dict(adapted, tensors, adapter_name=str(number))
    _weigh(adapted, names)
    return model


def _weigh(adapted: PeftModelForCausalLM, factors: Mapping[str, float]) -> None:
    """Let all adapters answer together, each update times its factor."""
    lora: Any = adapted.base_model
    lora.set_adapter(list(factors))
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            for name in layer.scaling:
                layer.scaling[name] *= factors[name]
    adapted.eval()


def in_memory(weights: MergedWeights) -> GlmForCausalLM:
    """The model of the merged weights in bf16."""
    tensors = {name: weights[name] for name in weights.shapes}
    model: GlmForCausalLM = GlmForCausalLM.from_pretrained(
        None, config=weights.config, state_dict=tensors, dtype=torch.bfloat16, device_map=_emptied_device()
    )
    return model


def load_on_device(folder: Path) -> GlmForCausalLM:
    """The model in a folder, on the GPU if there is one."""
    return load_model(folder, device_map=_emptied_device())


def _emptied_device() -> dict[str, str]:
    """Where models are measured, once the one before is gone: a quantised layer is a cycle, left to the collector."""
    gc.collect()
    if not torch.cuda.is_available():
        return {"": "cpu"}
    torch.cuda.empty_cache()
    return {"": "cuda:0"}
