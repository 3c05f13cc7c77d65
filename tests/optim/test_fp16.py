"""``--precision fp16``: what it rounds, how its loss is scaled, and that it is what torch and HF's Trainer do."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM, Qwen3ForCausalLM

from flare.config.options import Options
from flare.config.parse import resolve
from flare.data.order import RowOrder
from flare.data.token_cache.cache import TokenCache
from flare.data.training_rows import IGNORE_INDEX
from flare.errors import ConfigError, FlareError
from flare.evaluation.launch import with_precision
from flare.evaluation.options import EvaluationSettings
from flare.gpus.specs import lacks_bf16
from flare.model.activation_checkpointing import checkpoint_layers
from flare.model.compile import compile_layers
from flare.model.linear_cross_entropy import FP16_FOLD, _chunk_gradient, _InPlace, linear_cross_entropy_sum
from flare.nope.load import load_causal_lm
from flare.optim import loss_scale
from flare.optim.loss_scale import LossScale
from flare.optim.optimizer import optimizer_tensors
from flare.plan.trainable import Trainable
from flare.run.resolve import resolve_run
from flare.run.run import Hardware
from flare.train.step_results import PendingResults
from flare.train.trainer import Trainer
from tests.conftest import write_base
from tests.fake_nvidia_smi import install
from tests.model.test_compile import batch
from tests.optim.overflow_ranks import BROKEN
from tests.processes import run_script, script_environment, torchrun, train
from tests.train.test_step_results import poison, weights
from tests.train.test_training import cache, gradients, load, rows_of, trainer  # noqa: F401 (a fixture)

VOCAB_SIZE = 151_936
STAGES = {1: Trainable(False, (1, 3)), 2: Trainable(True)}


def fp16(base: Path, cache: TokenCache, tmp_path: Path, stage: int = 2, **changes: object) -> Trainer:  # noqa: F811
    return trainer(load(base, [1, 3], STAGES[stage], precision="fp16"), cache, tmp_path, **changes)


# -- the loss ------------------------------------------------------------------------------------------------


def test_gradients_over_qwens_vocabulary_are_closer_to_float64_than_bf16s() -> None:
    """On the same operands, relative to the norm, a vocabulary of 151,936: fp16 3.4e-4, bf16 2.6e-3."""
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(64, 32), torch.randn(VOCAB_SIZE, 32) / 2, torch.randint(0, VOCAB_SIZE, (64,))
    errors = {}
    for dtype in (torch.float16, torch.bfloat16):
        ours = [hidden.to(dtype).requires_grad_(), weight.to(dtype).float().requires_grad_()]
        exact = [tensor.detach().double().requires_grad_() for tensor in ours]
        expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, labels, reduction="sum")
        expected.backward()
        loss = linear_cross_entropy_sum(*ours, labels)
        (loss * 1024).backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
        errors[dtype] = [
            ((o.grad.double() / 1024 - e.grad).norm() / e.grad.norm()).item() for o, e in zip(ours, exact, strict=True)
        ]
    assert max(errors[torch.float16]) < 5e-4 < min(errors[torch.bfloat16])


@pytest.mark.parametrize("on_gpu", [False, True])
def test_no_probability_of_qwens_vocabulary_loses_digits_in_fp16(on_gpu: bool) -> None:
    """The gradient by the logits, the GPUs' way and the CPU's: each number within half a step (4.9e-4) of float64 on
    the same logits, 1 / 151,936 and a thousandth of it alike; unfolded, fp16 holds those to 3e-8: the second as 0."""
    torch.manual_seed(0)
    logits, labels = torch.randn(8, VOCAB_SIZE).half(), torch.randint(0, VOCAB_SIZE, (8,))
    logits[:, ::2] -= 7
    logits[3, labels[3]] = 16.0  # a probability near 1
    labels[5] = IGNORE_INDEX
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, labels, reduction="sum")
    expected.backward()
    if on_gpu:
        nll, gradient = _chunk_gradient(logits, _Unchanged(logits), labels)
    else:
        place = _InPlace.__new__(_InPlace)
        place.wide = torch.empty(8, VOCAB_SIZE)
        wanted = (labels != IGNORE_INDEX)[:, None]
        gradient = logits.clone()
        nll = place._block(gradient, wanted, torch.where(wanted, labels[:, None], 0))
    assert nll.item() == pytest.approx(expected.item(), rel=1e-6)
    assert gradient.dtype == torch.float16
    assert exact.grad.abs()[exact.grad != 0].min() < 1e-8
    beyond = exact.grad.abs() > 2e-9  # below, fp16 has no full digits even when folded
    found = gradient.double() / FP16_FOLD
    assert torch.allclose(found[beyond], exact.grad[beyond], rtol=4.9e-4, atol=0)
    assert torch.allclose(found, exact.grad, rtol=4.9e-4, atol=2e-12)


class _Unchanged:
    """A head whose product with the rows is the rows."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.T = self
        self.rows = rows

    def __rmatmul__(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.clone()


def test_a_token_that_every_row_predicts_wrongly_overflows_no_product() -> None:
    """The gradient of its head row is a sum over 512 rows of hidden states of size 200: 102,400, beyond fp16."""
    hidden, weight = torch.full((512, 8), 200.0).half().requires_grad_(), torch.zeros(300, 8, requires_grad=True)
    linear_cross_entropy_sum(hidden, weight, torch.full((512,), 7)).backward()
    assert weight.grad[7].tolist() == pytest.approx([-102_400 * 299 / 300] * 8, rel=1e-3)


# -- a step ----------------------------------------------------------------------------------------------------


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
    whole = trainer(load(directory, [1, 3], STAGES[stage]), cache, tmp_path)
    half = fp16(directory, cache, tmp_path, stage)
    if checkpointing:
        checkpoint_layers(half.components.model.causal_lm, checkpointing == "selective")
    expected, found = gradients(whole), gradients(half)
    floor = 1e-2 * torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - gradient).norm() < 1e-2 * max(gradient.norm(), floor), name
    assert half.window[0].loss == pytest.approx(whole.window[0].loss, rel=1e-3)
    assert half.window[0].grad_norm == pytest.approx(whole.window[0].grad_norm, rel=1e-2)  # unscaled
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


