"""``--config FILE#NAME``: each configuration of the GPU examples plans on the server of the guide."""

from pathlib import Path

import pytest

from flare.config.config_file import read_jsonc
from flare.config.parse import resolve
from flare.errors import ConfigError
from tests.config.test_mistakes import assert_one_line
from tests.launch.runs import dry_run, empty_config
from tests.processes import REPO, train_in_new_process

EXAMPLES = REPO / "training_config_gpu_examples.json"


BLOCKS = {
    "four_a800": "0,1,2,3",
    "four_a40": "4,5,6,7",
    "one_gpu": "0",
    "a800_and_a40": "0,1,4,5",
    "auto": "0,1,2,3,4,5,6,7",
    "side_by_side_a800": "0,1",
    "side_by_side_a40": "4,5",
}


def test_every_block_of_the_examples_is_listed_here() -> None:
    assert list(read_jsonc(EXAMPLES)) == list(BLOCKS)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_of_the_examples_plans_on_the_guides_server(tmp_path: Path, block: str, stage: int) -> None:
    result = dry_run(tmp_path, "--config", f"{EXAMPLES}#{block}", "--stage", stage)
    assert result.returncode == 0, result.stderr
    count = BLOCKS[block].count(",") + 1
    command = f"CUDA_VISIBLE_DEVICES={BLOCKS[block]} torchrun --standalone --nproc_per_node={count}"
    assert command in result.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("#", ["#NAME needs a name; names: four_a800, four_a40, one_gpu"]),
        ("#four_a80", ["has no 'four_a80'; did you mean 'four_a800'?", "side_by_side_a40"]),
        ("", ["contains several configurations; choose one with #NAME: four_a800"]),
    ],
    ids=["none", "unknown", "the whole file"],
)
def test_unknown_block_lists_the_names(name: str, words: list[str]) -> None:
    assert_one_line(train_in_new_process("--config", f"{EXAMPLES}{name}"), 2, *words)


def test_a_file_of_one_configuration_has_no_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="contains one configuration without a name; leave #x out"):
        resolve(["--config", f"{empty_config(tmp_path)}#x"])


def test_errors_in_a_block_name_the_block(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"a": {"seed": 1}, "b": {"training_args": {"learning_rat": 1}}}')
    assert resolve(["--config", f"{path}#a"]).options.seed == 1
    with pytest.raises(ConfigError, match=r'unknown key "training_args\.learning_rat" in c\.json#b'):
        resolve(["--config", f"{path}#b"])


def test_a_file_with_a_hash_in_its_name_is_read(tmp_path: Path) -> None:
    (tmp_path / "run#2.json").write_text('{"seed": 9}')
    assert resolve(["--config", str(tmp_path / "run#2.json")]).options.seed == 9
