"""The built-in model: a ChatGLM3 of 3.8 million parameters in the official layout, and how it was made.

`worlds.py` holds word lists, `knowledge.py` writes documents and questions from them, `lessons.py` turns those into
conversations, `build.py` trains on them and writes `model/`; `BUILD.md` says how well it reads.
"""

from pathlib import Path

FOLDER = Path(__file__).parent / "model"
"""The model's folder: config.json, safetensors, tokenizer.model."""
