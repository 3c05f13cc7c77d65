"""Wrong invocations: each is one line that names what was typed and how to fix it. Nothing is written.

The list is that of the project's fault page, with our flags. GPUs are in tests/gpus and
tests/launch/test_gpu_selection.py, models in test_inputs.py, running and finished experiments in test_runs.py.
"""

import os
from pathlib import Path

import pytest

from tests.fake_nvidia_smi import install
from tests.processes import Zygote

FILES = {
    "comma.json": '{"training_args": {"learning_rate": 1e-5,}}',
    "unknown.json": '{"training_args": {"learning_rat": 1e-5}}',
    "string.json": '{"training_args": {"learning_rate": "1e-5"}}',
    "twice.json": '{"training_args": {"save_steps": 5,\n "save_steps": 6}}',
    "nan.json": '{"training_args": {"weight_decay": NaN}}',
    "infinite.json": '{"training_args": {"weight_decay": 1e999}}',
    "null.json": '{"training_args": {"learning_rate": null}}',
    "stages.json": '{"stages": {"1": {},\n "1": {}}}',
    "no_stages.json": '{"stages": []}',
    "stage.json": '{"stages": {"1": {"stage": 2}}}',
    "surrogate.json": '{"cache_dir": "\\ud800"}',
    "deep.json": "[" * 100_000,
    "empty.json": "",
    "list.json": "[1]",
    "empty.jsonl": "",
    "short.jsonl": '{"text": "one two"}\n{"text": "three"}\n',
    "bad.jsonl": b'{"text": "one two"}\n{"text": "\xff"}\n',
}
CASES: list[tuple[str, int, str]] = [
    ("--config", 2, "argument --config: expected one argument; see train_qwen_multi_gpu.py --help"),
    ("--config nope.json", 2, "config not found: nope.json (looked in "),
    ("--config .", 2, "config is a directory: .; give a .json file"),
    ("--config comma.json", 2, "comma.json line 1 column 42: trailing comma is not JSON"),
    ("--config unknown.json", 2, 'unknown key "training_args.learning_rat" in unknown.json; did you mean '),
    ("--config string.json", 2, 'training_args.learning_rate must be a number, got the string "1e-5"'),
    ("--config twice.json", 2, 'twice.json: key "save_steps" appears twice (lines 1 and 2)'),
    ("--config nan.json", 2, "nan.json: NaN is not JSON; give a number"),
    ("--config infinite.json", 2, "infinite.json: training_args.weight_decay must be a number, got inf"),
    ("--config null.json", 2, "null.json: training_args.learning_rate must be a number, got null"),
    ("--config stages.json", 2, 'stages.json: key "1" appears twice (lines 1 and 2)'),
    ("--config no_stages.json", 2, 'stages in no_stages.json must be an object {"1": {...}, "2": {...}}'),
    ("--config stage.json", 2, "stage in stage.json: stages.1 repeats it; leave it out there"),
    ("--config surrogate.json", 2, "surrogate.json: cache_dir contains a character that is not valid text, got "),
    ("--config deep.json", 2, "deep.json cannot be read: maximum recursion depth exceeded"),
    ("--config empty.json", 2, "empty.json is empty; write at least {}"),
    ("--config list.json", 2, "list.json must contain an object {...}, got list"),
    ("--learning_rate 3", 2, "--learning_rate must be <= 0.1, got 3.0"),
    ("--learning_rate=-1e-5", 2, "--learning_rate must be > 0, got -1e-05"),
    ("--num_train_epochs 0", 2, "--num_train_epochs must be > 0, got 0.0"),
    ("--max_steps 0", 2, "--max_steps must be >= 1, got 0"),
    ("--per_device_train_batch_size 2.5", 2, "--per_device_train_batch_size must be a whole number or auto"),
    ("--global_batch_size 7", 2, "1 process x --per_device_train_batch_size 2; nearest: 6, 8"),
    ("--learnin_rate 1e-5", 2, "unknown argument --learnin_rate; did you mean '--learning_rate'?"),
    ("--stage 3", 2, "--stage must be one of 1, 2; got 3"),
    ("--lr_scheduler_type cosin", 2, "got 'cosin'; did you mean 'cosine'?"),
    ("--warmup_ratio 1.5", 2, "--warmup_ratio must be <= 1, got 1.5"),
    ("--adam_beta1 1", 2, "--adam_beta1 must be < 1, got 1.0"),
    ("--balance 1,2,3", 2, "--balance 1,2,3 has 3 weights for 1 process"),
    ("--attn_implementation varlen", 2, "varlen runs on GPUs in bf16 only; use --attn_implementation sdpa"),
    ("--model_name_or_path Qwen/typo", 4, "model 'Qwen/typo' is not a directory and not complete in the hub's cache"),
    ("--model_name_or_path ./nowhere", 2, "model './nowhere' is not a directory; give a directory or a hub name"),
    ("--no_rope_layers 30", 2, "--no_rope_layers: layer 30 is out of range; the model has layers 0-3"),
    ("--no_rope_layers 5-2", 2, "--no_rope_layers: layer range 5-2 is reversed"),
    ("--no_rope_layers some", 2, "--no_rope_layers: cannot read 'some'; give indices, 20-32, every:4, auto or none"),
    ("--no_rope_layers none", 2, "stage 1: nothing to train, --no_rope_layers none leaves no NoPE layer"),
    ("--no_rope_layers 1 1", 2, "--no_rope_layers: layer 1 is named twice in '1 1'"),
    ("--train_layers none", 2, "stage 1: nothing to train, --train_layers none"),
    ("--train_layers 9", 2, "--train_layers: layer 9 is out of range; the model has layers 0-3"),
    ("--max_seq_length 999999", 2, "--max_seq_length 999999 is above the model's 512 positions"),
    ("--dataset_name x.jsonl", 2, "--dataset_name x.jsonl: no such file or directory"),
    ("--dataset_name empty.jsonl", 3, "empty.jsonl is empty (0 bytes)"),
    ("--dataset_name short.jsonl", 3, "the data gives 6 training tokens, one step needs 65; lower --max_seq_length"),
    ("--dataset_name bad.jsonl", 3, "(bad.jsonl:2 is not UTF-8 (byte 10)); limit is 0.10%, see --max_bad_rows"),
    ("--dataset_name=", 2, "--dataset_name is empty; give a value or leave it out"),
    ("--resume ./nowhere", 2, "--resume ./nowhere is not a complete checkpoint (no manifest.json)"),
    ("--text_column content", 2, "column 'content' not in "),
    ("--dataset_weights 0.5,0.5", 2, "--dataset_weights has 2 weights for 1 data set"),
    ("--base_output_dir short.jsonl", 2, "short.jsonl is a file, not a directory"),
]  # fmt: skip


