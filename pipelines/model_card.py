"""What a merged model says of itself: README.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.agreement import Agreement


def write_card(
    folder: Path, facts: Mapping[str, Any], config: Mapping[str, Any], results: Mapping[str, Agreement]
) -> None:
    """Write README.md. `results` are what was measured, the reference first; empty if nothing was."""
    recipe = {
        "base": facts["base"],
        "adapter": config["adapter"] or "none: the base was only converted",
        "added to": facts.get("onto", ""),
        "format": facts["format"],
        "prompt format": facts["prompt_format"],
        "data set (sha256 of its rows)": facts.get("dataset", ""),
        "data preset": facts.get("preset", ""),
        "training run (digest)": facts.get("run", ""),
    }
    rows = "".join(f"| {name} | {value} |\n" for name, value in recipe.items() if value)
    scores = "".join(f"| {name} | {r.kl:.5f} | {r.top1:.2%} | {r.loss:.4f} |\n" for name, r in results.items())
    measured = f"{_SCORES}{scores}" if results else "Not measured: `merge --measure true` does it.\n"
    (folder / "README.md").write_text(f"{_HEAD}{rows}\n## Agreement\n\n{measured}\n{_USE}", encoding="utf-8")


_HEAD = """\
---
library_name: transformers
pipeline_tag: text-generation
language: [zh, en]
license: other
license_name: chatglm3-6b-model-license
---

# ChatGLM3, tuned to answer from documents

| | |
|---|---|
"""

_SCORES = """\
At answer tokens of the dev rows; the first line is the model as it was trained, which the others are compared with.

| | KL divergence, nats | same likeliest token | loss |
|---|--:|--:|--:|
"""

_USE = """\
## Use

`AutoModelForCausalLM.from_pretrained`, `AutoTokenizer.from_pretrained` and vLLM load this folder without other code
(fp8 and w4a16 need the `compressed-tensors` package, nf4 and int8 `bitsandbytes`). Generation stops at `</s>`,
`<|user|>` and `<|observation|>`.

The chat template makes one text of a conversation: `<|user|>` inside a message or a document becomes a control token
there, and can pose as another role. For texts that are not your own, encode each message apart, as the service of this
project does.

## Limits

Answers are learned from one collection of documents and questions: measure on your own before you rely on them
(`python -m pipelines evaluate`). The weights of ChatGLM3-6B have a licence of their own (MODEL_LICENSE, where the base
came with it), which holds for what is made of them.
"""
