"""Starting workers: the right GPU, a fabric that works, one decision for all ranks, signals, and mistakes."""

import dataclasses
import inspect
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flare.config.config_file import read_jsonc
from flare.config.options import SELECTIVE, STAGE_DEFAULTS
from flare.config.parse import resolve
from flare.distributed import process_group
from flare.errors import ConfigError, EnvError
from flare.gpus.nvidia_smi import Gpu
from flare.launch.agent import SHUTDOWN_TIMEOUT_SEC, shutdown_timeout_arguments
from flare.launch.launch import shell_command
from flare.launch.nodes import check_node_variables, rendezvous
from flare.launch.worker_environment import (
    DEVICE_VARIABLE,
    GPUS_VARIABLE,
    export_environment,
    options_from_launcher,
    worker_hardware,
)
from flare.logs import start_logging
from flare.nope.patch import patch_checkpoint
from flare.plan.plan import check_fits
from flare.plan.table import plan_lines
from flare.run.resolve import resolve_run
from flare.run.run import Hardware, Run
from flare.train.session import Session
from tests.config.test_mistakes import assert_one_line, guide_server, launch
from tests.fake_nvidia_smi import install
from tests.processes import REPO, script_environment, train_anew
from tests.train.test_runs import metrics, start, wait_for_line

GPUS = tuple(
    Gpu(index, name, f"GPU-{index:08x}", mib, 4)
    for index, (name, mib) in enumerate([("NVIDIA A800 80GB PCIe", 81920), ("NVIDIA A40", 46068)])
)


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variable that a test, or a run around it, left behind; and what the test sets is gone after it."""
    before = dict(os.environ)
    for name in [n for n in os.environ if n.startswith(("FLARE_", "MASTER_", "NNODES", "NODE_RANK", "GLOO_"))]:
        del os.environ[name]
    yield monkeypatch
    os.environ.clear()
    os.environ.update(before)


# -- a. every rank has the GPU of the plan ------------------------------------------------------------------------


def fake_cuda(monkeypatch: pytest.MonkeyPatch, gpus: list[tuple[str, str]]) -> list[int]:
    """torch.cuda with these (name, uuid); returns the list of devices that were bound."""
    bound: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: bound.append(device))
    properties = [SimpleNamespace(name=name, uuid=uuid) for name, uuid in gpus]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties[device])
    return bound


def test_rank_with_the_planned_gpu_is_bound_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = fake_cuda(monkeypatch, [(c.name, c.uuid.removeprefix("GPU-")) for c in GPUS])
    monkeypatch.setenv("LOCAL_RANK", "1")
    world = process_group.start(True, 60, GPUS)
    assert (world.device, bound) == (torch.device("cuda", 1), [1])


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        ([(GPUS[1].name, "00000001"), (GPUS[0].name, "00000000")], ["GPU 0, NVIDIA A800", "got NVIDIA A40"]),
        ([(GPUS[0].name, "00000007"), (GPUS[1].name, "00000001")], ["GPU 0", "00000007"]),
        ([], ["local rank 0 has no GPU: torch sees 0"]),
    ],
    ids=["other order", "other uuid", "lost GPU"],
)
def test_rank_with_another_gpu_stops_before_it_allocates(
    monkeypatch: pytest.MonkeyPatch, gpus: list[tuple[str, str]], words: list[str]
) -> None:
    fake_cuda(monkeypatch, gpus)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(EnvError) as error:
        process_group.start(True, 60, GPUS)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(("capability", "refused"), [((7, 0), True), ((7, 5), True), ((8, 0), False), ((9, 0), False)])
def test_a_gpu_without_bf16_stops_a_run_that_needs_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], refused: bool
) -> None:
    """Whatever its name: torch's compute capability is the judge."""
    fake_cuda(monkeypatch, [("NVIDIA X", "0")])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    process_group.bind_gpu(0, (), needs_bf16=False)
    if not refused:
        process_group.bind_gpu(0, (), needs_bf16=True)
        return
    with pytest.raises(EnvError, match=rf"NVIDIA X has no bf16 .*{capability[0]}\.{capability[1]}.*--precision fp16"):
        process_group.bind_gpu(0, (), needs_bf16=True)


