"""Folders with the layout of a hub data set: a clone, a result of ``hf download``, a snapshot in the hub's cache.

``datasets`` finds the files of a configuration and split. They are then read like other local files.
"""

from pathlib import Path

from flare.data.sources.base import SourceSpec
from flare.data.sources.file_formats import kind_of
from flare.data.sources.files import find_files
from flare.errors import ConfigError, DataError, first_line
from flare.logs import log

DATASET_CARD = "README.md"


def is_snapshot(path: Path) -> bool:
    """Whether a folder came from the hub: its dataset card has configurations, or ``hf download`` made it."""
    in_hub_cache = path.parent.name == "snapshots" and path.parent.parent.name.startswith("datasets--")
    if in_hub_cache or (path / ".cache" / "huggingface").is_dir():
        return True
    try:
        with open(path / DATASET_CARD, encoding="utf-8") as file:
            head = file.read(2**16)
    except (OSError, ValueError):
        return False
    front_matter = head.split("\n---")[0] if head.startswith("---") else ""
    return any(line.startswith(("configs:", "dataset_info:")) for line in front_matter.splitlines())


def snapshot_files(path: Path, spec: SourceSpec) -> list[Path]:
    """The files of ``--dataset_config`` and ``--dataset_split``, in the order of the hub.

    For a loading script these files are unknown, because the script is not run. Then all files of the folder are used.

    Raises: ConfigError for an unknown configuration or split; DataError for a folder without data, or with files of
    an unknown kind.
    """
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    try:
        builder = load_dataset_builder(str(path), spec.dataset_config, cache_dir=spec.cache_dir)
    except ValueError as error:  # unknown configuration: the message lists the known ones
        raise ConfigError(f"data set {path}: {' '.join(str(error).split())}; see --dataset_config") from error
    except (DatasetsError, OSError) as error:
        raise DataError(f"data set {path}: {first_line(error)}") from error
    except RuntimeError as error:
        if not is_about_script(error):
            raise
        return files_next_to_script(path, spec)
    splits = {str(split): files for split, files in (builder.config.data_files or {}).items()}
    if spec.dataset_split not in splits:
        raise ConfigError(f"--dataset_split {spec.dataset_split}: {path} has the splits {', '.join(splits) or 'none'}")
    files = [Path(file) for file in splits[spec.dataset_split]]
    for file in files:
        if kind_of(file) is None:
            raise DataError(
                f"{file} is of a kind that cannot be read from a folder; give the data set's name on the hub"
            )
    return files


def is_about_script(error: RuntimeError) -> bool:
    """Whether ``datasets`` (4 and newer) refused a data set because it is a loading script."""
    return "script" in str(error)


def files_next_to_script(path: Path, spec: SourceSpec) -> list[Path]:
    """All files of a folder with a loading script. Raises: ConfigError when a configuration or split was given."""
    if spec.dataset_config or spec.dataset_split != "train":
        raise ConfigError(
            f"data set {path} is a loading script, which is not run: it has no configurations and splits; leave out "
            "--dataset_config and --dataset_split to read all its files, or select files with a glob"
        )
    files = find_files(path, spec.flag_and_value)
    log.warning(f"data set {path} is a loading script, which is not run; reads the {len(files)} files next to it")
    return files


def cached_snapshot(spec: SourceSpec) -> Path | None:
    """The data set's snapshot in ``--cache_dir`` or in the default cache of the hub, else None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    for cache_dir in dict.fromkeys([spec.cache_dir, None]):
        try:
            snapshot = snapshot_download(
                spec.dataset_name,
                repo_type="dataset",
                revision=spec.dataset_revision,
                cache_dir=cache_dir,
                local_files_only=True,
            )
        except (LocalEntryNotFoundError, HFValidationError):
            continue
        if any(kind_of(file) for file in Path(snapshot).rglob("*")):  # not only the dataset card
            return Path(snapshot)
    return None
