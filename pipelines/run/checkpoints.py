"""What a checkpoint holds: the adapter, and all that training needs to go on as if it had never stopped."""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file


def save_checkpoint(model: PeftModel, state: dict[str, Any], folder: Path) -> None:
    """Write the adapter (plain PEFT), the step number and the optimizer's state.

    Nothing else is needed. Learning rate and blocks are functions of the step; dropout is seeded by step and block, so
    that no generator has a past.
    """
    held = io.BytesIO()
    torch.save(state, held)  # into a file, torch would not say that a disk is full
    with _errors_of_the_system(folder):
        # Told not to look for changed embeddings, PEFT does not ask the network what the base's were.
        model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
        (folder / "state.pt").write_bytes(held.getbuffer())


@contextmanager
def _errors_of_the_system(folder: Path) -> Iterator[None]:
    """Raise them as OSError with the place, whether they are Python's or safetensors', which has a class of its own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = re.search(r"(?:Errno|os error) (\d+)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error


def load_checkpoint(model: PeftModel, folder: Path) -> dict[str, Any]:
    """Give the model the adapter that `save_checkpoint` wrote, and return the state."""
    set_peft_model_state_dict(model, load_file(folder / "adapter" / "adapter_model.safetensors"))
    state: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    return state