def test_compiled_layers_give_what_eager_ones_give(base: Path) -> None:
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


def test_an_overflow_leaves_8_bit_moments_as_they_were(cache: TokenCache, tmp_path: Path) -> None:  # noqa: F811
    wide = write_base(tmp_path / "wide", hidden_size=128, intermediate_size=256)
    runner = fp16(wide, cache, tmp_path, optim="adamw_torch_8bit")
    forward = runner.module.forward
    runner.module.forward = lambda **batch: forward(**batch) * (1e7 if runner.train_state.step == 1 else 1.0)
    held = []
    for _ in range(3):
        runner._step()
        tensors = optimizer_tensors(runner.components.optimizer) | weights(runner)
        held.append({name: tensor.clone() for name, tensor in tensors.items()})
    assert any(name.endswith("|codes") for name in held[0])
    assert all(torch.equal(tensor, held[1][name]) for name, tensor in held[0].items())
    assert not all(torch.equal(tensor, held[2][name]) for name, tensor in held[1].items())


# -- overflow ------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0, 1], ids=["lag 0", "lag 1"])
def runner(request: pytest.FixtureRequest, base: Path, cache: TokenCache, tmp_path: Path) -> Trainer:  # noqa: F811
    """Reads each step's numbers at once, or a step later as on a GPU."""
    runner = fp16(base, cache, tmp_path)
    runner.pending = PendingResults(torch.device("cpu"), request.param, runner.loss_scale)
    return runner


