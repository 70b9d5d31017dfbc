"""Memory of a merge: that of a few weight files, whatever the size of the model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.merging import write_adapter
from chatglm3.checkpoint import read_config
from chatglm3.official import layout
from chatglm3.tiny import FOLDER as TINY

SIZES = {"hidden_size": 1024, "ffn_hidden_size": 2752, "num_attention_heads": 16, "num_layers": 18}
FILE_BYTES = 1 << 24  # the largest matrix has 11 MB
PROGRAM = """
import re, sys, threading, time
from pathlib import Path
from pipelines.weights import weight_files
from pipelines.merging import MergeConfig, merge

def own_memory():  # in bytes, without mapped files, which are the page cache's
    return int(re.search(r"RssAnon:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

file_bytes, base, adapter, weight_format, out = sys.argv[1:]
weight_files.FILE_BYTES = int(file_bytes)
settings = {"format": weight_format, "prompt_format": "chat", "measure": False}
merge(MergeConfig(base="tiny", out=f"{out}-tiny", **settings))  # imports what is imported late
before, peak, done = own_memory(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, own_memory())

watcher = threading.Thread(target=watch)
watcher.start()
merge(MergeConfig(base=base, adapter=adapter, out=out, **settings))
done.set()
watcher.join()
print("peak", peak - before)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in the official layout, 400 MB: 24 files."""
    folder = tmp_path_factory.mktemp("base")
    config = json.loads((Path(TINY) / "config.json").read_text()) | SIZES
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(Path(TINY) / name, folder / name)
    shapes = {name: target.shape for name, target in layout(read_config(folder)).items()}
    tensors = {name: (torch.randn(shape) * 0.02).half() for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("weight_format", ["bf16", "nf4"])
def test_a_merge_needs_the_memory_of_a_few_files_not_of_the_model(weight_format: str, base: Path, tmp_path: Path):
    write_adapter(tmp_path / "adapter", base, rank=4)
    out, size = tmp_path / "out", (base / "model.safetensors").stat().st_size
    assert size > 23 * FILE_BYTES
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(FILE_BYTES), str(base), str(tmp_path / "adapter"), weight_format, str(out)],
        capture_output=True,
        text=True,
        check=True,
        # glibc gives back at once what is larger, so that what is counted is in use.
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    peak = int(done.stdout.split("peak ")[1])
    assert peak < 8 * FILE_BYTES
