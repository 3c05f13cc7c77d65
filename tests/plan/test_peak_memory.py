"""The peak memory of a step and of the loss, compared with torch's CPU allocator."""

from dataclasses import replace

import pytest
import torch

from benchmarks.allocated import allocated_peak
from flare.config.options import SELECTIVE
from flare.model import linear_cross_entropy
from flare.optim.optimizer import optimizer_tensors, parameter_groups
from flare.plan.activations import Microbatch
from flare.plan.inputs import PlanInputs
from flare.plan.memory import loss_bytes, memory
from flare.plan.optimizer_state import ADAM_STATE_BYTES
from flare.plan.trainable import Trainable
from tests.plan.models import TINY, rows_of_tokens, tiny_training

LONG_CASES = {  # activations and the loss decide
    "layers' backward": {},
    "checkpointing": {"checkpointing": True},
    "selective": {"checkpointing": SELECTIVE},
    "selective, no document mask": {"checkpointing": SELECTIVE, "documents": 1},
    "selective, eager attention": {"checkpointing": SELECTIVE, "attention": "eager", "rows": 1, "seq_len": 512},
    "no document mask": {"documents": 1},
    "loss": {"vocab_size": 12000, "checkpointing": True},
    "accumulation": {"accumulation": 2, "checkpointing": True},
    "long rows": {
        "rows": 1,
        "seq_len": 1024,
        "hidden_size": 64,
        "intermediate_size": 256,
        "checkpointing": True,
    },
    "eager attention": {"attention": "eager", "rows": 1, "seq_len": 512},
}


SHORT_CASES = {  # weights, their gradients and their copies decide
    "wide loss": {"vocab_size": 8000, "hidden_size": 512, "seq_len": 300},
    "embedding": {"vocab_size": 9000},
    "accumulated embedding": {"vocab_size": 9000, "accumulation": 2},
    "untied": {"vocab_size": 9000, "tie_word_embeddings": False},
    "copies": {"accumulation": 2, "intermediate_size": 3000},
    "optimizer": {"vocab_size": 9000, "fused": False},
}


@pytest.mark.parametrize("case", LONG_CASES)
@pytest.mark.parametrize("train", ["all", "nope"])
@pytest.mark.parametrize("bf16", [False, True])
def test_peak_memory_of_a_step(case: str, train: str, bf16: bool) -> None:
    assert_peak("qwen3" if case in ("checkpointing", "selective") else "qwen2", train, bf16, **LONG_CASES[case])


@pytest.mark.parametrize("case", SHORT_CASES)
@pytest.mark.parametrize("bf16", [False, True])
def test_peak_memory_of_a_step_with_few_tokens(case: str, bf16: bool) -> None:
    few_tokens = {"rows": 1, "seq_len": 16, "checkpointing": True}
    assert_peak("qwen2", "all", bf16, **(few_tokens | SHORT_CASES[case]))


def assert_peak(
    family: str,
    train: str,
    bf16: bool,
    rows: int = 2,
    seq_len: int = 256,
    documents: int = 2,
    accumulation: int = 1,
    checkpointing: bool | str = False,
    fused: bool = True,
    attention: str = "sdpa",
    **sizes: object,
) -> None:
    """The plan of a complete optimizer step, without resident memory, within 3 % of what torch allocates."""
    sizes = {"hidden_size": 128, "intermediate_size": 512} | sizes
    model, shape, trainable = tiny_training(family, train, bf16, checkpointing, attention, **sizes)
    groups = parameter_groups(model.trainable_parameters(), 0.0)
    optimizer = torch.optim.AdamW(groups, lr=1e-6, fused=fused)
    ids, positions = rows_of_tokens(shape.vocab_size, rows, seq_len, documents)

    def step() -> None:
        for _ in range(accumulation):
            model(ids, ids, positions).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # makes the optimizer's state, which is resident
    inputs = PlanInputs(
        shape,
        trainable=Trainable.of("all" if train == "all" else (2, 3)),
        precision="bf16" if bf16 else "fp32",
        per_device_batch=rows,
        accumulation=accumulation,
        seq_len=seq_len,
        gradient_checkpointing=checkpointing,
        document_mask=documents > 1,
        optimizer="adamw_torch_fused" if fused else "adamw_torch",
        attn_implementation=attention,
    )
    need = memory(inputs)
    moments = ADAM_STATE_BYTES * trainable.params(shape)
    assert need.peak_bytes - need.weights - moments == pytest.approx(allocated_peak(step), rel=0.03)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    state = optimizer_tensors(optimizer)
    assert need.weights == weights
    assert moments == sum(t.nbytes for name, t in state.items() if not name.endswith("|step"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize(("vocab_size", "hidden_size"), [(4000, 128), (3000, 1024)])
def test_peak_memory_of_the_loss(dtype: torch.dtype, head_trains: bool, vocab_size: int, hidden_size: int) -> None:
    # Not a leaf, as in the model: its gradient is passed on, not stored.
    hidden = torch.randn(1024, hidden_size, dtype=dtype) + torch.zeros(1, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab_size, hidden_size).requires_grad_(head_trains)
    weight = weight if head_trains else weight.to(dtype)
    labels = torch.randint(0, vocab_size, (1024,))
    shape = replace(TINY, vocab_size=vocab_size, hidden_size=hidden_size)
    batch = Microbatch(1, 1024, dtype != torch.float32, head_trains, fp16=dtype == torch.float16)
    expected = loss_bytes(shape, batch, head_trains)
    peak = allocated_peak(lambda: linear_cross_entropy.linear_cross_entropy_sum(hidden, weight, labels).backward())
    scratch = (
        0 if head_trains or batch.fp16 else scratch_of_a_product(1024, weight)
    )  # with its gradient, another moment is the peak
    assert expected == pytest.approx(peak - scratch, rel=0.05)


def scratch_of_a_product(rows: int, weight: torch.Tensor) -> int:
    """Bytes that oneDNN works in for (rows, V) @ (V, H): a few MB at every size, which no formula has."""
    gradient, out = weight.new_zeros(rows, len(weight)), weight.new_empty(rows, weight.shape[1])
    return allocated_peak(lambda: torch.mm(gradient, weight.detach(), out=out))
