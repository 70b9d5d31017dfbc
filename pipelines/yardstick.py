"""What a merged model is measured against: the distributions of the model that was trained, with its adapter live."""

from pathlib import Path
from typing import Any

import torch
from transformers import GlmForCausalLM

from chatglm3 import load_model
from chatglm3.adapters import load_adapter
from chatglm3.quantization import NF4
from pipelines.agreement import Agreement, Example, answer_distributions, compare
from pipelines.folding import MergedWeights


class Yardstick:
    """A reference model's distributions on some examples, and how far from it others are."""

    def __init__(self, reference_name: str, reference: Any, examples: list[Example]) -> None:
        self.reference_name, self.examples = reference_name, examples
        self._distributions = answer_distributions(reference, examples, reference_name)
        self.results: dict[str, Agreement] = {
            reference_name: compare(self._distributions, self._distributions, examples)
        }

    @property
    def tokens(self) -> int:
        """Answer tokens that are compared."""
        return sum(sum(example.is_target) for example in self.examples)

    def measure(self, name: str, model: Any) -> Agreement:
        """How far the model is from the reference; kept in `results` by name."""
        found = answer_distributions(model, self.examples, name)
        self.results[name] = compare(self._distributions, found, self.examples)
        return self.results[name]


def live_model(base: Path, adapter: str, in_nf4: bool) -> Any:
    """The base with the adapter on it, not folded: in NF4, if it was trained so."""
    model = load_model(
        base, dtype=torch.bfloat16, quantization_config=NF4 if in_nf4 else None, device_map={"": device()}
    )
    return load_adapter(model, adapter) if adapter else model


def in_memory(weights: MergedWeights) -> GlmForCausalLM:
    """The model of the merged weights in bf16."""
    tensors = {name: weights[name] for name in weights.shapes}
    model: GlmForCausalLM = GlmForCausalLM.from_pretrained(
        None, config=weights.config, state_dict=tensors, dtype=torch.bfloat16, device_map={"": device()}
    )
    return model


def load_on_device(folder: Path) -> GlmForCausalLM:
    """The model in a folder, on the GPU if there is one."""
    return load_model(folder, device_map={"": device()})


def device() -> str:
    """Where models are measured."""
    return "cuda:0" if torch.cuda.is_available() else "cpu"
