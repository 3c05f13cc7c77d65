"""Every shipped configuration plans and trains; the Slurm example starts the stages in order."""

import json
import re
from pathlib import Path

import pytest

from flare.config.config_file import read_jsonc, split_name
from tests.documents import Sandbox
from tests.documents_planner import Planner
from tests.processes import REPO, train

EXAMPLES = sorted(REPO.glob("examples/*.json"))
SERVERS = {"one_24gb_gpu.json": "one_24_gib", "two_nodes.json": "node"}
TWO_NODES = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "node-a"}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("documents"))


@pytest.fixture
def planner(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Planner:
    return Planner(sandbox, monkeypatch, capsys)


def configurations() -> list[str]:
    """FILE or FILE#NAME of every shipped configuration."""
    found = []
    for path in [*EXAMPLES, REPO / "training_config.json", REPO / "training_config_gpu_examples.json"]:
        content, name = read_jsonc(path), str(path.relative_to(REPO))
        blocks = all(
            isinstance(v, dict) and not key.endswith("_args") and key != "stages" for key, v in content.items()
        )
        found += [f"{name}#{block}" for block in content] if blocks else [name]
    return found


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("configuration", configurations())
def test_every_configuration_plans_on_its_machine(configuration: str, stage: int, planner: Planner) -> None:
    file = Path(split_name(configuration)[0]).name
    if file == "demo.json":
        pytest.skip("the demo's own test runs it")
    flags = ["--experiment_name", "x", "--config", configuration, "--stage", str(stage)]
    if "gpu_examples" not in file:  # these choose their GPUs
        flags += ["--gpu_type", "auto" if file in SERVERS else "A800"]
    environment = TWO_NODES if file == "two_nodes.json" else {}
    (out,) = planner.try_command(
        f"python train_qwen_multi_gpu.py {' '.join(flags)}", SERVERS.get(file, "guide"), **environment
    )
    assert re.search(r"fits,\s", out)
    assert "TOO LITTLE" not in out


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("configuration", [c for c in configurations() if "demo" not in c])
def test_every_configuration_trains_a_tiny_model(
    configuration: str, stage: int, sandbox: Sandbox, tmp_path: Path
) -> None:
    """Two real steps. Only what is too large for a test is replaced."""
    result = train_tiny(configuration, stage, sandbox, tmp_path, "--dataset_name", sandbox.clone / "corpus.jsonl")
    assert result.returncode == 0, result.stderr


def test_own_jsonl_example_trains_on_its_folder(sandbox: Sandbox, tmp_path: Path) -> None:
    result = train_tiny("examples/own_jsonl.json", 1, sandbox, tmp_path)
    assert result.returncode == 0, result.stderr
    history = json.loads((tmp_path / "x" / "training_metrics.json").read_text())["stages"]["1"]
    assert history["status"] == "finished"


def train_tiny(configuration: str, stage: int, sandbox: Sandbox, out: Path, *more: object):
    return train(
        "--config", REPO / configuration, "--stage", stage, "--gpu_type", "cpu", "--experiment_name", "x",
        "--base_output_dir", out, "--model_name_or_path", sandbox.clone / "my_qwen", "--max_seq_length", 32,
        "--global_batch_size", 2, "--per_device_train_batch_size", 1, "--max_steps", 2, "--cache_dir", out / "cache",
        "--eval_context_lengths", "16,24", "--validation_split_percentage", 10, *more, cwd=sandbox.clone,
    )  # fmt: skip


SLURM_JOB = {
    "SLURM_NNODES": "2", "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_SUBMIT_DIR": ".",
    "FLARE_OUTPUT_DIR": "/shared/runs",
}  # fmt: skip


@pytest.fixture
def slurm(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sandbox:
    """The sandbox with an srun that starts the task on two hosts."""
    commands = {
        "srun": 'shift\nfor id in 0 1; do SLURM_NODEID=$id "$@" || exit; done',
        "scontrol": "printf 'node-a\\nnode-b\\n'",
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    plain = sandbox.environment

    def environment(server: str, **more: str) -> dict[str, str]:
        variables = plain(server, **more)
        return variables | {"PATH": f"{tmp_path}:{variables['PATH']}"}

    monkeypatch.setattr(sandbox, "environment", environment)
    return sandbox


@pytest.mark.parametrize(
    ("there", "stages"),
    [
        ([], ["1", "1"]),  # stage 1 was stopped: no final_model, so stage 2 waits for the next submission
        (["final_model"], ["1", "1", "2", "2"]),
        (["stage1", "final_model"], ["2", "2"]),
    ],
)
def test_slurm_file_starts_each_stage_on_both_hosts(
    there: list[str], stages: list[str], slurm: Sandbox, tmp_path: Path, planner: Planner
) -> None:
    for name in there:
        (tmp_path / "out" / "two_nodes" / name).mkdir(parents=True)
    job = SLURM_JOB | {"FLARE_OUTPUT_DIR": str(tmp_path / "out")}
    calls = slurm.run("bash examples/slurm_two_nodes.sh", "node", **job)
    assert [call.arguments[call.arguments.index("--stage") + 1] for call in calls] == stages
    assert [call.environment["NODE_RANK"] for call in calls] == ["0", "1"] * (len(stages) // 2)
    assert {(c.environment["MASTER_ADDR"], c.environment["MASTER_PORT"]) for c in calls} == {("node-a", "24711")}
    assert re.search(r"fits,\s", planner.try_call(calls[0], "node"))