def run_of(hardware: Hardware, base: Path, tmp_path: Path, *flags: object) -> Run:
    defaults = ["--model_name_or_path", base, "--base_output_dir", tmp_path / "out", "--max_seq_length", 64]
    return resolve_run(resolve([str(word) for word in [*defaults, *flags]]), hardware)


def test_workers_are_told_the_gpus_and_what_auto_became(
    clean_environment: pytest.MonkeyPatch, base: Path, tmp_path: Path
) -> None:
    flags = ["--per_device_train_batch_size", "auto", "--gradient_accumulation_steps", 4]
    run = run_of(Hardware(True, 2, GPUS), base, tmp_path, *flags)
    export_environment(run, None)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    os.environ["WORLD_SIZE"] = "2"
    typed = resolve([str(flag) for flag in flags])
    worker = options_from_launcher(typed)
    assert worker_hardware(worker.options) == run.hardware
    assert (worker.options.per_device_train_batch_size, worker.options.global_batch_size) == (12, 24)
    assert worker.options.gradient_checkpointing is False
    assert worker.sources["per_device_train_batch_size"] == "command line, resolved"
    assert typed.options.per_device_train_batch_size == "auto"


def test_the_theta_of_a_nope_model_goes_on(base: Path, tmp_path: Path) -> None:
    patch_checkpoint(base, tmp_path / "patched", [1], rope_theta=4321.0)
    one, file = Hardware(False, 1), tmp_path / "c.json"
    run = run_of(one, tmp_path / "patched", tmp_path, "--rope_theta", 4321)
    assert resolve_run(run.resolved, one).identity()["rope_theta"] == 4321  # resolved twice, as every start is
    file.write_text('{"rope_theta": 5000}')
    run = run_of(one, tmp_path / "patched", tmp_path, "--config", file)
    assert (run.options.rope_theta, run.resolved.sources["rope_theta"]) == (4321, "c.json, resolved")
    with pytest.raises(ConfigError, match=r"--rope_theta 5000 contradicts .*patched, whose rope_theta is 4321"):
        run_of(one, tmp_path / "patched", tmp_path, "--rope_theta", 5000)


