"""Training in this process: the loss, what trains and what is frozen, against plain transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM, Qwen3ForCausalLM

from benchmarks.bare_trainer import bare_trainer
from flare.config.options import Options
from flare.data.order import RowOrder
from flare.data.packing import PackedRows
from flare.data.sources.base import SourceSpec
from flare.data.sources.open import open_source
from flare.data.token_cache.build import build_token_cache
from flare.data.token_cache.cache import TokenCache, TokenSettings
from flare.data.validation_split import split_documents
from flare.distributed.process_group import World
from flare.errors import FlareError
from flare.hub import read_model_config
from flare.model.activation_checkpointing import checkpoint_layers
from flare.model.patches import apply_patches
from flare.model.training_model import TrainingModel, load_for_training
from flare.nope.config_json import with_nope
from flare.nope.load import load_causal_lm, load_tokenizer
from flare.optim.lr_schedule import build_schedule
from flare.optim.optimizer import build_optimizer
from flare.plan.trainable import Trainable
from flare.train.trainer import Trainer
from tests.conftest import write_base

SEQ_LEN = 32


@pytest.fixture(scope="session")
def cache(corpus: Path, base: Path, cache_dir: Path) -> TokenCache:
    source = open_source(SourceSpec(str(corpus)), cache_dir)
    return build_token_cache(source, load_tokenizer(base), cache_dir, TokenSettings())


def rows_of(cache: TokenCache, packing: str = "document") -> PackedRows:
    return PackedRows(cache, split_documents(cache.hashes, 10)[0], SEQ_LEN, packing)


def load(directory: Path, layers: list[int], trainable: Trainable, **kwargs: str) -> TrainingModel:
    config = with_nope(read_model_config(directory), layers, None, "test")
    precision, attention = kwargs.get("precision", "fp32"), kwargs.get("attention", "auto")
    model = load_for_training(directory, config, trainable, precision, attention)
    apply_patches(model)
    return model


def trainer(model: TrainingModel, cache: TokenCache, tmp_path: Path, batch: int = 4, **changes: object) -> Trainer:
    options = Options(**({
        "learning_rate": 1e-3, "per_device_train_batch_size": 2, "max_steps": 10, "max_seq_length": SEQ_LEN,
        "eval_steps": None, "max_grad_norm": 0.0, "lr_scheduler_type": "constant",
    } | changes))  # fmt: skip
    return bare_trainer(model, rows_of(cache), options, World(0, 0, 1, torch.device("cpu")), [batch], tmp_path)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["base", "base_qwen3"])
def test_packed_documents_have_the_same_loss_as_alone(
    cache: TokenCache, family: str, attention: str, request: pytest.FixtureRequest
) -> None:
    model = load(request.getfixturevalue(family), [1, 3], Trainable(True), attention=attention).eval()
    documents = split_documents(cache.hashes, 10)[0]
    rows = PackedRows(cache, documents, 500, "document")
    batch = rows.batch(np.array([0, 1]))
    packed, _ = model.score(*map(torch.from_numpy, (batch.input_ids, batch.labels, batch.position_ids)))
    checked = 0
    for index in range(2):
        starts = np.flatnonzero(batch.position_ids[index] == 0)
        assert len(starts) > 1  # several documents share the row
        for first, last in zip(starts, [*starts[1:], 500], strict=True):
            ids = torch.from_numpy(batch.input_ids[index, first:last])[None]
            with torch.no_grad():
                logits = model.causal_lm(ids).logits[0]
            alone = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
            torch.testing.assert_close(packed[index, first : last - 1], alone, rtol=1e-4, atol=1e-4)
            checked += len(alone)
    assert checked > 500


@pytest.mark.parametrize(("family", "plain"), [("base", Qwen2ForCausalLM), ("base_qwen3", Qwen3ForCausalLM)])
def test_ten_steps_without_nope_layers_equal_a_plain_pytorch_loop(
    cache: TokenCache, tmp_path: Path, family: str, plain: type, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(family)
    ours = trainer(load(directory, [], Trainable(True)), cache, tmp_path)
    losses = [ours._step()[0] for _ in range(10)]

    model = plain.from_pretrained(directory)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    rows, order = rows_of(cache), RowOrder(Options().seed, len(rows_of(cache)))
    for step in range(10):
        batch = rows.batch(order.rows(4 * step, 4 * step + 4))
        ids, labels, positions = map(torch.from_numpy, (batch.input_ids, batch.labels, batch.position_ids))
        logits = model(ids, position_ids=positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5)


def gradients(runner: Trainer) -> dict[str, torch.Tensor]:
    """Gradients of the first step, caught before the update."""
    caught: dict[str, torch.Tensor] = {}
    parameters = dict(runner.components.model.trainable_parameters())

    def catch(*_: object) -> None:
        caught.update({n: p.grad.clone() for n, p in parameters.items()})

    runner.components.optimizer.register_step_pre_hook(catch)
    runner._step()
    return caught


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_accumulation_gives_the_loss_and_gradients_of_one_big_batch(
    cache: TokenCache, base: Path, tmp_path: Path, micro: int
) -> None:
    whole = trainer(load(base, [1, 3], Trainable(True)), cache, tmp_path, per_device_train_batch_size=4)
    parts = trainer(load(base, [1, 3], Trainable(True)), cache, tmp_path, per_device_train_batch_size=micro)
    expected, found = gradients(whole), gradients(parts)
    # A NoPE layer's key bias adds the same to every score of a query: its true gradient is zero, and the
    # computed one is rounding. So small gradients are measured against the norm of all gradients.
    floor = 1e-3 * torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        difference = (found[name] - gradient).norm() / max(gradient.norm(), floor)
        assert difference < 1e-5, name


@pytest.mark.parametrize("selective", [False, True])
def test_gradient_checkpointing_changes_only_memory(
    cache: TokenCache, base: Path, tmp_path: Path, selective: bool
) -> None:
    plain = gradients(trainer(load(base, [1, 3], Trainable(True)), cache, tmp_path))
    model = load(base, [1, 3], Trainable(True))
    assert checkpoint_layers(model.causal_lm, selective) == [0, 1, 2, 3]
    for name, gradient in gradients(trainer(model, cache, tmp_path)).items():
        assert torch.equal(gradient, plain[name]), name


@pytest.mark.parametrize("attention_only", [False, True])
def test_stage_one_leaves_frozen_parameters_bit_identical(
    cache: TokenCache, base: Path, tmp_path: Path, attention_only: bool
) -> None:
    model = load(base, [1, 3], Trainable(False, (1, 3), attention_only))
    before = {n: p.detach().clone() for n, p in model.causal_lm.named_parameters()}
    runner = trainer(model, cache, tmp_path, weight_decay=0.1)
    for _ in range(3):
        runner._step()
    for name, parameter in model.causal_lm.named_parameters():
        part = "self_attn" if attention_only else ""
        trains = any(f"layers.{i}.{part}" in name for i in (1, 3))
        assert parameter.requires_grad == trains
        assert torch.equal(parameter, before[name]) != trains, name


def test_nothing_below_the_lowest_trainable_layer_is_saved_for_a_backward(cache: TokenCache, base: Path) -> None:
    model = load(base, [2], Trainable(False, (2,)))
    needs_grad = []
    for layer in model.causal_lm.model.layers:
        layer.register_forward_pre_hook(lambda module, args: needs_grad.append(args[0].requires_grad))
    batch = rows_of(cache).batch(np.array([0]))
    below: list[torch.Tensor] = []
    boundary = model.causal_lm.model.layers[2].register_forward_pre_hook(lambda *_: below.append(len(saved)))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(*map(torch.from_numpy, (batch.input_ids, batch.labels, batch.position_ids)))
    boundary.remove()
    assert needs_grad == [False, False, False, True]
    assert below == [0]
    assert len(saved) > 0
    assert checkpoint_layers(model.causal_lm) == [2, 3]


def test_bf16_run_holds_frozen_weights_in_bf16_and_trainable_ones_as_fp32_masters(
    cache: TokenCache, base: Path, tmp_path: Path
) -> None:
    model = load(base, [3], Trainable(False, (3,)), precision="bf16")
    for _, parameter in model.causal_lm.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
    runner = trainer(model, cache, tmp_path, learning_rate=1e-6)
    before = {n: p.detach().clone() for n, p in model.trainable_parameters()}
    for _ in range(2):
        runner._step()
    for name, parameter in model.trainable_parameters():  # an update of 1e-6 is lost in bf16, not in fp32
        assert not torch.equal(parameter, before[name]), name


def test_trainable_parses_what_users_type() -> None:
    assert Trainable.parse(None, 1, [2, 3], 8) == Trainable(False, (2, 3))
    assert Trainable.parse(None, 2, [2, 3], 8) == Trainable(True)
    assert Trainable.parse(["nope_attention"], 2, [2], 8) == Trainable(False, (2,), True)
    assert Trainable.parse(["every:4"], 1, [], 8) == Trainable(False, (3, 7))
    with pytest.raises(FlareError, match="nothing to train"):
        Trainable.parse(None, 1, [], 8)
    with pytest.raises(FlareError, match="--train_layers: layer 8 is out of range"):
        Trainable.parse(["8"], 1, [], 8)


def test_weight_decay_leaves_norms_and_biases_alone(base: Path) -> None:
    model = load(base, [], Trainable(True))
    optimizer = build_optimizer(model.trainable_parameters(), Options(learning_rate=1e-3, weight_decay=0.5))
    by_name = {n: g["weight_decay"] for g in optimizer.param_groups for n in g["names"]}
    assert len(by_name) == len(list(model.trainable_parameters()))
    for name, decay in by_name.items():
        assert decay == (0.0 if "norm" in name or name.endswith("bias") else 0.5), name


def test_schedule_is_transformers_own() -> None:
    from transformers import get_cosine_schedule_with_warmup

    schedule = build_schedule(Options(learning_rate=1.0, warmup_ratio=0.1), 100)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, 10, 100)
    for step in range(100):
        assert schedule(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_untied_head_trains_too(cache: TokenCache, tmp_path: Path) -> None:
    model = load(write_base(tmp_path / "untied", tie_word_embeddings=False), [1], Trainable(True))
    found = gradients(trainer(model, cache, tmp_path))
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(found)
    assert load_causal_lm(tmp_path / "untied").config.tie_word_embeddings is False
