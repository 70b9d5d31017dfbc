"""Adapters of random numbers, of the kinds that are served."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from chatglm3 import load_model

KINDS = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj"]},
    "everything": {"r": 8, "target_modules": ["q_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]},
    "rslora": {"r": 16, "lora_alpha": 4, "use_rslora": True, "target_modules": ["down_proj"]},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ["q_proj", "o_proj", "gate_up_proj"]},
    "patterns": {
        "r": 4,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"down_proj": 32},
    },
}


def write_adapter(base: Path, folder: Path, seed: int, **settings: object) -> Path:
    """An adapter of random numbers, large enough to change what the model says."""
    torch.manual_seed(seed)
    model = get_peft_model(load_model(base, dtype=torch.float32), LoraConfig(init_lora_weights=False, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter *= 1 + 0.3 * torch.rand_like(parameter)
    model.save_pretrained(folder)
    return folder
