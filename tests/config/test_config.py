import json
import subprocess
import sys
from pathlib import Path

import pytest

from flare.config.config_file import parse_jsonc
from flare.config.options import FIELDS, STAGE_DEFAULTS
from flare.config.parse import resolve
from flare.config.validate import OTHER_TOOLS
from flare.errors import ConfigError
from flare.files import REPO


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# -- precedence ------------------------------------------------------------------------------------


def test_command_line_beats_file_beats_environment_beats_default(tmp_path: Path, monkeypatch) -> None:
    file = write(tmp_path / "c.json", '{"training_args": {"base_output_dir": "/file", "save_steps": 7}}')
    empty = write(tmp_path / "empty.json", "{}")
    assert resolve(["--config", empty]).options.base_output_dir == "/work/xiaoyonggao"
    monkeypatch.setenv("FLARE_OUTPUT_DIR", "/environment")
    assert resolve(["--config", empty]).options.base_output_dir == "/environment"
    assert resolve(["--config", file]).options.base_output_dir == "/file"
    options = resolve(["--config", file, "--base_output_dir", "/line"]).options
    assert (options.base_output_dir, options.save_steps) == ("/line", 7)


def test_stage_block_overrides_the_file_and_the_command_line_overrides_both(tmp_path: Path) -> None:
    file = write(tmp_path / "c.json", '{"learning_rate": 1e-3, "stages": {"2": {"learning_rate": 2e-3}}}')
    assert resolve(["--config", file, "--stage", "1"]).options.learning_rate == 1e-3
    assert resolve(["--config", file, "--stage", "2"]).options.learning_rate == 2e-3
    assert resolve(["--config", file, "--stage", "2", "--learning_rate", "5e-3"]).options.learning_rate == 5e-3


def test_epochs_on_the_command_line_replace_steps_of_the_defaults() -> None:
    options = resolve(["--num_train_epochs", "2"]).options
    assert (options.num_train_epochs, options.max_steps) == (2.0, None)


def test_dataset_weights_are_numbers_above_zero(tmp_path: Path) -> None:
    for spelling in (["0.7,0.3"], ["0.7", "0.3"]):
        assert resolve(["--dataset_weights", *spelling]).options.dataset_weights == [0.7, 0.3]
    file = write(tmp_path / "c.json", '{"data_args": {"dataset_weights": [0.7, 0.3]}}')
    assert resolve(["--config", file]).options.dataset_weights == [0.7, 0.3]
    for wrong in (["0.7,"], ["0.7,zero"], ["1,0"], ["-1,2"], ["nan,1"], ["inf,1"], []):
        with pytest.raises(ConfigError, match=r"--dataset_weights must be numbers above 0"):
            resolve(["--dataset_weights", *wrong])


def test_shipped_config_agrees_with_the_built_in_defaults() -> None:
    for stage, values in STAGE_DEFAULTS.items():
        options = resolve(["--stage", str(stage)]).options
        for name, value in values.items():
            assert getattr(options, name) == value
        assert options.model_name_or_path == FIELDS["model_name_or_path"].default
        assert options.max_seq_length == FIELDS["max_seq_length"].default


def test_old_names_work_with_a_warning() -> None:
    resolved = resolve(["--output_dir", "/data/runs/my_run", "--stage1_max_seq_len", "512"])
    options = resolved.options
    assert (options.base_output_dir, options.experiment_name, options.max_seq_length) == ("/data/runs", "my_run", 512)
    assert "--base_output_dir" in resolved.warnings[0]
    assert "--max_seq_length" in resolved.warnings[1]


def test_old_name_that_contradicts_a_new_one_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        resolve(["--output_dir", "/data/runs", "--experiment_name", "mine", "--base_output_dir", "/data"])
    assert str(error.value) == (
        "--output_dir means --experiment_name runs, but --experiment_name is mine; leave --output_dir out"
    )
    assert resolve(["--output_dir", "/data/a", "--experiment_name", "a"]).options.experiment_name == "a"


def test_accumulation_with_a_global_batch_size_is_warned_to_have_no_effect() -> None:
    assert resolve(["--gradient_accumulation_steps", "4"]).warnings == []
    (warning,) = resolve(["--gradient_accumulation_steps", "4", "--global_batch_size", "32"]).warnings
    assert warning.startswith("--gradient_accumulation_steps 4 has no effect: --global_batch_size 32 sets")


def test_default_name_has_stage_and_time() -> None:
    assert resolve(["--stage", "2"]).options.experiment_name.startswith("stage2_20")


