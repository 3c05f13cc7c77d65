"""Random patched models, and the computations that the tests of modeling_nope.py compare."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from flare.nope.load import load_causal_lm

DEPTH = 4


SHAPES = {
    "qwen2": ("qwen2", {"num_key_value_heads": 1}),
    "qwen2-odd-heads": ("qwen2", {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),  # head_dim 16 of hidden 32 and 4 heads
}


@dataclass
class Patched:
    directory: Path
    nope_layers: list[int]

    def load(self, attention: str = "sdpa", **kwargs: object) -> PreTrainedModel:
        return load_causal_lm(self.directory, attn_implementation=attention, **kwargs)


def tokens(batch: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(0, 300, (batch, length), generator=torch.Generator().manual_seed(1))


def logits(model: PreTrainedModel, input_ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids, use_cache=False, **kwargs).logits


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=48),
}


def generate(model: PreTrainedModel, input_ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    ends = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(input_ids, do_sample=False, **ends, **kwargs)


LENGTHS = (9, 20, 14)


def left_padded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows cut to ``LENGTHS``, padded on the left, and their mask."""
    width = max(LENGTHS)
    input_ids, mask = torch.zeros(len(LENGTHS), width, dtype=torch.long), torch.zeros(len(LENGTHS), width).long()
    for index, length in enumerate(LENGTHS):
        input_ids[index, width - length :], mask[index, width - length :] = rows[index, :length], 1
    return input_ids, mask


def check_left_padding(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    """Padded rows under the model are the unpadded ones under the reference."""
    rows = tokens(batch=3)
    input_ids, mask = left_padded(rows)
    padded = logits(model, input_ids, attention_mask=mask)
    for index, length in enumerate(LENGTHS):
        assert_same(padded[index, -length:], logits(reference, rows[index : index + 1, :length])[0])


DOCUMENTS = (17, 13, 10)


POSITIONS = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]


def check_packing(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    """A packed row under the model is its documents alone under the reference."""
    row = tokens(batch=1)
    apart = torch.cat([logits(reference, document) for document in row.split(DOCUMENTS, 1)], 1)
    assert_same(logits(model, row, position_ids=POSITIONS), apart)
    assert (logits(model, row) - apart).abs().max() > 0.1  # as one document it is another text
