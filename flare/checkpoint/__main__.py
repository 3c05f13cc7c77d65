"""python -m flare.checkpoint list|verify DIR: lists checkpoints and checks whether they are complete.

DIR is an experiment, its checkpoints/ directory, or one checkpoint-N. Nothing is changed.
"""

import sys
import time
from pathlib import Path

from flare.argument_parser import OneLineParser
from flare.errors import CheckpointError, run_script
from flare.logs import quiet_torchao

EXAMPLES = """examples:
  python -m flare.checkpoint list /data/runs/mine
  python -m flare.checkpoint verify /data/runs/mine/checkpoints/checkpoint-500
"""
COLUMNS = "{:<24} {:>15} {:>9}  {:<16}  {}"


def main(argv: list[str] | None = None) -> int:
    what = "List checkpoints and check whether they are complete. Changes nothing."
    parser = OneLineParser("python -m flare.checkpoint", "list|verify DIR", what, EXAMPLES)
    group = parser.add_argument_group("what and where")
    group.add_argument("command", choices=("list", "verify"), help="verify hashes every file, about 1 GB per second")
    group.add_argument("directory", type=Path, metavar="DIR", help="experiment, checkpoints/ or checkpoint-N")
    args = parser.parse_args(argv)
    quiet_torchao()
    paths = checkpoint_paths(args.directory)
    print(COLUMNS.format("checkpoint", "tokens", "GiB", "written", "state"))
    states = [print_line(path, hashed=args.command == "verify") for path in paths]
    if args.command == "verify" and not all(states):
        raise CheckpointError(
            f"{states.count(False)} of {len(states)} checkpoints are not complete; resuming skips them"
        )
    return 0


def checkpoint_paths(directory: Path) -> list[Path]:
    """Directories named checkpoint-N, including those of stage 1, sorted by stage and step.

    Raises: CheckpointError when there are none.
    """
    from flare.checkpoint.directory import NAME  # imported here because it imports torch, which --help does not need

    if NAME.fullmatch(directory.name):
        paths = [directory] if directory.is_dir() else []
    else:
        found = [p for pattern in ("", "checkpoints/", "stage1/checkpoints/") for p in directory.glob(f"{pattern}*")]
        paths = [p for p in found if p.is_dir() and NAME.fullmatch(p.name)]
    if not paths:
        raise CheckpointError(
            f"no checkpoint-N in {directory}; give an experiment directory or one of its checkpoints"
        )
    return sorted(paths, key=lambda p: (p.parent, step_of(p)))


def step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def print_line(path: Path, hashed: bool) -> bool:
    """Print the line of one checkpoint. Returns whether the checks found it complete."""
    from flare.checkpoint.directory import Checkpoint

    checkpoint, facts, state = Checkpoint(path, step_of(path)), {}, "complete"
    try:
        if not (path / "manifest.json").is_file():
            raise CheckpointError("manifest.json is missing: never finished, or partly deleted")
        checkpoint.listed_files()
        if hashed:
            checkpoint.verify()
            state = "complete, every hash is right"
        facts = checkpoint.manifest()
    except (CheckpointError, OSError) as error:
        state = f"NOT COMPLETE: {str(error).removeprefix(f'{path.name}: ')}"
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 2**30
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
    name = f"stage1/{path.name}" if path.parent.parent.name == "stage1" else path.name
    tokens = f"{facts['tokens']:,}" if isinstance(facts.get("tokens"), int) else "?"
    print(COLUMNS.format(name, tokens, f"{size:.3f}", written, state))
    return not state.startswith("NOT")


if __name__ == "__main__":
    sys.exit(run_script(main))
