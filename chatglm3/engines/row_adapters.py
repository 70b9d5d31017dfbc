"""LoRA adapters that the rows of one batch use side by side: what an adapter adds to a layer, it adds to its own rows.

No adapter is merged into the model or into a copy of it, so that many of them cost little more memory than their files.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.integrations import dequantize_module_weight
from transformers import GlmForCausalLM

from chatglm3.adapters import lora_scale, native_adapter
from chatglm3.engines import AdapterFolders, UnusableAdapter
from chatglm3.engines.adapter_folders import written_at
from chatglm3.errors import ModelError

MAX_LOADED = 16
"""Adapters that stay in memory when nothing asks for them; one of rank 8 on ChatGLM3-6B's attention has 11 MB."""
_PREFIX = "base_model.model."
_MAGNITUDE = "lora_magnitude_vector"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """What an adapter makes of one layer's output W x + bias: gain * (W x + b a x) + bias."""

    a: torch.Tensor
    """[rank, in]"""
    b: torch.Tensor
    """[out, rank], times the adapter's scale."""
    gain: torch.Tensor | None
    """[out], with DoRA (arXiv:2402.09353)."""

    def applied(self, output: torch.Tensor, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The layer's output [..., out] with the update in it."""
        update = inputs.to(self.a.dtype) @ self.a.mT @ self.b.mT
        if self.gain is None:
            return output + update
        plain = output if bias is None else output - bias
        return output + (self.gain - 1) * plain + self.gain * update


Adapter = dict[str, Update]
"""Updates by the name of their layer."""


class RowAdapters:
    """The adapters of one model. `aim` belongs to the thread that runs the model, `find` to the event loop."""

    def __init__(self, model: GlmForCausalLM, folders: AdapterFolders) -> None:
        self._model = model
        self._folders = folders
        # One at a time: two loads of the same one would need its memory twice. And not in the event loop's threads, of
        # which a few requests for a slow folder would take all.
        self._loader = ThreadPoolExecutor(1, "adapters")
        self.loaded: OrderedDict[tuple[str, int], Adapter] = OrderedDict()
        """By folder and the time it was written; the one that was asked for last stands last."""
        self._groups: list[tuple[Adapter, torch.Tensor | slice]] = []
        self._layers = {
            f"model.{name}": layer for name, layer in model.model.named_modules() if isinstance(layer, torch.nn.Linear)
        }
        for name, layer in self._layers.items():
            layer.register_forward_hook(self._hook(name))

    async def find(self, name: str) -> Adapter:
        """The adapter of that name, as its folder is now. UnknownAdapter, or UnusableAdapter with the reason."""
        loaded = await asyncio.to_thread(self._loaded, name)
        if loaded is not None:
            return loaded
        return await asyncio.get_running_loop().run_in_executor(self._loader, self.load, name)

    def load(self, name: str) -> Adapter:
        """The same at once."""
        folder = self._folders.find(name)
        try:
            return self._kept((str(folder), written_at(folder)), folder)
        except (ModelError, OSError, ValueError, TypeError, KeyError) as error:
            raise UnusableAdapter(f"adapter {name!r} cannot be used: {' '.join(str(error).split())}") from None

    def aim(self, rows: Sequence[Adapter | None]) -> None:
        """Let the next passes, of as many rows, be with these adapters."""
        numbers: dict[int, list[int]] = {}
        for number, adapter in enumerate(rows):
            if adapter is not None:
                numbers.setdefault(id(adapter), []).append(number)
        self._groups = []
        for group in numbers.values():
            adapter = rows[group[0]]
            assert adapter is not None
            everybody = len(group) == len(rows)
            its_rows = slice(None) if everybody else torch.tensor(group, device=self._model.device)
            self._groups.append((adapter, its_rows))

    def _loaded(self, name: str) -> Adapter | None:
        folder = self._folders.find(name)
        key = str(folder), written_at(folder)
        with suppress(KeyError):
            self.loaded.move_to_end(key)
            return self.loaded[key]
        return None

    def _kept(self, key: tuple[str, int], folder: Path) -> Adapter:
        if key not in self.loaded:
            self.loaded[key] = self._read(folder)
            log.info("adapter %s loaded", folder)
        self.loaded.move_to_end(key)
        while len(self.loaded) > MAX_LOADED:
            self.loaded.popitem(last=False)  # requests under way hold on to it
        return self.loaded[key]

    @torch.inference_mode()
    def _read(self, folder: Path) -> Adapter:
        config, tensors = native_adapter(folder, self._model.config)
        for field, simple in (("modules_to_save", None), ("bias", "none"), ("lora_bias", False)):
            if getattr(config, field) not in (simple, []):
                raise ModelError(f"{folder}/adapter_config.json: {field} is not served beside other adapters; merge it")
        names = {name.removeprefix(_PREFIX).partition(".lora_")[0] for name in tensors}
        if outside := sorted(names - self._layers.keys()):
            raise ModelError(f"{folder}: {outside[0]} is no layer that adapters are served on; merge it")
        return {name: self._update(name, config, tensors) for name in names}

    def _update(self, name: str, config: LoraConfig, tensors: dict[str, torch.Tensor]) -> Update:
        a, b, magnitude = (
            tensor if tensor is None else tensor.to(self._model.device, torch.float32)
            for part in ("lora_A.weight", "lora_B.weight", _MAGNITUDE)
            for tensor in [tensors.get(f"{_PREFIX}{name}.{part}")]
        )
        if a is None or b is None:
            raise ModelError(f"only one of lora_A and lora_B is there for {name}")
        b = b * lora_scale(config, name, len(a))
        gain = None
        if magnitude is not None:
            weight = dequantize_module_weight(self._layers[name]).float()
            gain = (magnitude / (weight + b @ a).norm(dim=1)).to(self._model.dtype)
        return Update(a.to(self._model.dtype), b.to(self._model.dtype), gain)

    def _hook(self, name: str) -> Any:
        def add(layer: torch.nn.Linear, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            for adapter, rows in self._groups:
                if update := adapter.get(name):
                    output[rows] = update.applied(output[rows], inputs[0][rows], layer.bias).to(output.dtype)

        return add
