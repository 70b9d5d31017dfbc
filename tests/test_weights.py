"""Weight files that are missing, damaged, left over or hostile are refused by name."""

import shutil

import pytest
import torch
from model_folders import copied, rewrite

from chatglm3 import ModelError, load_model

NORM = "transformer.encoder.layers.1.input_layernorm.weight"
WORDS = "transformer.embedding.word_embeddings.weight"


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda second: second.unlink(), "00002-of-00003.* is missing: download it again"),
        (lambda second: second.write_bytes(second.read_bytes()[:-1000]), "00002-of-00003.* is damaged or cut short"),
        (lambda second: second.write_bytes(b""), "00002-of-00003.* is damaged or cut short"),
        (
            lambda second: shutil.copyfile(second, str(second).replace("00002-of", "00004-of")),
            "00004-of-00003.* is not named",
        ),
        (lambda second: rewrite(second, **{NORM: None}), f"no weight file holds {NORM}"),
        (lambda second: rewrite(second, extra=torch.zeros(2)), "00002-of-00003.*: extra is not in the model"),
        (
            lambda second: rewrite(second, **{WORDS: torch.zeros(2)}),
            f"00002-of-00003.*: {WORDS} stands in .*00001-of-00003",
        ),
        (
            lambda second: rewrite(second, **{NORM: torch.zeros(2)}),
            f"00002-of-00003.*: {NORM} is torch.float32 \\(2,\\)",
        ),
        (lambda second: rewrite(second, **{NORM: torch.zeros(64, dtype=torch.int8)}), f"{NORM} is torch.int8"),
        (lambda second: next(second.parent.glob("*.index.json")).write_text("{"), "index.json is not readable JSON"),
        (lambda second: next(second.parent.glob("*.index.json")).write_text("{}"), "index.json: weight_map is missing"),
        (lambda second: next(second.parent.glob("*.index.json")).unlink(), "is missing: download it again"),
        (lambda second: (second.parent / "config.json").unlink(), "config.json is missing"),
        (lambda second: (second.parent / "config.json").write_text("[]"), "config.json holds no JSON object"),
    ],
)
def test_damaged_folders_are_refused_by_file(shared, tmp_path, suffix, damage, fault):
    folder = copied(shared / f"chatglm3/ckpt/small-fp16-{suffix}", tmp_path / "model")
    damage(next(folder.glob(f"*-00002-of-00003.{suffix}")))
    with pytest.raises(ModelError, match=fault) as error:
        load_model(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_folders_and_weights_are_named(shared, tmp_path):
    with pytest.raises(ModelError, match="THUDM/chatglm3-6b is not a folder: download the model"):
        load_model("THUDM/chatglm3-6b")
    shutil.copyfile(shared / "chatglm3/ckpt/small-fp16-bin" / "config.json", tmp_path / "config.json")
    with pytest.raises(ModelError, match=r"holds neither model\*.safetensors nor pytorch_model\*.bin"):
        load_model(tmp_path)


def test_an_index_without_any_of_its_files_is_not_a_format(shared, tmp_path):
    """A download that leaves the safetensors out still brings their index."""
    folder = copied(shared / "chatglm3/ckpt/small-fp16-bin", tmp_path / "model")
    index = "model.safetensors.index.json"
    shutil.copyfile(shared / "chatglm3/ckpt/small-fp16-safetensors" / index, folder / index)
    load_model(folder)


class Command:
    """Pickled, this is a call of print."""

    def __reduce__(self) -> tuple:
        return print, ("executed",)


def test_code_in_a_weight_file_is_not_executed(shared, tmp_path, capsys):
    folder = copied(shared / "chatglm3/ckpt/small-fp16-bin", tmp_path / "model")
    torch.save({"x": Command()}, folder / "pytorch_model-00002-of-00003.bin")
    with pytest.raises(ModelError, match=r"pytorch_model-00002-of-00003.bin holds code besides tensors"):
        load_model(folder)
    assert "executed" not in capsys.readouterr().out
