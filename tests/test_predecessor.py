"""The predecessor's commands: its JSON of training arguments, its flags."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import StageError
from pipelines.predecessor import translate_flags
from pipelines.rows.shards import Conversation, parse_row
from pipelines.run.packing import PackingConfig, encode_row

QLORA: dict[str, Any] = {
    "output_dir": "saved_files/chatglm3-6b_QLoRA",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-3,
    "num_train_epochs": 1.0,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.1,
    "logging_steps": 5,
    "save_strategy": "steps",
    "save_steps": 500,
    "evaluation_strategy": "steps",
    "eval_steps": 500,
    "optim": "adamw_torch",
    "fp16": False,
    "remove_unused_columns": False,
    "ddp_find_unused_parameters": False,
    "seed": 42,
}


def translate(tmp_path: Path, fields: dict[str, Any], *flags: str) -> dict[str, str]:
    file = tmp_path / "chatglm3-6b_QLoRA.json"
    file.write_text(json.dumps(fields))
    words = translate_flags(["--train_args_json", str(file), *flags])
    return dict(zip(words[::2], words[1::2], strict=True))


def test_its_own_file_becomes_our_flags_and_each_field_is_accounted_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert translate(tmp_path, QLORA, "--lora_rank", "4", "--lora_dim=8", "--model_name_or_path", "chatglm3-6b") == {
        "--out": "saved_files/chatglm3-6b_QLoRA",
        "--batch_size": "32",
        "--learning_rate": "0.001",
        "--epochs": "1.0",
        "--schedule": "linear",
        "--warmup_ratio": "0.1",
        "--save_steps": "500",
        "--eval_steps": "500",
        "--seed": "42",
        "--lora.dropout": "0.05",
        "--lora.targets": "[q_proj, k_proj, v_proj]",
        "--lora.rank": "4",
        "--lora.alpha": "8",
        "--base": "chatglm3-6b",
    }
    said = capsys.readouterr().err
    assert all(f"train: {field}: " in said for field in QLORA)


def test_what_its_file_leaves_out_and_steps_beyond_the_epochs_are_as_hugging_face_has_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = translate(tmp_path, {"output_dir": "o", "gradient_accumulation_steps": 2})
    expected = {"--batch_size": "16", "--learning_rate": "5e-05", "--epochs": "3.0", "--warmup_ratio": "0.0"}
    assert found.items() >= expected.items()
    assert "train: learning_rate: 5e-05 -> --learning_rate 5e-05 (Hugging Face's default)" in capsys.readouterr().err
    limited = translate(tmp_path, QLORA | {"max_steps": 2000})
    assert (limited["--max_steps"], float(limited["--epochs"])) == ("2000", 1e6)
    assert "num_train_epochs: 1.0 -> no effect: max_steps is given" in capsys.readouterr().err
    assert translate(tmp_path, QLORA | {"max_steps": -1})["--epochs"] == "1.0"


def test_flags_beat_the_file(tmp_path: Path) -> None:
    assert translate(tmp_path, QLORA, "--seed", "7")["--seed"] == "7"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"deepspeed": "x.json"}, "deepspeed has no meaning here; take it out"),
        ({"fp16": True}, "fp16: True is not supported, only False"),
        ({"optim": "adafactor"}, "optim: 'adafactor' is not supported, only 'adamw_torch'"),
        ({"lr_scheduler_type": "polynomial"}, "'polynomial' is not supported; choose linear, cosine or constant"),
        ({"per_device_train_batch_size": "auto"}, "gradient_accumulation_steps: 'auto' is no whole number"),
        ({"gradient_accumulation_steps": None}, "gradient_accumulation_steps: None is no whole number"),
        ({"save_strategy": "no"}, "save_strategy: 'no' is not supported; choose steps or epoch"),
    ],
)
def test_a_field_without_meaning_is_refused_by_name(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(StageError, match=message):
        translate(tmp_path, fields)


def test_its_row_files_must_come_from_prepare(tmp_path: Path) -> None:
    for side in ("train", "dev"):
        (tmp_path / "data" / side).mkdir(parents=True)
    (tmp_path / "data" / "receipt.json").write_text("{}")
    flags = ["--train_data_path", f"{tmp_path}/data/train/part-00000.jsonl", "--eval_data_path", f"{tmp_path}/data/dev"]
    assert translate_flags(flags) == ["--data", f"{tmp_path}/data"]
    with pytest.raises(StageError, match="not written by prepare; run prepare"):
        translate_flags(["--train_data_path", f"{tmp_path}/elsewhere/train.json"])


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders as prepare leaves them."""
    for name in ("data", "other"):
        for side in ("train", "dev"):
            (tmp_path / name / side).mkdir(parents=True)
        (tmp_path / name / "receipt.json").write_text("{}")
    return tmp_path / "data", tmp_path / "other"


