"""Opens a model with stock transformers, in a separate process, and compares its logits with given ones.

    python -P stock_check.py DIRECTORY LOGITS.safetensors

Run by path: until the logits are compared, nothing of Flare is imported, so that what is compared is what a user
without Flare gets. Prints one line of JSON: {"nope_layers": [...]}. bit_equality.py starts it.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open

TOKENS = 48
SEED = 20


def probe_batches(vocab_size: int, max_position_embeddings: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Fixed random token ids and their positions, (1, TOKENS) each: at the start, and up to the last position."""
    generator = torch.Generator().manual_seed(SEED)
    count = min(TOKENS, max_position_embeddings)
    positions = torch.arange(count)[None]
    batches = {}
    for name, first in (("start", 0), ("end", max_position_embeddings - count)):
        batches[name] = (torch.randint(0, vocab_size, (1, count), generator=generator), positions + first)
    return batches


@torch.no_grad()
def batch_logits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Logits of every batch, (1, TOKENS, V) each, in the model's dtype; by batch and dtype."""
    config = model.config
    batches = probe_batches(config.vocab_size, config.max_position_embeddings)
    return {
        f"{name} {str(model.dtype).removeprefix('torch.')}": model(ids, position_ids=positions, use_cache=False).logits
        for name, (ids, positions) in batches.items()
    }


def compare(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    """Raises: SystemExit naming the first batch whose logits are not bitwise the expected ones."""
    for name, logits in batch_logits(model).items():
        if not torch.equal(logits, expected[name]):
            worst = (logits.double() - expected[name].double()).abs().max().item()
            raise SystemExit(f"logits differ by up to {worst:.3g} ({name})")


def main(directory: str, logits_file: str) -> None:
    from transformers import AutoModelForCausalLM

    with safe_open(logits_file, "pt") as file:
        threads = int(file.metadata()["threads"])  # another count may add up in another order
        expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    torch.set_num_threads(threads)
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    model.eval()
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise SystemExit(f"stock transformers reports {wrong}")
    compare(model, expected)
    if "start float32" in expected and model.dtype != torch.float32:
        compare(model.float(), expected)
    ours = [name for name in sys.modules if name.split(".")[0] == "flare"]
    assert not ours, f"not a stock process: {ours}"
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from flare.nope.probe import probe_nope_layers

    print(json.dumps({"nope_layers": probe_nope_layers(model)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
