"""The plan as a table: every row, aligned, at most 100 columns wide."""

import re
from dataclasses import replace
from functools import cache

from flare.config.options import SELECTIVE
from flare.plan.capacity import GIB
from flare.plan.inputs import PlanInputs
from flare.plan.model_shape import KNOWN_SHAPES
from flare.plan.plan import check_fits, make_plan
from flare.plan.table import plan_lines, time_words
from flare.plan.trainable import Trainable
from tests.plan.models import A40, A800, qwen


def test_a_disk_too_small_for_all_checkpoints_is_told_in_the_table() -> None:
    made = make_plan(qwen("Qwen2.5-3B", 1, (A800,), per_device_batch=3, free_disk_bytes=60 * GIB))
    check_fits(made)
    assert "TOO LITTLE, --save_total_limit 2 fits" in " ".join(" ".join(plan_lines(made)).split())
    cured = make_plan(replace(made.inputs, save_total_limit=2))
    assert cured.disk_bytes <= 60 * GIB < make_plan(replace(made.inputs, save_total_limit=3)).disk_bytes


@cache
def all_tables() -> dict[str, list[str]]:
    scattered = tuple(range(1, 28, 2))
    tables = {}
    for name, shape in KNOWN_SHAPES.items():
        for stage in (1, 2):
            inputs = PlanInputs(
                shape,
                stage,
                scattered,
                world_size=8,
                gpus=(A800,) * 4 + (A40,) * 4,
                gradient_checkpointing=stage == 2,
                free_disk_bytes=GIB,
                trainable=Trainable.of(scattered, attention_only=True) if stage == 1 else None,
            )
            tables[f"{name} stage {stage}"] = plan_lines(make_plan(inputs))
    return tables


def test_tables_of_all_shapes_are_aligned_and_at_most_100_columns_wide() -> None:
    for name, lines in all_tables().items():
        assert max(map(len, lines)) <= 100, name
        part = re.compile(r"^(memory/GPU)?\s+\w[\w' ]*\s{2,}[\d.]+ GiB")
        gib = [line.index("GiB") for line in lines if part.match(line)]
        assert len(gib) == 8 and len(set(gib)) == 1, lines


def test_the_table_tells_what_section_4_asks_for() -> None:
    made = make_plan(qwen("Qwen2.5-3B", 1, (A800,) * 4, per_device_batch=3, free_disk_bytes=200 * GIB))
    text = " ".join(" ".join(plan_lines(made)).split())
    for part in (
        "Qwen/Qwen2.5-3B: 3.09 B parameters, 36 layers",
        "stage 1 trains 1.00 B (layers 20-32), frozen 2.08 B",
        "NoPE layers 20-32",
        "bf16, DDP, gradient checkpointing off",
        "3 rows x 1 accumulation x 4 processes = 12 rows of 4096 = 49,152 tokens a step",
        "weights 7.61 GiB",
        "4 x NVIDIA A800 80GB PCIe: 80.00 GiB, 74.50 GiB usable: fits",
        "4 x checkpoint 15.08 GiB + final model 5.75 GiB = 66.07 GiB; 200.00 GiB free",
    ):
        assert part in text
    flops = made.flops
    assert f"executed {flops.executed / 1e9:.2f} GFLOP" in text
    assert f"frozen prefix {2 * 20 * 77_070_336 / 1e9:.2f} GFLOP" in text


def test_the_time_is_told_where_a_rate_is_known() -> None:
    def told(**known: object) -> str:
        lines = plan_lines(make_plan(qwen("Qwen2.5-3B", 1, **known)))
        return "".join(line for line in lines if line.startswith("time "))

    tokens = make_plan(qwen("Qwen2.5-3B", 1)).tokens_per_step
    assert told(steps_left=100) == ""
    assert "1 h 40 min for 100 steps at " in told(steps_left=100, tokens_per_sec=tokens / 60)
    assert time_words(10, tokens, tokens / 60).startswith("10 min for 10 steps at ")
    assert time_words(3000, tokens, tokens / 60).startswith("2 d 2 h for 3,000 steps at ")


def test_the_table_names_selective_checkpointing() -> None:
    lines = "\n".join(plan_lines(make_plan(qwen("Qwen2.5-3B", 2, (A800,), gradient_checkpointing=SELECTIVE))))
    assert "gradient checkpointing selective" in lines