def test_rows_of_two_prepared_folders_are_refused_in_any_order_of_flags(folders: tuple[Path, Path]) -> None:
    data, other = folders
    assert translate_flags(["--data", str(data), f"--train_data_path={data}/train"]) == ["--data", str(data)]
    for flags in (
        ["--train_data_path", f"{data}/train", "--eval_data_path", f"{other}/dev"],
        ["--train_data_path", f"{data}/train", "--data", str(other)],
        ["--data", str(other), "--train_data_path", f"{data}/train"],
    ):
        with pytest.raises(StageError, match=r"rows must lie in one prepared folder, not also in .*(data|other)$"):
            translate_flags(flags)


def test_each_renamed_flag_is_said_on_stderr(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    data, _ = folders
    translate_flags(["--lora_rank", "4", "--lora_dim=8", "--train_data_path", f"{data}/train", "--epochs", "2"])
    assert capsys.readouterr().err.splitlines() == [
        "train: --lora_rank: 4 -> --lora.rank 4",
        "train: --lora_dim: 8 -> --lora.alpha 8",
        f"train: --train_data_path: {data}/train -> --data {data}",
    ]


def test_lengths_that_only_the_bare_format_cuts_at_are_said_to_have_no_effect_in_the_chat_format(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lengths = ["--max_input_length", "1024", "--max_output_length=512"]
    assert translate_flags(lengths) == ["--max_input_length", "1024", "--max_output_length", "512"]
    assert capsys.readouterr().err.splitlines() == [
        "train: --max_input_length: no effect unless --prompt_format bare",
        "train: --max_output_length: no effect unless --prompt_format bare",
    ]
    translate_flags([*lengths, "--prompt_format", "bare"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("fields", "flag", "value"),
    [
        ({"max_steps": -1}, "--max_steps", "0"),
        ({"max_steps": 20}, "--max_steps", "20"),
        ({"save_strategy": "steps"}, "--save_steps", "500"),
        ({"save_strategy": "steps", "save_steps": 7}, "--save_steps", "7"),
        ({"save_strategy": "epoch", "save_steps": 7}, "--save_steps", "0"),
        ({"evaluation_strategy": "steps"}, "--eval_steps", "500"),
        ({"evaluation_strategy": "steps", "logging_steps": 5}, "--eval_steps", "5"),
        ({"eval_strategy": "steps", "eval_steps": None, "logging_steps": 5}, "--eval_steps", "5"),
        ({"eval_strategy": "steps", "eval_steps": 9, "logging_steps": 5}, "--eval_steps", "9"),
    ],
)
def test_numbers_left_out_are_what_training_arguments_defaults_to(
    tmp_path: Path, fields: dict[str, Any], flag: str, value: str
) -> None:
    assert translate(tmp_path, fields)[flag] == value


def test_the_batch_size_is_said_to_count_all_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    translate(tmp_path, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8})
    assert "--batch_size 32 (of all workers together; Hugging Face" in capsys.readouterr().err


def test_a_rows_input_is_appended_to_its_instruction_after_a_newline_unless_blank() -> None:
    def asked(**row: Any) -> str:
        item = parse_row(json.dumps({"instruction": "翻译：", "output": "你好"} | row).encode())
        assert isinstance(item, Conversation)
        return str(item.messages[0]["content"])

    assert asked(input=" hello\n") == "翻译：\n hello\n"
    assert {asked(), asked(input=""), asked(input=None), asked(input=" \n\t")} == {"翻译："}


@pytest.mark.parametrize(
    "row", ['{"output": "x"}', '{"messages": [1]}', '["x"]', '"x"', '{"instruction": 1, "output": "x"}', "{"]
)
def test_a_line_that_is_no_row_is_said_to_be_none(row: str) -> None:
    config = PackingConfig(
        tokenizer="tiny", prompt_format="chat", block_tokens=64, max_input_length=32, max_output_length=8
    )
    assert encode_row(row, config)[2].startswith("no training row (")
