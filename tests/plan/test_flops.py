"""FLOPs of a token by hand and as torch counts them."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from flare.config.options import SELECTIVE
from flare.plan.flops import attention_forward_flops, token_flops
from flare.plan.trainable import Trainable
from tests.plan.models import TINY, rows_of_tokens, tiny_training


def test_flops_by_hand() -> None:
    # Per token: a layer's matrices have 576 weights, the head 800; attention forward 2 x T x 8 = 160.
    flops = token_flops(TINY, Trainable.of({1}), seq_len=10)
    assert flops.frozen_prefix == 2 * 576
    assert flops.frozen_above == 4 * (2 * 576 + 800)
    assert flops.trainable == 6 * 576
    assert flops.attention == 4 * 160 + 3 * 400
    assert flops.recompute == 0
    assert flops.model == 6 * (4 * 576 + 800) + 3 * 4 * 160
    assert flops.executed == 1152 + 7808 + 3456 + 1840
    selective = token_flops(TINY, Trainable.of({1}), 10, SELECTIVE)
    assert selective == flops  # norms and the like are not counted
    assert token_flops(TINY, Trainable.of({1}), 10, SELECTIVE, eager_attention=True).recompute == 3 * 160
    everything = token_flops(TINY, Trainable.of("all"), 10, gradient_checkpointing=True)
    assert everything.trainable == 6 * (4 * 576 + 800) and everything.frozen_above == 0
    assert everything.recompute == 4 * (2 * (576 - 128) + 160)


def test_attention_flops_are_those_of_a_causal_score_matrix() -> None:
    # T (T + 1) / 2 pairs of 2 heads; score and weighted sum are 2 x 4 FLOPs each; spread over T tokens.
    exact = 10 * 11 / 2 * 2 * (2 * 4 + 2 * 4) / 10
    assert attention_forward_flops(TINY, 10) == pytest.approx(exact, rel=1 / 10)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("train", ["all", "nope", "nope_attention"])
@pytest.mark.parametrize("checkpointing", [False, True, SELECTIVE])
def test_matmul_flops_are_those_that_torch_counts(family: str, train: str, checkpointing: bool | str) -> None:
    model, shape, trainable = tiny_training(family, train, True, checkpointing, vocab_size=128)
    ids, positions = rows_of_tokens(128, rows=1, seq_len=32, documents=1)
    with FlopCounterMode(display=False) as counter:
        model(ids, ids, positions).backward()
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    counted = sum(flops for op, flops in counts.items() if "mm" in op) / 32
    plain = token_flops(shape, trainable, 32, checkpointing)
    layers = shape.num_hidden_layers - trainable.first_backward(shape)
    attention_rerun = layers * attention_forward_flops(shape, 32) if checkpointing is True else 0
    # q, k and v of the lowest trained attention have no input gradient: the norm below is frozen.
    qkv = shape.hidden_size * (shape.query_size + 2 * shape.key_value_size)
    left_out = 2 * qkv if train == "nope_attention" else 0
    assert counted == plain.executed - plain.attention - attention_rerun - left_out
