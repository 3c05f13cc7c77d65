"""Checks that an export, loaded in a new process with stock classes, computes the same bits as its source.

One model is in memory at a time: the patched model computes its logits and is freed, then the other process loads the
export. Two batches of fixed random tokens, at the first and at the last positions, are compared in the stored dtype
and, if memory allows, in fp32.
"""

import gc
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from flare.cpu import read_available_ram
from flare.errors import CheckpointError, FlareError
from flare.nope.export import stock_check
from flare.nope.layers import format_layers
from flare.nope.load import load_causal_lm
from flare.nope.weight_files import save_tensors

MEMORY_SHARE = 0.8
"""Share of the available memory that the fp32 copy of a model may take."""


@dataclass(frozen=True)
class Comparison:
    """The logits that are bitwise equal."""

    dtypes: list[str]
    tokens: int
    last_position: int

    def __str__(self) -> str:
        return (
            f"logits bit-equal on CPU in {' and '.join(self.dtypes)}: {self.tokens} fixed random tokens at positions "
            f"up to {self.last_position}, reloaded in a fresh process with stock transformers"
        )


def compare_with_export(source: Path, export: Path, nope_layers: list[int]) -> Comparison:
    """Compare the logits of the model in ``export`` with those of ``source``. Leaves no files behind.

    Raises: FlareError when a bit differs; CheckpointError when its layers are not these.
    """
    logits_file = export / ".expected.safetensors"
    try:
        compared = _write_expected(source, logits_file)
        found = _reload(export, logits_file)
    finally:
        logits_file.unlink(missing_ok=True)
    if found != nope_layers:
        raise CheckpointError(
            f"the export's NoPE layers are {format_layers(found)} instead of {format_layers(nope_layers)}"
        )
    return compared


def _write_expected(source: Path, logits_file: Path) -> Comparison:
    """The patched model's logits, in a file; the model is gone when this returns."""
    model = load_causal_lm(source)
    logits = stock_check.batch_logits(model)
    if model.dtype != torch.float32 and 4 * model.num_parameters() < MEMORY_SHARE * (read_available_ram() or 0):
        logits |= stock_check.batch_logits(model.float())
    last_position = model.config.max_position_embeddings - 1
    del model
    gc.collect()
    save_tensors(logits, logits_file, {"threads": str(torch.get_num_threads())})
    dtypes = sorted({name.split()[1] for name in logits})
    tokens = sum(tensor.shape[1] for name, tensor in logits.items() if name.endswith(f" {dtypes[0]}"))
    return Comparison(dtypes, tokens, last_position)


def _reload(export: Path, logits_file: Path) -> list[int]:
    """Run stock_check.py on the export; the NoPE layers that the probe finds there.

    Raises: FlareError with that process's last line when it fails.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    # -P: the script's directory must not be on the path; its neighbours have names like load and format.
    command = [sys.executable, "-P", stock_check.__file__, str(export), str(logits_file)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode != 0:
        reason = (result.stderr.strip() or f"it ended with {result.returncode}").splitlines()[-1]
        raise FlareError(f"the export does not reproduce the model, and was discarded: {reason}")
    return json.loads(result.stdout.splitlines()[-1])["nope_layers"]
