"""A training step in fp16 equals that of fp32, and that of torch's autocast with GradScaler."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM, Qwen3ForCausalLM

from flare.config.options import Options
from flare.data.order import RowOrder
from flare.data.token_cache.cache import TokenCache
from flare.model.activation_checkpointing import checkpoint_layers
from flare.model.compile import compile_layers
from flare.optim import loss_scale
from flare.plan.trainable import Trainable
from tests.model.test_compile import batch
from tests.optim.fp16 import STAGES, fp16
from tests.train.test_training import cache, gradients, load, rows_of, trainer  # noqa: F401 (a fixture)


@pytest.mark.parametrize("checkpointing", [None, "full", "selective"])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("family", ["base", "base_qwen3"])
def test_losses_and_gradients_are_those_of_fp32(
    cache: TokenCache,  # noqa: F811
    tmp_path: Path,
    family: str,
    stage: int,
    checkpointing: str | None,
    request: pytest.FixtureRequest,
) -> None:
    """The loss to 1e-3, each gradient to 1 % of its norm (at least a hundredth of all gradients')."""
    directory = request.getfixturevalue(family)
    fp32 = trainer(load(directory, [1, 3], STAGES[stage]), cache, tmp_path)
    half = fp16(directory, cache, tmp_path, stage)
    if checkpointing:
        checkpoint_layers(half.components.model.causal_lm, checkpointing == "selective")
    expected, found = gradients(fp32), gradients(half)
    floor = 1e-2 * torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - gradient).norm() < 1e-2 * max(gradient.norm(), floor), name
    assert half.window[0].loss == pytest.approx(fp32.window[0].loss, rel=1e-3)
    assert half.window[0].grad_norm == pytest.approx(fp32.window[0].grad_norm, rel=1e-2)  # unscaled
    dtypes = {p.dtype for p in half.components.model.parameters()}
    assert dtypes == ({torch.float32} if stage == 2 else {torch.float32, torch.float16})


def test_clipping_is_of_the_unscaled_gradients(base: Path, cache: TokenCache, tmp_path: Path) -> None:  # noqa: F811
    clipped = gradients(fp16(base, cache, tmp_path, max_grad_norm=0.5))
    assert torch.stack([g.norm() for g in clipped.values()]).norm().item() == pytest.approx(0.5, rel=1e-4)


PLAIN = {"base": Qwen2ForCausalLM, "base_qwen3": Qwen3ForCausalLM}


@pytest.mark.parametrize("family", PLAIN)
def test_scales_and_skipped_steps_are_those_of_autocast_and_torchs_grad_scaler(
    cache: TokenCache,  # noqa: F811
    tmp_path: Path,
    family: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A plain model, trained as HF's Trainer does it: 14 steps, three of which overflow (their loss is multiplied by
    1e6), a growth after three good ones. The same scales exactly; losses to 2e-3."""
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    directory, bad = request.getfixturevalue(family), (2, 3, 8)
    ours = trainer(
        load(directory, [], Trainable(True), precision="fp16"), cache, tmp_path, max_steps=14, max_grad_norm=1.0
    )
    forward = ours.module.forward
    ours.module.forward = lambda **batch: forward(**batch) * (1e6 if ours.train_state.step in bad else 1.0)
    model = PLAIN[family].from_pretrained(directory)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    rows, order = rows_of(cache), RowOrder(Options().seed, len(rows_of(cache)))
    scales = []
    for step in range(14):
        batch = rows.batch(order.rows(4 * step, 4 * step + 4))
        ids, labels, positions = map(torch.from_numpy, (batch.input_ids, batch.labels, batch.position_ids))
        factor = 1e6 if step in bad else 1.0
        with torch.autocast("cpu", torch.float16):
            logits = model(ids, position_ids=positions, use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        scaler.scale(loss * factor).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        outcome = ours._step()
        assert outcome.loss_scale == scales[-1], step
        assert outcome.overflow == (step in bad)
        assert outcome.loss / factor == pytest.approx(loss.item(), rel=2e-3)
    assert ours.train_state.overflow_steps == 3
    assert scales[:4] == [2.0**16, 2.0**16, 2.0**15, 2.0**14] and max(scales[4:]) >= 2.0**15


def test_compiled_layers_match_eager_ones(base: Path) -> None:
    """aot_eager traces what inductor gets; fp16's rounding: the loss to 1e-3, the final norm's gradient to 1 %."""
    torch._dynamo.reset()
    models = [load(base, [1, 3], STAGES[1], precision="fp16") for _ in range(2)]
    compile_layers(models[1], "aot_eager")
    losses = [model(**batch(1)) for model in models]
    for loss in losses:
        loss.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-3)
    one, other = (dict(model.trainable_parameters()) for model in models)
    for name in (n for n in one if n.endswith("proj.weight")):
        assert (one[name].grad - other[name].grad).norm() < 1e-2 * one[name].grad.norm(), name
