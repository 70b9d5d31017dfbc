"""Train a base of 50 million parameters on the tiny model's lessons, for benchmarks.loss_curves: minutes on one GPU.

python -m benchmarks.medium_model --out /tmp/medium --seconds 120
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GlmForCausalLM

from chatglm3.official import translate_config
from chatglm3.tiny import FOLDER as TINY
from chatglm3.tiny import build

SIZE = {"hidden_size": 768, "ffn_hidden_size": 2048, "num_attention_heads": 12, "num_layers": 8}


def main() -> None:
    """Read the command line, train, write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seconds", type=float, default=120, help="how long to train (default: 120)")
    parser.add_argument("--rows", type=int, default=48, help="rows of 1,024 tokens a step (default: 48)")
    parser.add_argument("--learning-rate", type=float, default=8e-4, help="its peak (default: 0.0008)")
    parser.add_argument("--seed", type=int, default=1, help="of the weights and the lessons (default: 1)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(Path(TINY) / name, options.out / name)
    torch.manual_seed(options.seed)
    model: Any = GlmForCausalLM(translate_config(options.out, build.CONFIG | SIZE))
    model.to("cuda", torch.float32)
    build.train(model, options)
    build.write_official(model, options.out)
    (options.out / "config.json").write_text(json.dumps(build.CONFIG | SIZE, indent=2) + "\n")


if __name__ == "__main__":
    main()
