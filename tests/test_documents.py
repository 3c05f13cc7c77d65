"""The documents speak of this program: every command is planned, every link leads somewhere, every flag exists."""

import argparse
import ast
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

import patch_qwen_rope
import train_qwen_multi_gpu
from docs import generate
from flare import demo
from flare.checkpoint import __main__ as checkpoint_command
from flare.config.config_file import read_jsonc, split_name
from flare.config.options import FIELDS
from flare.config.parse import build_parser as training_parser
from flare.errors import CheckpointError, EnvError
from flare.evaluation.options import build_parser as evaluation_parser
from flare.evaluation.options import settle
from flare.gpus import __main__ as gpus_command
from flare.nope.command_line import build_parser as patch_parser
from flare.nope.command_line import choose_mode
from tests.documents import FINISHED, Call, Command, Sandbox, commands_of, documents
from tests.processes import REPO, train

PAGES = documents()
COMMANDS = [command for page in PAGES for command in commands_of(page)]
EXAMPLES = sorted(REPO.glob("examples/*.json"))
HARMLESS = {"tensorboard", "hf", "pre-commit", "tail", "sbatch", "scancel", "-m pip", "-m ruff"}
"""Programs of others that the documents call; that they are called is all that is looked at."""


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("documents"))


@pytest.fixture
def planner(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> "Planner":
    return Planner(sandbox, monkeypatch, capsys)


class Planner:
    """Runs what a command called as far as it goes without a GPU, a network and hours."""

    def __init__(self, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        self.sandbox, self.monkeypatch, self.capsys = sandbox, monkeypatch, capsys
        plenty = shutil.disk_usage("/")._replace(free=10 * 2**40)
        monkeypatch.setattr("flare.run.run.shutil.disk_usage", lambda _path: plenty)
        monkeypatch.setattr("flare.run.run.read_available_ram", lambda: 512 * 2**30)

        def no_hub(name: str, _cache_dir: str | None = None) -> dict:
            raise EnvError(f"no hub for {name}")

        monkeypatch.setattr("flare.run.resolve.read_hub_config", no_hub)

    def try_command(self, command: str, server: str = "guide", **environment: str) -> list[str]:
        """Plan or run what the command calls; returns what each of our scripts printed."""
        return [self.try_call(call, server) for call in self.sandbox.run(command, server, **environment)]

    def try_call(self, call: Call, server: str) -> str:
        if call.script in HARMLESS:
            return ""
        with self.monkeypatch.context() as patch:
            environment = self.sandbox.environment(server)
            for name in ("PATH", "HF_HOME"):
                patch.setenv(name, environment[name])
            patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            for name, value in call.environment.items():
                patch.setenv(name, value)
            patch.chdir(self.sandbox.clone)
            if call.arguments[-1:] == ["--help"]:
                with pytest.raises(SystemExit, match="0"):
                    TRIALS[call.script](call.arguments)
            else:
                TRIALS[call.script](call.arguments)
        return " ".join(self.capsys.readouterr().out.split())  # a plan is as wide as the terminal


def plan_training(arguments: list[str]) -> None:
    assert train_qwen_multi_gpu.main([a for a in arguments if a != "--prepare_only"] + ["--dry_run"]) == 0


def settle_evaluation(arguments: list[str]) -> None:
    settle(evaluation_parser("").parse_args(when_trained(arguments)))


def when_trained(arguments: list[str]) -> list[str]:
    """The same of an experiment that has its results."""
    return [re.sub(r"runs/(?=my_experiment/)", f"{FINISHED}/", word) for word in arguments]


def run_patch(arguments: list[str]) -> None:
    """Patch, inspect and verify for real; what needs a fresh process or a server as far as its flags."""
    words = ["my_qwen" if word == "Qwen/Qwen2.5-3B" else word for word in when_trained(arguments)]
    mode = choose_mode(vars(patch_parser().parse_args(words)))
    if mode == "patch" and (target := Path(words[words.index("--output_dir") + 1])).exists():
        shutil.rmtree(target)
    if mode in ("patch", "inspect", "verify"):
        assert patch_qwen_rope.main(words) == 0


def list_checkpoints(arguments: list[str]) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint-N"):  # the sandbox has none
        checkpoint_command.main(arguments)


def check_pytest(arguments: list[str]) -> None:
    """``run_tests.sh`` hands on its flags; files that are named exist."""
    words = arguments[: arguments.index("-k")] if "-k" in arguments else arguments
    assert words[:4] == ["-n", "2", "--dist", "worksteal"]
    for word in words[4:]:
        assert word in ("--slow", "--faults", "--deselect") or (REPO / word.partition("::")[0]).exists()


def check_pages(arguments: list[str]) -> None:
    assert arguments == []


TRIALS = {
    "train_qwen_multi_gpu.py": plan_training,
    "evaluate_model_enhanced.py": settle_evaluation,
    "patch_qwen_rope.py": run_patch,
    "-m flare.demo": demo.parse,
    "-m flare.gpus": gpus_command.main,
    "-m flare.checkpoint": list_checkpoints,
    "-m pytest": check_pytest,
    "-m docs.generate": check_pages,
}


def is_for_shell_only(text: str) -> bool:
    """Lines that call nothing of ours and would wait, need root or a network."""
    return text.split()[0] in ("grep", "ulimit", "kill", "touch", "rm", "cp", "mkdir", "df", "apt", "nvidia-smi")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.where} {c.text[:60]}")
def test_every_command_of_the_documents_parses_and_plans(command: Command, planner: Planner) -> None:
    """By bash and our own scripts, on the guide's server without its network; benchmarks as far as their module."""
    text = command.text
    assert "<" not in text, "a placeholder is no command that can be tried"
    if match := re.search(r"-m ((?:benchmarks|tests)\.[\w.]+)", text):
        assert (REPO / f"{match[1].replace('.', '/')}.py").exists()
        return
    if is_for_shell_only(text):
        assert subprocess.run(["bash", "-n", "-c", text]).returncode == 0
        return
    nodes = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "10.0.0.1"} if "two_nodes.json" in text else {}
    planner.try_command(text, **nodes)


