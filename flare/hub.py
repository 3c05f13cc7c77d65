"""Find a model by hub name or directory, and download it when needed. Errors say how to fix them."""

import contextlib
import errno
import json
from collections.abc import Iterator
from pathlib import Path

from flare.errors import CheckpointError, ConfigError, EnvError, FlareError

TOKENIZER_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
"""Files of a model other than weights."""
MODEL_FILES = [*TOKENIZER_FILES, "*.safetensors", "pytorch_model*.bin"]


def local_model_dir(name: str, cache_dir: str | None = None, files: list[str] = MODEL_FILES) -> Path:
    """The directory of a model: ``name`` itself, or a snapshot of which ``files`` are downloaded when needed.

    Raises: ConfigError for a path or a repository that does not exist; EnvError when the hub cannot be reached.
    """
    path = Path(name)
    if path.is_dir():
        return path
    with hub_errors(name, cache_dir):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, cache_dir=cache_dir, allow_patterns=files))


def read_hub_config(name: str, cache_dir: str | None = None) -> dict:
    """config.json of a hub model, without its weights. Raises: the same errors as ``local_model_dir``."""
    with hub_errors(name, cache_dir):
        from huggingface_hub import hf_hub_download

        return read_model_config(Path(hf_hub_download(name, "config.json", cache_dir=cache_dir)).parent)


@contextlib.contextmanager
def hub_errors(name: str, cache_dir: str | None = None) -> Iterator[None]:
    """Convert errors of the hub client to Flare's. A name that is not a valid hub name is refused first."""
    if Path(name).is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise ConfigError(f"model {name!r} is not a directory; give a directory or a hub name like Qwen/Qwen2.5-3B")
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise ConfigError(f"model {name!r} is gated; accept its terms on the hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(f"model {name!r} is not a directory and the hub has no such model") from error
    except RemoteEntryNotFoundError as error:  # only config.json is requested by name
        raise ConfigError(f"model {name!r} has no config.json on the hub; it is not a transformers model") from error
    except FlareError:
        raise
    except Exception as error:  # the hub client raises many types of errors when the network is down
        if disk := disk_error(f"model {name!r}", error):
            raise disk from error
        cached = ", ".join(cached_repositories("model", cache_dir)) or "none"
        if HF_HUB_OFFLINE:
            raise EnvError(
                f"model {name!r} is not a directory and not complete in the hub's cache, and HF_HUB_OFFLINE=1 "
                f"forbids the download; give a directory, or unset HF_HUB_OFFLINE; cached models: {cached}"
            ) from error
        raise EnvError(
            f"model {name!r} is not a directory and the hub cannot be reached ({type(error).__name__}); give a "
            "directory, or set HF_ENDPOINT to a mirror, or HF_HUB_OFFLINE=1 to use what is cached; cached models: "
            f"{cached}"
        ) from error


def disk_error(what: str, error: BaseException) -> EnvError | None:
    """The error for a download that failed because of the disk; None when it failed for another reason."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            where = f" in {cause.filename}" if cause.filename else ""
            return EnvError(
                f"{what} cannot be stored{where}: {cause.strerror}; --cache_dir and the environment's HF_HOME name "
                "other directories"
            )
        cause = cause.__cause__
    return None


def cached_repositories(kind: str, cache_dir: str | None = None) -> list[str]:
    """Names of the repositories of a kind (model or dataset) in ``cache_dir`` and in the hub's default cache.

    Repositories with nothing but a README are omitted. Whether the others are complete is not checked.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    names = set()
    for root in filter(None, (cache_dir, HF_HUB_CACHE)):
        for folder in Path(root).expanduser().glob(f"{kind}s--*"):
            if any(file.name != "README.md" for file in folder.glob("snapshots/*/*")):
                names.add(folder.name.removeprefix(f"{kind}s--").replace("--", "/"))
    return sorted(names)


def cached_data_sets(cache_dir: str | None = None) -> list[str]:
    """Names of the data sets that can be read without the hub: snapshots and those converted by ``datasets``."""
    from datasets.config import HF_DATASETS_CACHE

    names = set(cached_repositories("dataset", cache_dir))
    for root in filter(None, (cache_dir, HF_DATASETS_CACHE)):
        for folder in Path(root).expanduser().glob("*___*/*/*/*/dataset_info.json"):
            names.add(folder.parents[3].name.replace("___", "/"))
    return sorted(names)


def read_model_config(directory: Path) -> dict:
    """config.json as a dict.

    Raises: CheckpointError when the file is missing or not a JSON object.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        inner = directory / "final_model"  # the user may have given the experiment directory
        hint = f"; did you mean {inner}?" if (inner / "config.json").is_file() else ""
        raise CheckpointError(f"{directory} holds no config.json; it is not a model directory{hint}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} does not contain a JSON object, so it is not a model configuration")
    return config