def test_an_overflow_is_passed_over_counted_and_halves_the_scale(
    runner: Trainer, caplog: pytest.LogCaptureFixture
) -> None:
    """Step 2 of three, whatever --skip_nonfinite is; with a lag the device decides, and the host learns it later."""
    forward = runner.module.forward
    runner.module.forward = lambda **batch: forward(**batch) * (1e7 if runner.train_state.step == 1 else 1.0)
    held = [weights(runner)]
    with caplog.at_level("INFO", logger="flare"):
        for _ in range(3):
            runner._step()
            held.append(weights(runner))
        runner._read_results()
    changed = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in itertools.pairwise(held)]
    assert changed == [True, False, True]
    adam_steps = {state["step"].item() for state in runner.components.optimizer.state.values()}
    assert adam_steps == {2.0}
    state = runner.train_state
    assert (state.step, state.rows, state.overflow_steps, state.skipped_steps) == (3, 12, 1, 0)
    assert (state.loss_scale, state.good_steps) == (2.0**15, 1)
    assert len(runner.window) == 3
    assert "step 2: the gradients overflow fp16, no update; loss scale 32768 from here on" in caplog.text


def test_the_log_has_the_scale_and_a_norm_that_json_can_hold(
    base: Path,
    cache: TokenCache,  # noqa: F811
    tmp_path: Path,
) -> None:
    runner = fp16(base, cache, tmp_path)
    runner.loss_scale.scale.fill_(2.0**40)
    runner._step()
    runner._log()
    (record,) = runner.train_state.history
    assert (record["grad_norm"], record["loss_scale"], record["overflow_steps"]) == (None, 2.0**39, 1)
    json.dumps(record, allow_nan=False)


def test_a_loss_that_is_not_finite_is_an_error_in_fp16_too(runner: Trainer) -> None:
    poison(runner, step=1)
    runner._step()
    before = weights(runner)
    with pytest.raises(FlareError, match=r"step 2: loss inf .*not updated.*fp16 ends at 65,504: --precision fp32"):
        for _ in range(2):
            runner._step()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(runner).items())
    assert runner.train_state.overflow_steps == 0


def test_gradients_that_overflow_at_any_scale_are_an_error(runner: Trainer) -> None:
    """From a scale of 2: one overflow leaves 1, the second one nothing to try; in between nothing is updated."""
    runner.loss_scale.scale.fill_(2.0)
    unscale = runner.loss_scale.unscale

    def broken(parameters: list[torch.nn.Parameter]) -> None:
        unscale(parameters)
        parameters[0].grad.fill_(float("nan"))

    runner.loss_scale.unscale = broken
    before = weights(runner)
    with pytest.raises(FlareError, match=r"step 2: loss [\d.]+ and gradient norm nan are not finite"):
        for _ in range(4):
            runner._step()
    assert (runner.train_state.step, runner.train_state.overflow_steps) == (1, 1)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(runner).items())


def test_good_steps_double_the_scale_at_torchs_pace() -> None:
    ours = LossScale(torch.device("cpu"), 1024.0, good_steps=1998)
    for expected in ((1024.0, 1999), (2048.0, 0), (2048.0, 1)):
        ours.update(torch.zeros(()))
        assert (ours.scale.item(), ours.good_steps.item()) == expected