def test_the_two_commands_and_the_guides_lines_are_there() -> None:
    """The readers of the test above would not notice that they found nothing."""
    found = {c.text for c in COMMANDS if c.where.startswith("README.md:")}
    assert "./run_training.sh demo" in found
    assert sum("evaluate_model_enhanced.py" in text for text in found) >= 1
    migration = {c.text for c in COMMANDS if c.where.startswith("README_MIGRATION.md:")}
    assert {
        "./run_training.sh 1 A800 my_experiment",
        './run_training.sh 1 manual my_experiment "0,1,4,5"',
    } <= migration


# -- examples -----------------------------------------------------------------------------------------------------

SERVERS = {"one_24gb_gpu.json": "one_24_gib", "two_nodes.json": "node"}
TWO_NODES = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "node-a"}


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
def test_every_configuration_plans_on_the_machine_that_it_is_for(
    configuration: str, stage: int, planner: Planner
) -> None:
    file = Path(split_name(configuration)[0]).name
    if file == "demo.json":
        pytest.skip("the demo's own test runs it")
    flags = ["--experiment_name", "x", "--config", configuration, "--stage", str(stage)]
    if "gpu_examples" not in file:  # those name their GPUs
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
    """Two real steps; what is too large for a test is replaced, everything else is the file's."""
    result = train_tiny(configuration, stage, sandbox, tmp_path, "--dataset_name", sandbox.clone / "corpus.jsonl")
    assert result.returncode == 0, result.stderr


def test_the_example_for_own_text_trains_on_the_folder_that_it_names(sandbox: Sandbox, tmp_path: Path) -> None:
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
    """The sandbox with an srun that starts the task on both of two hosts."""
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


# -- links, flags, file maps ----------------------------------------------------------------------------------------

LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors_of(file), f"{page.name} links to {target}"


