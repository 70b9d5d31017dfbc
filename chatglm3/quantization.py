"""bitsandbytes settings, the same wherever a model is quantised."""

import torch
from transformers import BitsAndBytesConfig

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
"""4-bit NormalFloat with double quantisation, computed in bfloat16: QLoRA's (arXiv:2305.14314)."""

INT8 = BitsAndBytesConfig(load_in_8bit=True)
"""LLM.int8() (arXiv:2208.07339)."""
