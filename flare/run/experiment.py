"""The experiment directory: its paths, its lock, its records, and the move of stage 1's results for stage 2.

The content of a checkpoint is in ``flare.checkpoint``, and the metrics in ``flare.train.metrics``.
"""

import fcntl
import json
import os
import shlex
import shutil
import socket
import tempfile
import time
from pathlib import Path

from flare.errors import CheckpointError, ConfigError, EnvError
from flare.run.environment_info import environment_lines

STAGE_CONTENT = ("checkpoints", "final_model")


class Experiment:
    """The paths of one experiment, and operations on them. Creating the object changes no file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.checkpoints = root / "checkpoints"
        self.final_model = root / "final_model"
        self.logs = root / "logs"
        self.tensorboard = root / "tensorboard"
        self.training_log = root / "training.log"
        self.metrics_file = root / "training_metrics.json"
        self.stage1 = root / "stage1"
        self._lock_fd: int | None = None

    # -- reading ---------------------------------------------------------------------------

    def read_metrics(self) -> dict:
        """The content of training_metrics.json; empty when the file is missing, truncated or damaged."""
        try:
            content = json.loads(self.metrics_file.read_text(encoding="utf-8"))
            is_valid = all(isinstance(block, dict) for block in content.get("stages", {}).values())
            return content if is_valid else {}
        except (OSError, ValueError, AttributeError, RecursionError):
            return {}

    def recorded_stage(self) -> int | None:
        """The stage whose results are in the directory itself: as recorded, otherwise as its final model says."""
        for recorded in (self.read_metrics().get("current_stage"), self.trained(self.final_model).get("stage")):
            if type(recorded) is int and recorded in (1, 2):
                return recorded
        return None

    @staticmethod
    def trained(model_dir: Path) -> dict:
        """Training facts in a final model's config.json (stage, step, trained_tokens); empty when there are none."""
        try:
            return dict(json.loads((model_dir / "config.json").read_text(encoding="utf-8"))["flare"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}

    def final_model_of(self, stage: int) -> Path | None:
        """The final model of a stage; None when there is none or the stage is not finished."""
        status = self.read_metrics().get("stages", {}).get(str(stage), {}).get("status", "finished")
        if status != "finished":
            return None
        candidates = [self.stage1 / "final_model"] if stage == 1 else []
        if self.recorded_stage() == stage:
            candidates.append(self.final_model)
        return next((path for path in candidates if (path / "config.json").is_file()), None)

    def saved_global_batch_size(self) -> int | None:
        """Rows of an optimizer step of the run, from its newest checkpoint; None without a checkpoint."""
        states = [
            (p.parent.name.partition("-")[2], p) for p in self.checkpoints.glob("checkpoint-*/trainer_state.json")
        ]
        numbered = [(int(step), path) for step, path in states if step.isdecimal()]  # not checkpoint-2-KEEP
        for _, path in sorted(numbered, reverse=True):
            try:
                return int(json.loads(path.read_text(encoding="utf-8"))["global_batch_size"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return None

    # -- lock --------------------------------------------------------------------------------------

    def lock(self) -> None:
        """Lock the directory for this process. The kernel releases the lock when the process ends.

        Raises: ConfigError when another run holds the lock. The message names its process and host.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(fd, 500).decode(errors="replace") or "another process"
            os.close(fd)
            raise ConfigError(
                f"experiment {self.root.name!r} is running ({holder.strip()}); choose another "
                "--experiment_name or stop that run"
            ) from error
        os.truncate(fd, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(fd, f"pid {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
        self._lock_fd = fd

    def unlock(self) -> None:
        """Release the lock."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def check_not_removed(self) -> None:
        """Raises: EnvError when the directory was deleted after this process locked it."""
        if self._lock_fd is not None and os.fstat(self._lock_fd).st_nlink == 0:
            raise EnvError(
                f"{self.root} was removed while this run used it: its checkpoints are lost, and it stops here; "
                "the same command starts it again"
            )

    # -- changing -------------------------------------------------------------------------------------

    def create(self) -> None:
        """Create the directories that every run has."""
        for path in (self.checkpoints, self.logs, self.tensorboard):
            path.mkdir(parents=True, exist_ok=True)

    def paths_to_overwrite(self, stage: int) -> list[Path]:
        """Paths that ``--overwrite_output_dir`` deletes before a run of this stage. Stage 2 keeps stage 1's result."""
        if stage == 2 and self.recorded_stage() == 1:
            return []
        paths = [
            *STAGE_CONTENT,
            "logs",
            "tensorboard",
            "training.log",
            "training_metrics.json",
            "evaluation",
        ]
        if stage == 2 and self.stage1.exists():
            paths = [*STAGE_CONTENT]
        elif stage == 1:
            paths.append("stage1")
        return [self.root / name for name in paths]

    def clear(self, stage: int) -> None:
        """Delete the results of earlier runs of this stage."""
        for path in self.paths_to_overwrite(stage):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def move_results_to_stage1(self) -> None:
        """Move stage 1's checkpoints and final model to ``stage1/``. Can be repeated after a crash."""
        if self.recorded_stage() != 1:
            return
        self.stage1.mkdir(exist_ok=True)
        for name in STAGE_CONTENT:
            if (self.root / name).exists() and not (self.stage1 / name).exists():
                os.rename(self.root / name, self.stage1 / name)

    # -- records -------------------------------------------------------------------------------------

    def record_command(self, command: list[str]) -> None:
        """Append the command to train_command.txt, ready to paste, with date and working directory."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S %z")
        text = f"# {stamp}\ncd {shlex.quote(os.getcwd())} && {shlex.join(command)}\n\n"
        with open(self.root / "train_command.txt", "a", encoding="utf-8") as file:
            file.write(text)

    def record_environment(self) -> None:
        """Write environment_info.txt. Variables that look like secrets are omitted."""
        with open(self.root / "environment_info.txt", "w", encoding="utf-8") as file:
            file.write("\n".join(environment_lines()) + "\n")


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest directory (or file) above it that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def check_output_dir(base_output_dir: str) -> None:
    """Check that the base output directory can be written, before anything is changed."""
    check_writable("--base_output_dir", Path(base_output_dir), " or set FLARE_OUTPUT_DIR")


def check_writable(option: str, directory: Path, alternative: str = "") -> None:
    """Check that a directory can be written or created, before anything is changed.

    Args:
        option: the option that names the directory.
        alternative: another way to set the directory, for the message.
    Raises: ConfigError naming the option.
    """
    path = existing_parent(directory)
    if not path.is_dir():
        raise ConfigError(f"{option} {directory}: {path} is a file, not a directory")
    try:
        os.rmdir(
            tempfile.mkdtemp(prefix=".flare-", dir=path)
        )  # permission bits are not enough: root, read-only mounts
    except OSError as error:
        raise ConfigError(
            f"cannot write to {option} {directory} ({path}: {error.strerror}); give another {option}{alternative}"
        ) from error


def check_is_directory(root: Path) -> None:
    """Check that no file or broken link is in the place of the experiment directory. Raises: ConfigError."""
    for path in (root, *root.parents):
        if os.path.lexists(path) and not path.is_dir():
            what = "a broken link" if path.is_symlink() and not path.exists() else "a file"
            raise ConfigError(f"{path} is {what}, not an experiment directory; choose another --experiment_name")


def stage1_sibling(experiment: Experiment) -> Experiment | None:
    """The experiment NAME_stage1 next to NAME_stage2, whether it exists or not; None for other names."""
    name = experiment.root.name
    if not name.endswith("_stage2"):
        return None
    return Experiment(experiment.root.with_name(name.removesuffix("_stage2") + "_stage1"))


def stage1_result(experiment: Experiment) -> Path | None:
    """The stage-1 model that stage 2 of this experiment starts from: its own, or that of its ``_stage1`` sibling.

    Raises: CheckpointError when such a stage 1 exists but has no final model yet.
    """
    for candidate in filter(None, (experiment, stage1_sibling(experiment))):
        result = candidate.final_model_of(1)
        if result is not None:
            return result
        if candidate.recorded_stage() == 1:
            raise CheckpointError(
                f"stage 1 of {candidate.root.name!r} has no final_model yet; finish it first, "
                "or choose another model with --model_name_or_path"
            )
    return None
