"""Shapes and small models that the tests of the plan use."""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from flare.model.patches import apply_patches
from flare.model.training_model import TrainingModel, set_trainable
from flare.nope.layers import auto_band
from flare.nope.modeling_nope import remove_rope
from flare.plan.inputs import PlanInputs
from flare.plan.model_shape import ModelShape, known_shape
from flare.plan.trainable import Trainable

A800, A40 = ("NVIDIA A800 80GB PCIe", 81920), ("NVIDIA A40", 46068)


CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}


MODELS = {"qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM}


TINY = ModelShape("qwen2", 4, 8, 2, 1, 4, 16, 100, True, name="tiny")
"""By hand, per layer: q 64, k 32, v 32, o 64 weights, biases 8 + 4 + 4; MLP 3 x 128; norms 2 x 8."""


def qwen(name: str, stage: int, gpus: tuple = (), **changes: object) -> PlanInputs:
    """A shipped kind of run: the guide's NoPE band of a known model, one process a GPU."""
    shape = known_shape(f"Qwen/{name}")
    nope_layers = tuple(auto_band(shape.num_hidden_layers))
    return PlanInputs(shape, stage, nope_layers, world_size=len(gpus) or 1, gpus=gpus, **changes)


def tiny_training(
    family: str, train: str, bf16: bool, checkpointing: bool | str, attention: str = "sdpa", **changes: object
) -> tuple[TrainingModel, ModelShape, Trainable]:
    """A small model as the trainer prepares it: 6 layers, NoPE layers 2 and 3."""
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 100, "tie_word_embeddings": True}
    sizes |= {"head_dim": 24} if family == "qwen3" else {}
    torch.manual_seed(0)
    config = CONFIGS[family](**(sizes | changes), attn_implementation=attention)
    model = MODELS[family](config)
    remove_rope(model.model, [2, 3])
    trainable = Trainable.of("all" if train == "all" else {2, 3}, train == "nope_attention")
    set_trainable(model, trainable, "bf16" if bf16 else "fp32")
    model.train()
    training_model = TrainingModel(model, torch.bfloat16 if bf16 else None)
    apply_patches(training_model, gradient_checkpointing=checkpointing)
    assert trainable.params(ModelShape.from_config(config.to_dict())) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    return training_model, ModelShape.from_config(config.to_dict()), trainable


def rows_of_tokens(vocab_size: int, rows: int, seq_len: int, documents: int) -> tuple[torch.Tensor, ...]:
    """(input_ids, position_ids), each (B, T); several documents a row make SDPA use a mask."""
    length = seq_len // documents
    positions = (torch.arange(seq_len) % length).repeat(rows, 1)
    return torch.randint(0, vocab_size, (rows, seq_len)), positions
