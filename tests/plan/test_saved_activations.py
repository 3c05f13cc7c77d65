"""The bytes that autograd saves, by hand and as torch's hooks count them."""

from unittest.mock import patch

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy

from flare.config.options import SELECTIVE
from flare.model import activation_checkpointing
from flare.model.training_model import TrainingModel
from flare.plan import activations
from flare.plan.activations import Microbatch
from flare.plan.model_shape import HALF_BYTES
from flare.plan.trainable import Trainable
from tests.plan.models import TINY, rows_of_tokens, tiny_training


def saved_bytes(model: TrainingModel, ids: torch.Tensor, positions: torch.Tensor) -> int:
    """Bytes that are kept for the decoder's backward pass: unique storages, parameters excluded.

    By autograd, and of selectively checkpointed layers what their policy says is kept.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    keep = activation_checkpointing._policy
    storages: dict[int, torch.UntypedStorage] = {}

    def policy(*args: object, **kwargs: object) -> CheckpointPolicy:
        answer = keep(*args, **kwargs)
        if answer is CheckpointPolicy.MUST_SAVE:
            given = args[1].op_output
            for tensor in given if isinstance(given, tuple) else (given,):
                pack(tensor)
        return answer

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()  # held, so that no address is used twice
        if tensor.is_floating_point() and storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with (
        patch.object(activation_checkpointing, "_policy", policy),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=model.half_dtype is not None),
    ):
        model.causal_lm.model(input_ids=ids, position_ids=positions, use_cache=False)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("train", ["all", "nope", "nope_attention"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("documents", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, SELECTIVE, True])
def test_saved_activations(family: str, train: str, bf16: bool, documents: int, checkpointing: bool | str) -> None:
    model, shape, trainable = tiny_training(family, train, bf16, checkpointing)
    ids, positions = rows_of_tokens(100, rows=2, seq_len=96, documents=documents)
    batch = Microbatch(2, 96, bf16, trainable.everything, document_mask=documents > 1)
    expected = activations.final_norm_saved_bytes(shape, batch)
    if checkpointing:
        layers = shape.num_hidden_layers - trainable.first_backward(shape)
        expected += layers * activations.layer_input_bytes(shape, batch)
        expected += layers * activations.selective_saved_bytes(shape, batch) * (checkpointing == SELECTIVE)
    else:
        copies = sum(trainable.matmul_params(shape, i) for i in range(6)) if bf16 else 0
        expected += activations.rotary_bytes(shape, batch) + HALF_BYTES * copies
        expected += sum(activations.layer_saved_bytes(shape, batch, trainable, i) for i in range(6))
    assert expected == pytest.approx(saved_bytes(model, ids, positions), rel=0.02)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("train", ["all", "nope"])
def test_saved_activations_of_eager_attention(train: str, bf16: bool) -> None:
    model, shape, trainable = tiny_training("qwen3", train, bf16, False, attention="eager")
    ids, positions = rows_of_tokens(100, rows=1, seq_len=256, documents=2)
    batch = Microbatch(1, 256, bf16, trainable.everything, eager_attention=True)
    copies = sum(trainable.matmul_params(shape, i) for i in range(6)) if bf16 else 0
    expected = activations.final_norm_saved_bytes(shape, batch) + HALF_BYTES * copies
    expected += sum(activations.layer_saved_bytes(shape, batch, trainable, i) for i in range(6))
    assert expected == pytest.approx(saved_bytes(model, ids, positions), rel=0.02)


def test_layers_below_the_lowest_trainable_one_save_nothing() -> None:
    batch, trainable = Microbatch(1, 10, False, False), Trainable.of({2})
    saved = [activations.layer_saved_bytes(TINY, batch, trainable, i) for i in range(4)]
    assert saved[:2] == [0, 0] and saved[2] > saved[3] > 0


def test_saved_bytes_of_a_trainable_layer_by_hand() -> None:
    # bf16, stage 1, T = 10 rows of width 8, MLP 16, q 8, k and v 4 (8 with a mask), 2 heads; not the lowest.
    norm = 2 * 80 + 4 * 10  # bf16 input, fp32 1/rms
    attention = 2 * (80 + 80 + 80 + 80) + 4 * 10 * 2 + 2 * 100  # q, k, v, out; logsumexp; mask
    mlp = 2 * 3 * 160  # gate, up, their product
    inputs = 2 * 2 * 80  # of q, k and v, and of gate and up: a norm's output in bf16
    batch = Microbatch(1, 10, half=True, fp32_residual=False)
    assert activations.layer_saved_bytes(TINY, batch, Trainable.of({1, 2}), 2) == 2 * norm + attention + mlp + inputs
