"""`python -m pipelines STAGE [flags]`: the one place that reads the command line."""

import logging
import os
import sys

from chatglm3.errors import ModelError
from cluster.commands import run_command
from cluster.errors import StageError
from pipelines.predecessor import translate_flags

STAGES = {
    "prepare": ("pipelines.preparation:prepare", "check raw shards, split by document, write instruction rows"),
    "train": ("pipelines.training:train", "fine-tune a LoRA adapter on any number of workers"),
    "sweep": ("pipelines.sweeping:sweep", "try ranks, learning rates and layers; write the best as run.yaml"),
    "merge": ("pipelines.merging:merge", "fold an adapter into its base: bf16, nf4, int8, fp8 or w4a16"),
    "evaluate": ("pipelines.evaluation:evaluate", "score a model on the dev rows, beside another one"),
    "predict": ("pipelines.prediction:predict", "ask one question, or chat in the terminal"),
    "demo": ("pipelines.demo:demo", "all of them on the built-in tiny model, ending with an HTTP answer"),
}


def _quiet_libraries() -> None:
    """Keep off the terminal what libraries say at every start; an answer on stdout must stay alone there."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # recommends an optional package
    accelerator_found = "Setting accelerator to CPU"  # DeepSpeed prints it to stdout
    logging.getLogger("DeepSpeed").addFilter(lambda record: accelerator_found not in record.getMessage())
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    _quiet_libraries()
    expected = (StageError, ModelError, OSError)
    sys.exit(run_command("python -m pipelines", STAGES, sys.argv[1:], expected, {"train": translate_flags}))
