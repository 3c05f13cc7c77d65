"""The benchmarks measure what they say: the same work on both sides, and plans that fit the cards they name."""

import pytest

from benchmarks import gpu
from benchmarks.workload import Workload, run_flare, run_hf

SHAPE = {
    "model_type": "qwen2",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("stage", [1, 2])
def test_both_trainers_do_the_same_updates(stage: int) -> None:
    """Losses agree up to the one target a row that run_clm's shift leaves out (of 128)."""
    flare = Workload("flare", SHAPE, stage, [1, 3], batch_size=4, seq_len=128, steps=3)
    _, ours = run_flare(flare)
    seconds, theirs = run_hf(Workload(**vars(flare) | {"trainer": "hf"}))
    assert len(seconds) == len(theirs) == 3
    assert ours == pytest.approx(theirs, rel=3e-3)


def test_every_gpu_case_fits_the_cards_of_the_project() -> None:
    for name, memory_mib in (("NVIDIA H200", 143771), ("NVIDIA H100 80GB HBM3", 81559)):
        for case in gpu.CASES:
            plan = gpu.planned(case, name, memory_mib)
            assert plan is not None and plan.fits, (str(case), name)