def test_the_log_of_a_start_names_the_gpus_and_the_plan(
    clean_environment: pytest.MonkeyPatch, base: Path, tmp_path: Path
) -> None:
    run = run_of(Hardware(True, 2, GPUS), base, tmp_path)
    rows = SimpleNamespace(describe=lambda: "rows")
    corpus = SimpleNamespace(meta={"end_of_text": "<end>", "end_of_text_id": 0}, fingerprint="f", facts={})
    start_logging(0, 2, tmp_path / "training.log")
    Session(run, process_group.World(0, 0, 2, torch.device("cpu")), corpus, rows, rows)._log_start()
    start_logging()
    lines = (tmp_path / "training.log").read_text().splitlines()
    assert lines[0].endswith("GPU 0: NVIDIA A800 80GB PCIe, memory 80.0 GiB, free 80.0 GiB, GPU-00000000")
    assert lines[1].endswith("GPU 1: NVIDIA A40, memory 45.0 GiB, free 45.0 GiB, GPU-00000001")
    assert any("memory/GPU" in line for line in lines)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dry_run_under_torchrun_starts_nothing(train_flags: list[str], tmp_path: Path, rank: int) -> None:
    environment = script_environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29501")
    flags = [*train_flags, "--stage1_max_seq_len", 32, "--dry_run"]
    result = train_anew(*flags, env=environment, timeout=60)
    assert result.returncode == 0, result.stderr
    assert ("2 processes" in result.stdout) == (rank == 0)
    assert ("warning: --stage1_max_seq_len is an old name" in result.stderr) == (rank == 0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--dry_run"], ["--dry_run", "true"], ["--dry_run=true"]])
def test_the_command_of_a_dry_run_trains(base: Path, tmp_path: Path, words: list[str]) -> None:
    run = run_of(Hardware(False, 1), base, tmp_path, *words, "--experiment_name", "true")
    command = shlex.split(shell_command(Path("train.py"), run, None))
    assert "--dry_run" not in " ".join(command)
    assert command[-2:] == ["--experiment_name", "true"]
    assert resolve(command[command.index("train.py") + 1 :]).options.dry_run is False


def test_a_worker_of_a_cpu_run_sees_no_gpu(clean_environment: pytest.MonkeyPatch) -> None:
    os.environ |= {DEVICE_VARIABLE: "cpu", GPUS_VARIABLE: "[]", "WORLD_SIZE": "3"}
    assert worker_hardware(resolve([]).options) == Hardware(False, 3)


# -- b. the fabric -------------------------------------------------------------------------------------------------

FABRIC_RANK = """
import os, sys, time
import torch
import torch.distributed as dist
from flare.distributed import process_group
from flare.errors import run_script
if os.environ["RANK"] == os.environ.get("ABSENT"):
    dist.all_reduce = lambda *a, **k: time.sleep(60)
if os.environ["RANK"] == os.environ.get("WRONG"):
    true = dist.all_reduce
    dist.all_reduce = lambda values, **k: true(values.mul_(2), **k)
def main():
    world = process_group.start(False, 60, (), float(sys.argv[1]))
    assert process_group.all_reduce_sum(torch.tensor([world.rank + 1.0])).tolist() == [3.0]
    process_group.check_same_settings(world, {"--seed": int(os.environ.get("SEED", 0)) * world.rank})
    process_group.stop()
    return 0
sys.exit(run_script(main))
"""


def two_ranks(limit_sec: float, **environment: str) -> list[subprocess.CompletedProcess]:
    """Two real gloo processes through the start of a run; their ends, by rank."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", **environment}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FABRIC_RANK, str(limit_sec)], cwd=REPO, text=True, stderr=subprocess.PIPE,
            env=script_environment(RANK=str(rank), LOCAL_RANK=str(rank), **variables),
        )
        for rank in range(2)
    ]  # fmt: skip
    ended = [(rank.communicate(timeout=60)[1], rank.returncode) for rank in ranks]
    return [subprocess.CompletedProcess([], code, "", text) for text, code in ended]


def test_fabric_that_works_lets_the_run_start() -> None:
    assert [rank.returncode for rank in two_ranks(20)] == [0, 0]


def test_rank_that_never_joins_the_trial_is_named_within_the_limit() -> None:
    t0 = time.monotonic()
    first = two_ranks(3, ABSENT="1")[0]
    assert time.monotonic() - t0 < 30
    assert first.returncode == 4
    error = next(line for line in first.stderr.splitlines() if line.startswith("error: "))
    assert "the first all-reduce of 2 processes" in error
    assert f"look at rank 1 ({os.uname().nodename}), which did not join" in error
    assert "Traceback" not in first.stderr


def test_damaged_sum_is_an_error() -> None:
    for rank in two_ranks(20, WRONG="1"):
        assert rank.returncode == 4
        assert "the sum is {5.0} instead of 3: data is damaged on its way" in rank.stderr


def test_nccl_failure_names_the_usual_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    from flare.distributed import preflight

    monkeypatch.setattr(preflight.atexit, "register", lambda *_: None)
    monkeypatch.setattr(preflight, "_all_reduce", lambda *_: time.sleep(5))
    with pytest.raises(EnvError) as error:
        preflight.run_preflight_check(torch.distributed.HashStore(), 0, 2, torch.device("cuda", 0), 0.2)
    assert "did not end within 0.2 s" in str(error.value)
    assert "NCCL_P2P_DISABLE=1" in str(error.value)


def test_ranks_with_other_settings_are_refused_with_both_values() -> None:
    for rank in two_ranks(20, SEED="7"):
        assert_one_line(rank, 2, "ranks differ in --seed: 0 on rank 0", "7 on rank 1")


# -- c. micro-batch auto -------------------------------------------------------------------------------------------


def gpus(*mib: int) -> Hardware:
    gpus = tuple(Gpu(i, "NVIDIA Test", f"GPU-{i}", size, 4) for i, size in enumerate(mib))
    return Hardware(True, len(mib), gpus)


AUTO = ("--per_device_train_batch_size", "auto")


def test_auto_takes_the_largest_divisor_that_fits_the_smallest_gpu(base: Path, tmp_path: Path) -> None:
    flags = [*AUTO, "--global_batch_size", 240, "--max_seq_length", 512, "--gradient_checkpointing", "false"]
    roomy = run_of(gpus(80_000, 80_000), base, tmp_path, *flags)
    assert (roomy.micro_batch_size, roomy.global_batch_size) == (120, 240)
    tight = run_of(gpus(80_000, 900), base, tmp_path, *flags)
    micro = tight.micro_batch_size
    assert 1 < micro < 120
    assert 120 % micro == 0
    assert tight.plan().fits
    assert tight.plan().inputs.accumulation == 120 // micro
    larger = next(n for n in range(micro + 1, 121) if 120 % n == 0)
    assert tight.with_layout(larger, False, "ddp").plan().fits is False


def test_auto_shards_what_does_not_fit_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2.5-7B in stage 2 needs 118 GB a GPU with DDP; three billion fit on an A800 whole, on four A40 sharded."""

    def not_reached(*_: object) -> dict:
        raise EnvError("no hub here")

    monkeypatch.setattr("flare.run.resolve.read_hub_config", not_reached)
    flags = ["--stage", 2, "--dry_run"]

    def chosen(model: str, mib: int, count: int, *more: object) -> Run:
        return run_of(gpus(*[mib] * count), Path(f"Qwen/Qwen2.5-{model}"), tmp_path, *flags, *more)

    assert [chosen(model, 81_920, 4).parallel for model in ("1.5B", "3B", "7B")] == ["ddp", "ddp", "fsdp"]
    assert chosen("3B", 46_068, 4).parallel == "fsdp"
    assert chosen("3B", 46_068, 1).parallel == "ddp"
    sharded = chosen("7B", 81_920, 4).plan()
    assert sharded.fits and "FSDP2 over 4 processes" in "\n".join(plan_lines(sharded))
    with pytest.raises(ConfigError, match="--parallel fsdp"):
        check_fits(chosen("7B", 81_920, 4, "--parallel", "ddp").plan())


def test_auto_without_a_global_batch_keeps_the_rows_of_the_default(base: Path, tmp_path: Path) -> None:
    for stage, values in STAGE_DEFAULTS.items():
        flags = ["--stage", stage, "--gradient_accumulation_steps", 4]
        given = run_of(gpus(80_000), base, tmp_path, *flags, "--config", empty(tmp_path))
        auto = run_of(gpus(80_000), base, tmp_path, *flags, *AUTO)
        assert given.global_batch_size == auto.global_batch_size == 4 * values["per_device_train_batch_size"]
        assert auto.micro_batch_size == auto.global_batch_size


def empty(tmp_path: Path) -> Path:
    path = tmp_path / "empty.json"
    path.write_text("{}")
    return path


def test_auto_on_gpus_that_do_not_tell_their_memory_is_the_default(base: Path, tmp_path: Path) -> None:
    hardware = Hardware(True, 1, (Gpu(0, "NVIDIA GB10", "GPU-0", None, None),))
    run = run_of(hardware, base, tmp_path, *AUTO, "--gradient_accumulation_steps", 4)
    assert (run.micro_batch_size, run.global_batch_size) == (3, 12)


def test_auto_prefers_a_smaller_micro_batch_to_checkpointing(base: Path, tmp_path: Path) -> None:
    flags = [*AUTO, "--global_batch_size", 240, "--max_seq_length", 512]
    run = run_of(gpus(900), base, tmp_path, *flags, "--gradient_checkpointing", "auto")
    assert not run.gradient_checkpointing
    assert run.micro_batch_size > 1


def test_auto_takes_the_least_checkpointing_that_fits(base: Path, tmp_path: Path) -> None:
    """Smaller and smaller GPUs: none, selective, everything; whatever the flag says, the same rows a step."""
    flags = ["--global_batch_size", 16, "--per_device_train_batch_size", 16, "--max_seq_length", 512]
    found = [
        run_of(gpus(mib), base, tmp_path, *flags, "--gradient_checkpointing", "auto").gradient_checkpointing
        for mib in range(1000, 700, -1)
    ]
    assert list(dict.fromkeys(found)) == [False, SELECTIVE, True]
    given = run_of(gpus(1000), base, tmp_path, *flags, "--gradient_checkpointing", SELECTIVE)
    assert given.gradient_checkpointing == SELECTIVE
    with pytest.raises(ConfigError, match='must be true or false or selective or auto, got the string "some"'):
        run_of(gpus(1000), base, tmp_path, *flags, "--gradient_checkpointing", "some")


def test_global_batch_that_processes_cannot_share_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--global_batch_size 7 is not divisible by 2 processes; nearest: 6, 8"):
        run_of(gpus(80_000, 80_000), base, tmp_path, *AUTO, "--global_batch_size", 7)


@pytest.mark.slow
def test_auto_trains_as_the_same_rows_given(train_flags: list[str], tmp_path: Path) -> None:
    """On two processes, where both must come to the same number; and the records have that number."""
    flags = [*train_flags, "--max_steps", 2, "--nproc_per_node", 2, "--global_batch_size", 8]
    result = train_anew(*flags, *AUTO)
    assert result.returncode == 0, result.stderr
    given = train_anew(*flags, "--per_device_train_batch_size", 4, "--experiment_name", "given")
    assert given.returncode == 0, given.stderr
    first, second = (metrics(tmp_path / "out" / name)["stages"]["1"] for name in ("run", "given"))
    assert first["settings"]["per_device_train_batch_size"] == 4
    auto_losses, given_losses = ([r["loss"] for r in b["history"] if "loss" in r] for b in (first, second))
    assert len(auto_losses) == 2
    assert auto_losses == given_losses


def test_auto_that_fits_nowhere_is_refused_with_numbers(tmp_path: Path) -> None:
    result = dry_run(
        tmp_path, "--stage", 2, "--gpu_ids", 4, "--model_name_or_path", "Qwen/Qwen2.5-7B", *AUTO,
        "--experiment_name", "x",
    )  # fmt: skip
    assert_one_line_after_gpus(result, 2, "stage 2 of Qwen/Qwen2.5-7B does not fit on 1 x NVIDIA A40", "GiB")


def dry_run(tmp_path: Path, *flags: object) -> subprocess.CompletedProcess:
    """The Python script's plan on the guide's server, without its network."""
    environment = script_environment(
        FLARE_OUTPUT_DIR=str(tmp_path / "out"), HF_HOME=str(tmp_path / "hf"), **guide_server(tmp_path)
    )
    return train_anew(*flags, "--dry_run", env=environment)


def assert_one_line_after_gpus(result: subprocess.CompletedProcess, code: int, *words: str) -> None:
    """As assert_one_line; lines that only describe the chosen GPUs may stand before it."""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("GPU ")]
    assert_one_line(subprocess.CompletedProcess([], result.returncode, "", "\n".join(lines)), code, *words)


