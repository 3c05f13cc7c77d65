"""Patching a 60 GB checkpoint costs no disk and reads no weights. The files are sparse: only their headers exist."""

import ctypes
import json
import mmap
import os
import struct
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from flare.nope.config_json import weight_files
from flare.nope.patch import patch_checkpoint

SHARDS = 12
QWEN2_5_32B = {
    "vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
    "num_attention_heads": 40, "num_key_value_heads": 8, "tie_word_embeddings": False, "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2.5-32B's config, index and shards: right sizes and headers, and holes for tensors."""
    directory = tmp_path_factory.mktemp("large") / "model"
    config = Qwen2Config(**QWEN2_5_32B, architectures=["Qwen2ForCausalLM"])
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in Qwen2ForCausalLM(config).state_dict().items()}
    names = [f"model-{index + 1:05}-of-{SHARDS:05}.safetensors" for index in range(SHARDS)]
    weight_map = {tensor: names[index * SHARDS // len(shapes)] for index, tensor in enumerate(shapes)}
    for name in names:
        write_sparse_shard(directory / name, {t: shapes[t] for t, file in weight_map.items() if file == name})
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_sparse_shard(path: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file whose data is a hole. Format: 8 bytes header length, JSON header, data."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def bytes_on_disk(directory: Path) -> int:
    """What the files of a directory occupy alone: those with another name elsewhere cost nothing here."""
    return sum(f.stat().st_blocks * 512 for f in directory.iterdir() if f.stat().st_nlink == 1)


def bytes_read() -> int:
    """Bytes that this process has got from read()."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


def bytes_in_memory(path: Path) -> int:
    """Bytes of a file that are in the page cache: what anybody has read, through mmap, too."""
    size = path.stat().st_size
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as view:
        start = ctypes.c_char.from_buffer(view)
        failed = libc.mincore(ctypes.byref(start), ctypes.c_size_t(size), pages)
        del start
    assert not failed, os.strerror(ctypes.get_errno())
    return bytes(pages).count(1) * mmap.PAGESIZE


def test_patching_60_gb_links_the_shards_and_reads_none_of_the_weights(large: Path) -> None:
    shards = weight_files(large)
    assert len(shards) == SHARDS
    assert sum(file.stat().st_size for file in shards) > 60e9
    target, before = large.parent / "patched", bytes_read()
    assert patch_checkpoint(large, target, "20-32") == list(range(20, 33))
    assert bytes_read() - before < 10e6
    assert sum(map(bytes_in_memory, shards)) < 100e6  # the headers, and what the kernel reads ahead of them
    for shard in shards:
        assert (target / shard.name).stat().st_ino == shard.stat().st_ino
    assert bytes_on_disk(target) < 1e6
    assert json.loads((target / "config.json").read_text())["nope_layers"] == list(range(20, 33))


def test_weights_that_are_read_would_be_seen(large: Path) -> None:
    shard = weight_files(large)[0]
    with open(shard, "rb") as file, mmap.mmap(file.fileno(), 200_000_000, access=mmap.ACCESS_READ) as view:
        assert view.find(b"x", 100_000_000) == -1
    assert bytes_in_memory(shard) >= 100_000_000