@cache
def anchors_of(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


OTHERS_FLAGS = {
    # torchrun, Slurm, pip, tensorboard, nvidia-smi, git, ruff, hf, pytest: not ours
    "--standalone", "--logdir", "--port", "--host", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--signal",
    "--kill-on-bad-exit", "--index-url", "--no-build-isolation", "--repo-type", "--local-dir", "--query-gpu",
    "--format", "--ipc", "--shm-size", "--durations", "--check", "--hook-type", "--signoff", "--maxfail",
    # of the tests and their scripts
    "--slow", "--faults", "--fast", "--kills",
}  # fmt: skip


@cache
def known_flags() -> set[str]:
    """Flags of our scripts, those of the modules with a command line, and those of benchmarks."""
    parsers = [training_parser(), evaluation_parser(""), patch_parser()]
    flags = {flag for parser in parsers for action in parser._actions for flag in action.option_strings}
    sources = [*REPO.glob("flare/*.py"), *REPO.glob("benchmarks/*.py"), *REPO.glob("tests/**/*.py")]
    for path in sources:
        flags |= set(re.findall(r"add_argument\(\s*\"(--\w+)\"", path.read_text(encoding="utf-8")))
    return flags | OTHERS_FLAGS


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_every_flag_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", page.read_text(encoding="utf-8")))
    assert named - known_flags() == set()


@pytest.mark.parametrize("page", ["options.md", "code.md"])
def test_generated_pages_are_up_to_date(page: str) -> None:
    wrong = f"docs/{page} is not what the code says; run: python -m docs.generate"
    assert (REPO / "docs" / page).read_text(encoding="utf-8") == generate.PAGES[page](), wrong


@pytest.mark.parametrize(
    "parser", [training_parser(), evaluation_parser(""), patch_parser()], ids=["train", "evaluate", "patch"]
)
def test_every_flag_has_a_help_text(parser: argparse.ArgumentParser) -> None:
    assert [action.dest for action in parser._actions if not action.help] == []


def flags_to_test() -> list[str]:
    parsers = [training_parser(), evaluation_parser(""), patch_parser()]
    return sorted({f for p in parsers for a in p._actions for f in a.option_strings if f not in ("-h", "--help")})


@cache
def words_of_tests() -> str:
    """All tests but this file and the table of wrong invocations, which shows only that a flag is read."""
    files = [p for p in (REPO / "tests").rglob("*.py") if p.name not in ("test_documents.py", "test_invocations.py")]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


@pytest.mark.parametrize("flag", flags_to_test())
def test_every_flag_is_used_by_a_test(flag: str) -> None:
    """As a flag, or as the option of that name."""
    used = re.search(rf"{flag}\b|[\"' (,{{]{flag[2:]}(=|\"|'|:)", words_of_tests())
    assert used, f"no test uses {flag}"


FILE_MAPS = {"README.md": "## Files", "README_MIGRATION.md": "## 二、"}
UNLISTED = {".ci/", ".gitignore"}
"""Not for people."""


@pytest.mark.parametrize(("page", "heading"), FILE_MAPS.items())
def test_file_map_names_every_file_and_no_other(page: str, heading: str) -> None:
    """Files of the root; folders with a slash behind them."""
    text = (REPO / page).read_text(encoding="utf-8")
    section = text[text.index(heading) :].split("\n## ")[0]
    named = set(re.findall(r"^(?:\| `|[├└│─ ]*)([\w./-]+)", section, re.MULTILINE)) - {"file", "---", "Flare/"}
    tracked = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no git checkout")
    files = tracked.stdout.splitlines()
    roots = {name.partition("/")[0] + ("/" if "/" in name else "") for name in files} - UNLISTED
    listed = {name for name in named if "." in name or name.endswith("/")}
    assert {name for name in roots if name not in listed} == set(), "not in the file map"
    assert {name for name in listed if not (REPO / name).exists()} == set(), "in the file map, but not there"


# -- messages -------------------------------------------------------------------------------------------------------


@cache
def strings_of_the_code() -> list[str]:
    """Every string of flare/ and of the shell scripts, with "…" where a value goes in."""
    found = [path.read_text(encoding="utf-8") for path in REPO.glob("*.sh")]
    for path in (REPO / "flare").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
    return found


def flares_messages() -> list[str]:
    """Messages that docs/troubleshooting.md quotes as Flare's: headings in its first part."""
    text = (REPO / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^### `(.+)`$", text.split("\n## Lines of others")[0], re.MULTILINE)


@pytest.mark.parametrize("message", flares_messages())
def test_quoted_messages_are_those_of_the_code(message: str) -> None:
    """Up to the values, for which a page writes … ."""
    pieces = [re.escape(piece.strip()) for piece in message.split("…") if piece.strip()]
    pattern = re.compile(".*?".join(pieces), re.DOTALL)
    assert any(pattern.search(text) for text in strings_of_the_code()), message


def test_options_page_names_every_option() -> None:
    text = generate.PAGES["options.md"]()
    assert [name for name in FIELDS if f"`--{name}`" not in text] == []