# -- d. named configurations ---------------------------------------------------------------------------------------

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
def test_block_that_is_not_there_lists_the_names(name: str, words: list[str]) -> None:
    assert_one_line(train_anew("--config", f"{EXAMPLES}{name}"), 2, *words)


def test_a_file_of_one_configuration_has_no_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="contains one configuration without a name; leave #x out"):
        resolve(["--config", f"{empty(tmp_path)}#x"])


def test_errors_in_a_block_say_which(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"a": {"seed": 1}, "b": {"training_args": {"learning_rat": 1}}}')
    assert resolve(["--config", f"{path}#a"]).options.seed == 1
    with pytest.raises(ConfigError, match=r'unknown key "training_args\.learning_rat" in c\.json#b'):
        resolve(["--config", f"{path}#b"])


def test_a_file_with_a_hash_in_its_name_is_read(tmp_path: Path) -> None:
    (tmp_path / "run#2.json").write_text('{"seed": 9}')
    assert resolve(["--config", str(tmp_path / "run#2.json")]).options.seed == 9


# -- e. several hosts, as far as one host shows it (the rest: test_hosts.py) ---------------------------------------


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"NNODES": "2"}, "NNODES=2 needs NODE_RANK and MASTER_ADDR"),
        ({"NNODES": "1:4"}, "NNODES='1:4' in the environment must be a number"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK='2' in the environment must be a number"),
        ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, "MASTER_PORT='x'"),
        ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"}, "needs --experiment_name"),
    ],
)
def test_hosts_variables_that_are_wrong_are_named(
    clean_environment: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    os.environ |= variables
    with pytest.raises(ConfigError) as error:
        check_node_variables(name_was_given=False)
    assert words in str(error.value)


def test_torchruns_variables_go_to_the_rendezvous(clean_environment: pytest.MonkeyPatch) -> None:
    assert rendezvous()["rdzv_endpoint"] == "localhost:0"
    os.environ |= {"NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"}
    several = rendezvous()
    assert (several["min_nodes"], several["max_nodes"], several["rdzv_backend"]) == (4, 4, "static")
    assert several["rdzv_endpoint"] == "10.0.0.7:1234"
    assert several["rdzv_configs"] == {"rank": 3}


def test_host_that_does_not_resolve_trains_all_the_same(train_flags: list[str]) -> None:
    """A container's or laptop's name is often known to nobody."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("needs root and unshare --uts")
    flags = [*train_flags, "--max_steps", "1", "--nproc_per_node", "2"]
    command = [sys.executable, str(REPO / "train_qwen_multi_gpu.py"), *flags]
    renamed = 'echo no.such.host.invalid > /proc/sys/kernel/hostname && exec "$@"'
    result = subprocess.run(
        ["unshare", "--uts", "sh", "-c", renamed, "sh", *command],
        capture_output=True, text=True, env=script_environment(), timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "finished stage 1" in result.stderr


# -- f. signals, and two launches at once --------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_first_interrupt_stops_with_a_checkpoint(train_flags: list[str], tmp_path: Path) -> None:
    flags = [*train_flags, "--max_steps", 4000, "--eval_steps", 4000, "--save_steps", 4000, "--nproc_per_node", 2]
    process = start(*flags)
    wait_for_line(process, "step 3/4000")
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 0, rest
    assert rest.count("Ctrl-C: the run stops after this step, with a checkpoint; a second Ctrl-C stops it at once") == 1
    run = tmp_path / "out" / "run"
    assert metrics(run)["stages"]["1"]["status"] == "stopped"
    assert len(list((run / "checkpoints").iterdir())) == 1


def test_second_interrupt_ends_launcher_and_workers_at_once(train_flags: list[str], tmp_path: Path) -> None:
    process = start(*train_flags, "--max_steps", 4000, "--eval_steps", 4000, "--nproc_per_node", 2)
    wait_for_line(process, "step 3/4000")
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGSTOP)  # a worker that hangs: the first interrupt cannot end it
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    process.stderr.read()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers):
        assert time.monotonic() < deadline, "a worker is still there"
        time.sleep(0.1)


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


def test_run_without_a_name_is_one_experiment_of_all_ranks(train_flags: list[str], tmp_path: Path) -> None:
    at = train_flags.index("--experiment_name")
    flags = train_flags[:at] + train_flags[at + 2 :]
    result = train_anew(*flags, "--max_steps", 1, "--nproc_per_node", 2)
    assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / "out").iterdir()
    assert run.name.startswith("stage1_20")
    assert f"--experiment_name {run.name}" in (run / "train_command.txt").read_text()


# -- g. the rest of what shows it ----------------------------------------------------------------------------------


def server(tmp_path: Path, mode: str) -> dict[str, str]:
    """Variables of a server whose nvidia-smi behaves as ``mode``, with no limit on its GPUs."""
    fake = install(tmp_path / "bin", mode)
    return {"PATH": fake.environment()["PATH"], "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}


PLAN = ("--max_seq_length", 64, "--dry_run")


def test_busy_gpus_are_skipped_and_named_in_the_dry_run(tmp_path: Path, base: Path) -> None:
    flags = ["--model_name_or_path", base, "--base_output_dir", tmp_path / "out", *PLAN]
    variables = server(tmp_path, "guide_busy")
    result = launch("1", "auto", "x", *flags, **variables)
    assert result.returncode == 0, result.stderr
    assert "CUDA_VISIBLE_DEVICES=1,2,3,4,6,7 torchrun --standalone --nproc_per_node=6" in result.stdout
    for gpu in ("GPU 0 skipped: NVIDIA A800 80GB PCIe, busy", "GPU 5 skipped: NVIDIA A40, busy"):
        assert gpu in result.stderr
    assert "--allow_busy_gpus takes it" in result.stderr
    taken = launch("1", "auto", "x", *flags, "--allow_busy_gpus", **variables)
    assert "CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 torchrun" in taken.stdout


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("exit9", ["nvidia-smi failed (exit code 9)", "couldn't communicate with the NVIDIA driver"]),
        pytest.param("hang", ["nvidia-smi hangs: no answer in 10 s"], marks=pytest.mark.slow),
        ("gbk", ["did not print a list of GPUs"]),
        ("empty", ["printed nothing"]),
        ("rubbish", ["did not print a list of GPUs"]),
    ],
)
def test_nvidia_smi_that_fails_is_one_line_in_time(tmp_path: Path, base: Path, mode: str, words: list[str]) -> None:
    variables = server(tmp_path, mode)
    t0 = time.monotonic()
    result = launch(
        "1", "A800", "x", "--model_name_or_path", base, "--base_output_dir", tmp_path / "out", *PLAN, **variables
    )
    assert time.monotonic() - t0 < (14 if mode == "hang" else 12)  # the last is ours, and the shell's own start
    assert_one_line(result, 4, *words)


def test_nvidia_smi_that_is_missing_is_one_line(tmp_path: Path, base: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "date", "env"):
        (tools / tool).symlink_to(shutil.which(tool))
    result = launch("1", "A800", "x", "--model_name_or_path", base, "--base_output_dir", tmp_path / "out", *PLAN,
                    PATH=str(tools))  # fmt: skip
    assert_one_line(result, 4, "nvidia-smi not found on PATH", "./run_training.sh STAGE cpu")


def test_gpus_that_do_not_tell_their_memory_are_taken(tmp_path: Path, base: Path) -> None:
    flags = ["--model_name_or_path", base, "--base_output_dir", tmp_path / "out", *PLAN]
    result = launch("1", "auto", "x", *flags, **server(tmp_path, "not_available"))
    assert result.returncode == 0, result.stderr
    assert "CUDA_VISIBLE_DEVICES=0,1,2 torchrun" in result.stdout


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ("9", ["GPU 9 does not exist", "0-3 NVIDIA A800 80GB PCIe, 4-7 NVIDIA A40"]),
        ("-1", ['got "-1"']),
        ("0,0", ["GPU 0 listed twice"]),
        ("a", ['got "a"']),
        ("", ["--gpu_ids is empty"]),
    ],
)
@pytest.mark.parametrize("script", ["run_training.sh", "python"])
def test_bad_gpu_numbers_are_one_line(tmp_path: Path, script: str, ids: str, words: list[str]) -> None:
    variables = server(tmp_path, "guide")
    if script == "python":
        environment = script_environment(**variables)
        result = train_anew("--gpu_ids", ids, env=environment)
    else:
        result = launch("1", "manual", "x", ids, **variables)
    assert_one_line(result, 2, *words)


def test_seven_billion_parameters_do_not_fit_one_a40_and_what_would_is_named(tmp_path: Path) -> None:
    result = dry_run(tmp_path, "--stage", 2, "--gpu_ids", 4, "--model_name_or_path", "Qwen/Qwen2.5-7B")
    assert_one_line_after_gpus(result, 2, "does not fit on 1 x NVIDIA A40", "what would", "--train_layers nope")


def test_workers_are_granted_their_last_checkpoint_on_a_torch_that_takes_no_such_argument(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch 2.11: LaunchConfig has no shutdown_timeout, and the agent closes its workers with the method's default."""
    from torch.distributed.elastic.multiprocessing.api import PContext
    from torch.distributed.launcher.api import LaunchConfig

    @dataclasses.dataclass
    class OldLaunchConfig:
        nproc_per_node: int

    monkeypatch.setattr(PContext.close, "__defaults__", (None, 30))
    expected = {} if "shutdown_timeout" not in LaunchConfig.__dataclass_fields__ else {"shutdown_timeout": 600}
    assert shutdown_timeout_arguments(LaunchConfig) == expected
    assert shutdown_timeout_arguments(OldLaunchConfig) == {}
    assert inspect.signature(PContext.close).parameters["timeout"].default == SHUTDOWN_TIMEOUT_SEC