@pytest.mark.parametrize(("flags_typed", "code", "words"), CASES, ids=[case[0] for case in CASES])
def test_a_wrong_invocation_ends_in_one_line(
    zygote: Zygote, flags: list[str], run: Path, tmp_path: Path, flags_typed: str, code: int, words: str
) -> None:
    place = tmp_path / "here"
    place.mkdir()
    for name, content in FILES.items():
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    ended = zygote.start(*flags, *flags_typed.split(" "), cwd=place).wait()
    assert (ended.returncode, len(ended.errors)) == (code, 1), ended.stderr
    assert words in ended.errors[0]
    assert len(ended.stderr.strip().splitlines()) == 1 or code == 3  # data is read after a line about tokenising
    assert not run.exists()


def test_more_processes_than_gpus_are_refused(zygote: Zygote, flags: list[str], tmp_path: Path) -> None:
    path = f"{install(tmp_path / 'bin', 'guide').directory}:{os.environ['PATH']}"
    flags_of_gpus = ("--gpu_type", "A40", "--nproc_per_node", 5)
    ended = zygote.run(*flags, *flags_of_gpus, PATH=path, CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7")
    assert ended.returncode == 2
    assert ended.errors == ["error: --nproc_per_node 5: 5 processes but 4 GPUs; lower --nproc_per_node"]


def test_all_mistakes_are_reported_at_once(zygote: Zygote, flags: list[str]) -> None:
    ended = zygote.run(*flags, "--learning_rate", 3, "--max_steps", 0, "--stage", 7)
    assert ended.returncode == 2
    assert "3 problems" in ended.stderr
    for words in ("--learning_rate must be", "--max_steps must be", "--stage must be"):
        assert words in ended.stderr
