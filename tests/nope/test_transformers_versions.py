"""Models that Flare writes, opened by other releases of transformers with their own code only.

Each release is installed once into a folder of its own (240 MB on disk). The folder comes before the running
environment's packages on the path of a subprocess, so torch is shared. FLARE_OFFLINE=1 skips these tests where no
package index can be reached.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flare.nope.export.export import export_native
from flare.nope.load import load_causal_lm
from flare.nope.patch import patch_checkpoint
from tests.conftest import write_base
from tests.nope.other_transformers import generate, padded
from tests.processes import REPO, script_environment

pytestmark = pytest.mark.slow

VERSIONS = ("4.57.6", "5.17.0", "5.24.0")
"""The oldest release that opens our models, the oldest that Flare runs on, the newest at the time of writing."""
LAYERS = [0, 2]
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
BASES = {
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),
}
NATIVE = {"smollm3-tied": "qwen2-tied", "smollm3-untied": "qwen2-untied", "smollm3-yarn": "qwen2-yarn"}
"""Native exports and what they are exports of. ExaoneMoe is not in that transformers."""


@pytest.fixture(scope="module", params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def packages(version: str) -> Path:
    """A folder with this transformers and what it needs besides torch. One process makes it, once."""
    if os.environ.get("FLARE_OFFLINE"):
        pytest.skip("FLARE_OFFLINE is set")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flare-tests"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache / f"transformers-{version}-python{python}"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            install(folder, version)
    return folder


def install(folder: Path, version: str) -> None:
    part = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(part)]
    result = subprocess.run([*pip, f"transformers=={version}"], capture_output=True, text=True, timeout=600)
    if result.returncode:
        reason = (result.stderr.strip() or "no message from pip").splitlines()[-1]
        pytest.fail(f"pip cannot install transformers {version} (FLARE_OFFLINE=1 skips these tests): {reason}")
    part.rename(folder)


def tokens() -> torch.Tensor:
    return torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))


def write_reference(folder: Path, model_dir: Path) -> None:
    """What this transformers gives for a model that Flare wrote (ours or a native export)."""
    folder.mkdir(parents=True)
    (folder / "model").symlink_to(model_dir)
    model = load_causal_lm(model_dir)
    with torch.no_grad():
        reference = {
            "tokens": tokens(),
            "logits": model(tokens()).logits,
            "generated": generate(model, tokens()[:, :8], use_cache=False),
            "generated_padded": generate(model, *padded(tokens()[:, 8:16]), use_cache=False),
        }
    save_file(reference, folder / "reference.safetensors")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> directory of every model that is opened; those in BASES with trust_remote_code."""
    root = tmp_path_factory.mktemp("written")
    for name, (family, shape) in BASES.items():
        write_base(root / f"base-{name}", family, initializer_range=0.1, **shape)
        patch_checkpoint(root / f"base-{name}", root / name, LAYERS, rope_theta=4321.0)
    for name, source in NATIVE.items():
        export_native(root / source, root / name)
    return {name: root / name for name in (*BASES, *NATIVE)}


@pytest.fixture(scope="module")
def results(written: dict[str, Path], version: str, packages: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What other_transformers.py found with this release, by model and check."""
    root = tmp_path_factory.mktemp(version)
    for name, model_dir in written.items():
        write_reference(root / "references" / name, model_dir)
    environment = script_environment(PYTHONPATH=str(packages), HF_MODULES_CACHE=str(root / "modules"))
    command = [sys.executable, "-P", str(REPO / "tests" / "nope" / "other_transformers.py"), version]
    command += [str(root / "references"), str(root / "results.json"), *BASES]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, env=environment, cwd=root
    )
    assert result.returncode == 0, result.stderr
    return json.loads((root / "results.json").read_text())


@pytest.mark.parametrize("name", BASES)
def test_logits_are_bitwise_those_of_our_release(results: dict, name: str) -> None:
    assert results[name]["class"] == f"{BASES[name][0].capitalize()}NopeForCausalLM"
    assert results[name]["logits_difference"] == 0


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("batch", ["", "_padded"])
def test_generation_with_a_cache_is_that_without_one(results: dict, name: str, cache: str, batch: str) -> None:
    """Left padding too: a NoPE layer that loses its cache, or its mask, gives other tokens."""
    assert results[name][f"{cache}_cache{batch}_equal"]


@pytest.mark.parametrize("name", BASES)
def test_nothing_opens_without_trust_remote_code(results: dict, name: str) -> None:
    assert results[name]["without_trust"] == "ValueError"


@pytest.mark.parametrize("name", BASES)
def test_what_it_saves_is_the_same_model_and_as_careful(results: dict, name: str) -> None:
    assert results[name]["round_trip_equal"]
    assert results[name]["round_trip_without_trust"] == "ValueError"


@pytest.mark.parametrize("name", NATIVE)
def test_native_exports_need_no_code_of_ours(results: dict, name: str) -> None:
    found = results[name]
    assert (found["class"], found["without_trust"]) == ("SmolLM3ForCausalLM", "opened")
    assert found["logits_difference"] == 0
    assert all(found[f"{cache}_cache{batch}_equal"] for cache in ("dynamic", "static") for batch in ("", "_padded"))
    assert found["round_trip_equal"]


@pytest.mark.parametrize("name", BASES)
def test_the_references_come_from_this_transformers(written: dict[str, Path], name: str) -> None:
    import transformers

    assert transformers.__version__ not in VERSIONS[:1]
    base = written[name].with_name(f"base-{name}")
    with torch.no_grad():
        difference = load_causal_lm(base)(tokens()).logits - load_causal_lm(written[name])(tokens()).logits
    assert difference.abs().max() > 0.1  # layers and theta matter to these models
