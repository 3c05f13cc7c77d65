"""Two launches at once, and default experiment names."""

import subprocess
from pathlib import Path

import pytest

from flare.config.parse import resolve
from tests.processes import train_in_new_process
from tests.train.test_runs import metrics, start


def finish(process: subprocess.Popen) -> None:
    text = process.communicate(timeout=240)[1]
    assert process.returncode == 0, text


@pytest.mark.slow
def test_two_launches_at_once_do_not_collide(train_flags: list[str], tmp_path: Path) -> None:
    flags = [*train_flags, "--max_steps", 2, "--nproc_per_node", 2]
    processes = [start(*flags, "--experiment_name", name) for name in ("left", "right")]
    for process in processes:
        finish(process)
    for name in ("left", "right"):
        assert metrics(tmp_path / "out" / name)["stages"]["1"]["status"] == "finished"


def test_two_default_names_of_one_second_are_two_experiments(
    clean_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from flare.launch.launch import reserved_experiment_name

    resolved = resolve(["--base_output_dir", str(tmp_path)])
    name = resolved.options.experiment_name
    with reserved_experiment_name(resolved) as first, reserved_experiment_name(resolved) as second:
        assert [first.options.experiment_name, second.options.experiment_name] == [name, f"{name}_2"]
        assert second.argv[-2:] == ["--experiment_name", f"{name}_2"]  # what workers and train_command.txt get
        (tmp_path / name / "training.log").touch()
    assert [path.name for path in tmp_path.iterdir()] == [name]  # the other had nothing in it


@pytest.mark.slow
def test_run_without_a_name_is_one_experiment_of_all_ranks(train_flags: list[str], tmp_path: Path) -> None:
    at = train_flags.index("--experiment_name")
    flags = train_flags[:at] + train_flags[at + 2 :]
    result = train_in_new_process(*flags, "--max_steps", 1, "--nproc_per_node", 2)
    assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / "out").iterdir()
    assert run.name.startswith("stage1_20")
    assert f"--experiment_name {run.name}" in (run / "train_command.txt").read_text()
