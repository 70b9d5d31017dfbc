"""A few dev questions answered while a model is in training: by the live adapter, the likeliest token each time."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, GlmForCausalLM

from chatglm3 import load_tokenizer, parse_reply
from chatglm3.chat import PromptFormat, question_ids
from pipelines.compute import packed_attention
from pipelines.compute.step import adapters_in_base_dtype, base_of
from pipelines.scores.questions import Row, read_questions, score_answer

METRICS = ("exact_match", "f1")


def draw_questions(split: Path, most: int, file: Path) -> bool:
    """Write `most` of the split's questions, or all, to `file`: always the same. False if there are none."""
    rows = read_questions(split, most) if most else []
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return bool(rows)


class SpotCheck:
    """The questions, and what the model's answers to them are worth."""

    def __init__(self, file: str, folder: str, prompt_format: PromptFormat, longest_answer: int) -> None:
        self.tokenizer, self.prompt_format, self.longest_answer = load_tokenizer(folder), prompt_format, longest_answer
        rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
        asked = [(self._prompt(row), row) for row in rows]
        self.asked: list[tuple[list[int], Row]] = sorted(asked, key=lambda pair: len(pair[0]))

    def _prompt(self, row: Row) -> list[int]:
        return question_ids(self.tokenizer, [{"role": "user", "content": row["instruction"]}], self.prompt_format)

    def batches(self, tokens: int, workers: int) -> list[list[tuple[list[int], Row]]]:
        """The questions in batches of at most `tokens` tokens with their answers, at least one for each worker."""
        longest = len(self.asked[-1][0]) + self.longest_answer
        size = max(1, min(tokens // longest, -(-len(self.asked) // workers)))
        return [self.asked[start : start + size] for start in range(0, len(self.asked), size)]

    def points(self, model: PeftModel, batch: list[tuple[list[int], Row]], in_step: bool) -> list[float]:
        """What the answers to a batch add to each of METRICS. `in_step`: all workers compute as many tokens."""
        replies = self._replies(model, [prompt for prompt, _ in batch], in_step)
        points = [score_answer(row, reply) for (_, row), reply in zip(batch, replies, strict=True)]
        return [sum(each[name][0] for each in points) for name in METRICS]

    def _replies(self, model: PeftModel, prompts: list[list[int]], in_step: bool) -> list[str]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        is_there = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        likeliest = GenerationConfig(
            max_new_tokens=self.longest_answer,
            do_sample=False,
            eos_token_id=list(self.tokenizer.stop_ids),
            pad_token_id=self.tokenizer.pad_id,
        )
        with _answering(model) as glm:
            found = glm.generate(  # type: ignore[misc]  # transformers wants another `self` than its own models
                input_ids=ids.to(glm.device),
                attention_mask=is_there.to(glm.device),
                generation_config=likeliest,
                synced_gpus=in_step,
            )
        assert isinstance(found, Tensor)
        return [self._text(answer) for answer in found[:, width:].tolist()]

    def _text(self, ids: list[int]) -> str:
        end = next((place for place, token in enumerate(ids) if token in self.tokenizer.stop_ids), len(ids))
        text = self.tokenizer.decode(ids[:end])
        return parse_reply(text).content if self.prompt_format == "chat" else text


@contextmanager
def _answering(model: PeftModel) -> Iterator[GlmForCausalLM]:
    """The network as one that generates; afterwards it is the one that trains again, compiled as it was."""
    glm = base_of(model)
    model.eval()
    glm.set_attn_implementation("sdpa")
    try:
        # Layers are compiled for a block's size; one at a time, tokens would have them compiled again and again.
        with torch.compiler.set_stance("force_eager"), adapters_in_base_dtype(glm):
            yield glm
    finally:
        glm.set_attn_implementation(packed_attention.NAME)
        model.train()
