"""LoRA updates added to weights one matrix at a time, in fp32."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peft import LoraConfig
from torch import Tensor
from transformers import GlmConfig

from chatglm3.adapters import lora_scale, native_adapter
from chatglm3.checkpoint import open_tensors, read_config
from chatglm3.official import native_shapes
from cluster.errors import StageError
from pipelines.weights.weight_formats import is_quantised, through_nf4

Onto = Literal["16bit", "nf4"]
_PREFIX = "base_model.model."
_MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True)
class Update:
    """What an adapter adds to a weight [out, in]: scale * b @ a, with a [rank, in] and b [out, rank]."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    """With DoRA (arXiv:2402.09353): the norms [out] that the sum's rows are brought to."""


class MergedWeights:
    """The tensors of a base model with its adapters' updates in them, each made when it is asked for.

    `onto` says what the updates are added to: the weights themselves, or what NF4 leaves of them, which is then what
    matrices without an update are too.
    """

    def __init__(self, base: Path, adapters: Mapping[str, float], onto: Onto) -> None:
        self.config, self.onto = read_config(base), onto
        self._tensors = open_tensors(base, self.config)
        self._updates = read_updates(adapters, self.config)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Native name -> shape of each tensor."""
        return native_shapes(self.config)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor in bf16: added in fp32 and rounded once, where PEFT's own merge rounds twice."""
        weight = self._tensors[name]
        if self.onto == "nf4" and is_quantised(name):
            weight = through_nf4(weight.bfloat16())
        if updates := self._updates.get(name):
            weight = folded(weight, updates)
        return weight.bfloat16().contiguous()


def read_updates(adapters: Mapping[str, float], base: GlmConfig) -> dict[str, list[Update]]:
    """The updates of each weight, by its native name; `adapters` are folders and their factors.

    Raises StageError for an adapter that holds more than LoRA or DoRA updates, and for DoRA that is to be combined.
    """
    updates: dict[str, list[Update]] = {}
    for folder, factor in adapters.items():
        config, tensors = native_adapter(folder, base)
        _check(config, folder, is_alone=len(adapters) == 1 and factor == 1)
        for name in tensors:
            module, _, kind = name.removeprefix(_PREFIX).partition(".lora_")
            if kind == "A.weight":
                found = _update(f"{_PREFIX}{module}", config, tensors, factor)
                updates.setdefault(f"{module}.weight", []).append(found)
            elif kind != "B.weight" and _MAGNITUDE not in name:
                raise StageError(f"{folder} holds {name}, which cannot be folded in; merge it with its own code")
    return updates


def folded(weight: Tensor, updates: Sequence[Update]) -> Tensor:
    """The weight with its updates, in fp32."""
    total = weight.float()
    for update in updates:
        total = total + update.scale * (update.b.float() @ update.a.float())
        if update.magnitude is not None:
            total *= (update.magnitude.float() / total.norm(dim=1))[:, None]
    return total


def _update(module: str, config: LoraConfig, tensors: Mapping[str, Tensor], factor: float) -> Update:
    a, b = (tensors[f"{module}.lora_{matrix}.weight"] for matrix in "AB")
    return Update(a, b, factor * lora_scale(config, module, len(a)), tensors.get(f"{module}.{_MAGNITUDE}"))


PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of PEFT's init_lora_weights that leave the base as it was. pissa, olora, corda, lora_ga and loftq take out of
the base what A and B begin with: added to the whole base, that would count twice."""


def _check(config: LoraConfig, folder: str, is_alone: bool) -> None:
    if config.init_lora_weights not in PLAIN_STARTS:
        raise StageError(
            f"--adapter {folder} was begun with init_lora_weights {config.init_lora_weights!r}, by which PEFT changes "
            f"the base too; save it as plain LoRA (save_pretrained with path_initial_model_for_weight_conversion; a "
            f"loftq one must be merged with its own code)"
        )
    for field, simple in (("modules_to_save", None), ("bias", "none"), ("lora_bias", False)):
        if getattr(config, field) not in (simple, []):
            file = Path(folder, "adapter_config.json")
            raise StageError(f"{file}: {field} is {getattr(config, field)!r}, which cannot be folded in")
    if config.use_dora and not is_alone:
        raise StageError(
            f"--adapter {folder} is a DoRA adapter, which scales whole weights; it can only be merged alone"
        )