# -- mistakes ------------------------------------------------------------------------------------------


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    file = write(tmp_path / "c.json", '{"training_args": {"learning_rat": 1e-5, "save_steps": "5"}}')
    with pytest.raises(ConfigError) as error:
        resolve(["--config", file, "--stage", "3", "--max_step", "4", "--learning_rate", "abc"])
    text = str(error.value)
    for words in (
        'unknown key "training_args.learning_rat"',
        "did you mean 'learning_rate'",
        "c.json: training_args.save_steps must be a whole number, got the string",
        "--stage must be one of 1, 2; got 3",
        "unknown argument --max_step; did you mean '--max_steps'",
        '--learning_rate must be a number, got the string "abc"',
    ):
        assert words in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--learning_rate", "-1e-5"], "--learning_rate must be > 0, got -1e-05"),
        (["--learning_rate", "3"], "--learning_rate must be <= 0.1, got 3.0"),
        (["--learning_rate", "nan"], "must be a number, got nan"),
        (["--per_device_train_batch_size", "2.5"], "must be a whole number or auto, got the string"),
        (["--experiment_name", "../x"], "must stay inside --base_output_dir"),
        (["--experiment_name", "/x"], "must stay inside --base_output_dir"),
        (["--experiment_name", "a\nb"], "control character"),
        (["--lr_scheduler_type", "cosin"], "did you mean 'cosine'"),
        (["--gpu_type", "manual"], "needs the GPU numbers"),
        (["--gpu_ids", "0", "0"], "GPU 0"),
        (["--gpu_ids", "0", "--gpu_type", "A40"], "--gpu_ids and --gpu_type are both given"),
        (["--no_rope_layers", "5-2"], "reversed"),
        (["--warmup_steps", "3", "--warmup_ratio", "0.1"], "give one"),
        (["--max_steps", "3", "--num_train_epochs", "1"], "both given"),
        (["--early_stopping_threshold", "0.1"], "has no effect without --early_stopping_patience; give both or none"),
        (["--resume_from_checkpoint", "x"], "unknown argument --resume_from_checkpoint; in Flare: --resume PATH"),
        (["--bf16"], "unknown argument --bf16; in Flare: --precision bf16"),
        (["--block_size=128"], "--block_size=128; in Flare: --max_seq_length N"),
        (["--config", "nope.json"], "config not found: nope.json"),
    ],
)
def test_mistake_is_named(flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(flags)
    assert words in str(error.value)


def test_names_of_other_tools_are_recognized_in_a_file_and_are_not_options(tmp_path: Path) -> None:
    file = write(tmp_path / "c.json", '{"data_args": {"cutoff_len": 512}}')
    with pytest.raises(ConfigError, match=r'unknown key "data_args.cutoff_len" in c.json; in Flare: max_seq_length N'):
        resolve(["--config", file])
    assert not OTHER_TOOLS.keys() & FIELDS.keys()
    assert {ours for ours, _ in OTHER_TOOLS.values()} <= FIELDS.keys()


@pytest.mark.parametrize(
    ("general", "special", "flags", "gpus"),
    [
        ({"gpu_type": "A800"}, {"gpu_ids": [0, 1]}, [], (None, [0, 1])),
        ({"gpu_ids": [0, 1]}, {"gpu_type": "A800"}, [], ("A800", None)),
        ({}, {"gpu_ids": [0, 1]}, ["--gpu_type", "A40"], ("A40", None)),
        ({}, {"gpu_type": "A40"}, ["--gpu_ids", "3"], (None, [3])),
        ({"gpu_ids": [0, 1]}, {}, ["--gpu_type", "manual"], ("manual", [0, 1])),
    ],
)
def test_gpu_type_and_gpu_ids_replace_each_other_by_precedence(
    tmp_path: Path, general: dict, special: dict, flags: list[str], gpus: tuple
) -> None:
    file = write(tmp_path / "c.json", json.dumps({**general, "stages": {"1": special}}))
    options = resolve(["--config", file, *flags]).options
    assert (options.gpu_type, options.gpu_ids) == gpus


def test_key_in_the_wrong_section_names_the_right_one(tmp_path: Path) -> None:
    file = write(tmp_path / "c.json", '{"model_args": {"learning_rate": 1e-4}}')
    with pytest.raises(ConfigError, match='learning_rate belongs under "training_args"'):
        resolve(["--config", file])


# -- the file format -------------------------------------------------------------------------------------


def test_json_with_comments_is_accepted(tmp_path: Path) -> None:
    file = write(
        tmp_path / "c.json",
        """{
  "training_args": {
    "gpu_ids": [0, 1, 2, 3],  // manual
    "gpu_type": null          // or "A800"
  }
}""",
    )
    assert resolve(["--config", file]).options.gpu_ids == [0, 1, 2, 3]


def test_slashes_inside_strings_are_not_comments() -> None:
    assert parse_jsonc('{"a": "http://x/y", // c\n "b": 1}', "t") == {"a": "http://x/y", "b": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"lr": 1e-5,}', "c.json line 1 column"),
        ('{"lr": 1e-5,}', "trailing comma is not JSON"),
        ('{"seed": 1,\n "seed": 2}', 'key "seed" appears twice (lines 1 and 2)'),
        ('{"seed": NaN}', "NaN is not JSON"),
        ("", "is empty"),
        ("[1]", "must contain an object"),
        ('{"stages": {"3": {}}}', 'unknown key "3"'),
    ],
)
def test_bad_file_is_one_error_line_with_the_position(tmp_path: Path, text: str, words: str) -> None:
    file = write(tmp_path / "c.json", text)
    with pytest.raises(ConfigError) as error:
        resolve(["--config", file])
    assert words in str(error.value)


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(b'\xef\xbb\xbf{"seed": 5}')
    assert resolve(["--config", str(tmp_path / "c.json")]).options.seed == 5


# -- help --------------------------------------------------------------------------------------------------


def test_help_imports_no_torch_and_names_every_option() -> None:
    code = (
        "import sys, contextlib\n"
        "from train_qwen_multi_gpu import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "assert not {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in FIELDS:
        assert f"--{name}" in result.stdout


def test_every_option_can_be_set_in_json(tmp_path: Path) -> None:
    content: dict = {}
    for name, spec in FIELDS.items():
        content.setdefault(spec.section, {})[name] = spec.default
    content["training_args"] |= STAGE_DEFAULTS[1] | {"max_steps": 5}  # these do not accept null
    file = write(tmp_path / "c.json", json.dumps(content))
    resolve(["--config", file])