@pytest.mark.parametrize(
    ("parallel", "lag"),
    [
        pytest.param("ddp", 0, marks=pytest.mark.slow),
        ("ddp", 1),
        ("fsdp", 0),
        pytest.param("fsdp", 1, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_skip_and_halve_alike(
    base: Path, corpus: Path, cache_dir: Path, tmp_path: Path, parallel: str, lag: int
) -> None:
    """From a scale of 2**34 down to what fits; then once more, for a gradient of rank 1 alone."""
    out = tmp_path / "found.json"
    torchrun(2, "tests.optim.overflow_ranks", base, corpus, cache_dir, out, parallel, lag)
    first, second = json.loads(out.read_text())
    assert first == second
    scales, changed = first["scales"], first["changed"]
    assert 5 < changed.index(True) < BROKEN
    assert (changed[BROKEN - 1], changed[BROKEN]) == (True, False)
    for scale, before, updated in zip(scales, [2.0**34, *scales], changed, strict=False):
        assert scale == (before if updated else before / 2)
    assert first["overflow_steps"] == changed.count(False)


# -- runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose head is so large that the first four steps overflow."""
    directory = write_base(tmp_path_factory.mktemp("fp16") / "base", tie_word_embeddings=False)
    model = load_causal_lm(directory)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    model.save_pretrained(directory)
    return directory


def state_of(run: Path, step: int) -> dict:
    return json.loads((run / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json").read_text())["progress"]


def test_a_run_that_stops_among_overflows_goes_on_to_the_same_bits(
    train_flags: list[str], overflowing: Path, tmp_path: Path
) -> None:
    """Stopped after step 2, whose scale and count a fresh start would not have. On two processes the gradients of a
    row are twice as large before their mean is taken, as HF's are, so there more steps may overflow."""
    flags = [*train_flags, "--stage", 2, "--precision", "fp16", "--model_name_or_path", overflowing]
    flags += ["--lr_scheduler_type", "constant", "--global_batch_size", 2]
    out = tmp_path / "out"
    assert train(*flags, "--max_steps", 2).returncode == 0
    assert (state_of(out / "run", 2)["loss_scale"], state_of(out / "run", 2)["overflow_steps"]) == (2.0**14, 2)
    shutil.copytree(out / "run", out / "two")
    for name, *layout in (("run",), ("unbroken",), ("two", "--nproc_per_node", 2)):
        result = train(*flags, "--max_steps", 7, "--experiment_name", name, *layout)
        assert result.returncode == 0, result.stderr
    ends = [out / name / "checkpoints" / "checkpoint-7" for name in ("run", "unbroken")]
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert ends[0].joinpath(file).read_bytes() == ends[1].joinpath(file).read_bytes()
    names = ("loss_scale", "good_steps", "overflow_steps")
    states = [[state_of(out / name, 7)[key] for key in names] for name in ("run", "unbroken")]
    assert states[0] == states[1] == [2.0**12, 3, 4]
    log = (out / "run" / "training.log").read_text()
    assert "loss scale 4096 from here on (4 such steps so far)" in log
    assert [r["overflow_steps"] for r in losses_of(out / "run")] == [1, 2, 3, 4, 4, 4, 4]
    third = losses_of(out / "two")[2]
    assert (third["overflow_steps"], third["loss_scale"]) == (3, 2.0**13)
    assert third["loss"] == pytest.approx(losses_of(out / "run")[2]["loss"], rel=1e-3)


def losses_of(run: Path) -> list[dict]:
    history = json.loads((run / "training_metrics.json").read_text())["stages"]["2"]["history"]
    return [record for record in history if "loss" in record]


@pytest.mark.parametrize(
    "layout", [(), pytest.param(("--nproc_per_node", 2, "--parallel", "fsdp"), marks=pytest.mark.slow)]
)
def test_stage_one_runs_and_resumes_in_fp16(train_flags: list[str], tmp_path: Path, layout: tuple) -> None:
    for steps in (2, 4):
        result = train(*train_flags, "--precision", "fp16", "--max_steps", steps, *layout)
        assert result.returncode == 0, result.stderr
    assert "resumes from checkpoint-2" in result.stderr
    assert "precision fp16 (as requested)" in result.stderr
    refused = train(*train_flags, "--precision", "bf16", "--max_steps", 6, *layout)
    assert refused.returncode != 0
    assert "precision: fp16 -> bf16" in refused.stderr


# -- which GPUs ---------------------------------------------------------------------------------------------


def plan_on(server: str, base: Path, tmp_path: Path, *flags: object):
    fake = install(tmp_path / "smi", server)
    environment = script_environment(PATH=fake.environment()["PATH"])
    environment.pop("CUDA_VISIBLE_DEVICES")
    return run_script(
        "train_qwen_multi_gpu.py", "--dry_run", "--model_name_or_path", base, "--base_output_dir", tmp_path / "out",
        "--max_seq_length", 64, *flags, env=environment,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("server", "said"),
    [
        ("v100", ["fp16, DDP", "fp16 auto: GPU 0 (Tesla V100-SXM2-32GB) is older than Ampere and has no bf16"]),
        ("old_and_new", ["fp16, DDP", "fp16 auto: GPU 1 (Quadro RTX 6000) is older than Ampere"]),
        ("guide", ["bf16, DDP"]),
    ],
)
def test_auto_takes_fp16_where_a_gpu_is_older_than_ampere(
    base: Path, tmp_path: Path, server: str, said: list[str]
) -> None:
    result = plan_on(server, base, tmp_path)
    assert result.returncode == 0, result.stderr
    text = " ".join((result.stdout + result.stderr).split())
    assert all(words in text for words in said), text


def test_bf16_on_old_gpus_is_refused_in_one_line(base: Path, tmp_path: Path) -> None:
    result = plan_on("v100", base, tmp_path, "--precision", "bf16")
    assert result.returncode == 2
    assert "--precision bf16: GPU 0 (Tesla V100-SXM2-32GB) is older than Ampere and has no bf16" in result.stderr
    assert "use --precision fp16" in result.stderr
    assert "Traceback" not in result.stderr


def test_attention_kernels_that_need_ampere_are_not_taken_in_fp16(base: Path, tmp_path: Path) -> None:
    flags = ["--model_name_or_path", str(base), "--base_output_dir", str(tmp_path), "--max_seq_length", "64"]
    flags += ["--precision", "fp16"]
    assert resolve_run(resolve(flags), Hardware(True, 1)).attention == "sdpa"
    with pytest.raises(ConfigError, match="varlen runs on GPUs in bf16 only"):
        resolve_run(resolve([*flags, "--attn_implementation", "varlen"]), Hardware(True, 1))


@pytest.mark.parametrize(
    ("names", "lack"),
    [
        (
            ("Tesla V100-SXM2-32GB", "Tesla V100S-PCIE-32GB", "GRID V100-8Q", "Tesla P100-PCIE-16GB", "Tesla P40",
             "Tesla T4", "NVIDIA T4", "Tesla K80", "NVIDIA TITAN V", "TITAN RTX", "TITAN X (Pascal)",
             "NVIDIA GeForce RTX 2080 Ti", "GeForce RTX 2070 SUPER", "NVIDIA GeForce RTX 2060", "GeForce GTX 1080 Ti",
             "NVIDIA GeForce GTX 1660 SUPER", "Quadro RTX 8000", "Quadro GV100", "NVIDIA T1000 8GB"), True,
        ),
        (
            ("NVIDIA A100-SXM4-80GB", "NVIDIA A800 80GB PCIe", "NVIDIA A40", "NVIDIA A10", "NVIDIA A2",
             "NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 2050", "NVIDIA GeForce RTX 4090", "NVIDIA RTX A4000",
             "NVIDIA RTX 4000 SFF Ada Generation", "NVIDIA L4", "NVIDIA L40S", "NVIDIA H100 80GB HBM3", "NVIDIA H20",
             "NVIDIA H200", "NVIDIA B200", "NVIDIA GH200 480GB", "NVIDIA GB10", "NVIDIA RTX 2000 Ada Generation",
             "NVIDIA RTX PRO 6000 Blackwell Server Edition"), False,
        ),
    ],
)  # fmt: skip
def test_names_tell_which_gpus_are_older_than_ampere(names: tuple[str, ...], lack: bool) -> None:
    assert [name for name in names if lacks_bf16(name) != lack] == []


@pytest.mark.parametrize(
    ("asked", "on_gpu", "old", "expected"),
    [("auto", True, True, "fp16"), ("auto", True, False, "bf16"), ("auto", False, False, "fp32"),
     ("bf16", True, True, "bf16")],
)  # fmt: skip
def test_evaluation_on_old_gpus_is_in_fp16(asked: str, on_gpu: bool, old: bool, expected: str) -> None:
    settings = EvaluationSettings("model", ("data",), Path("out"), precision=asked)
    assert with_precision(settings, on_gpu, old).precision == expected
