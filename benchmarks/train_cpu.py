"""Flare compared with HF Trainer as run_clm uses it, on the CPU: tokens/s and peak memory of the same training.

    python -m benchmarks.train_cpu

In bf16, as people train, and in fp32. Peak memory is the resident peak of the process; also without that of the
interpreter and its libraries. Runs alternate (A B A B), so that other work on the machine affects both.
"""

import argparse
import sys
from dataclasses import replace
from statistics import median

from benchmarks import record
from benchmarks.workload import Measured, Workload, measure
from flare.nope.layers import auto_band

SHAPE = {
    "model_type": "qwen2",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
QWEN_VOCABULARY, SMALL_VOCABULARY = 151_936, 2_048
SMALL_TIMES = 3
"""Runs of the small vocabulary in a round: its two sides differ by less than runs of one side do."""

TARGETS = {
    "bf16 stage 2, tokens/s of HF Trainer's": (2.0, "at least"),
    "bf16 stage 2, peak memory of HF Trainer's": (0.45, "at most"),
    "bf16 stage 1, tokens/s of our stage 2's": (1.4, "at least"),
    "fp32 stage 2, tokens/s of HF Trainer's": (2.0, "at least"),
    "fp32 stage 2, peak memory of HF Trainer's": (0.45, "at most"),
    "fp32 stage 1, tokens/s of our stage 2's": (1.4, "at least"),
    "fp32, small vocabulary, tokens/s of HF Trainer's": (1.0, "at least"),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help="times each side runs [2]")
    parser.add_argument("--steps", type=int, default=6, help="steps of a run, 2 of them warm-up [6]")
    args = parser.parse_args(argv)
    large, small = workloads(args.steps), small_workloads(3 * args.steps)
    runs = {name: [] for name in large | small}
    for name, workload in args.rounds * [*large.items(), *SMALL_TIMES * [*small.items()]]:
        runs[name].append(measure(workload))
        print(f"{name}: {runs[name][-1].tokens_per_sec:,.0f} tokens/s", flush=True)
    best = {name: summary(measured) for name, measured in runs.items()}
    print("\n" + record.table(["run", "tokens/s", "peak GiB", "above idle GiB"], [row(n, s) for n, s in best.items()]))
    ratios = ratios_of(best)
    print("\n" + record.ratio_table(ratios, TARGETS))
    path = record.write("train_cpu", {"shape": SHAPE, "runs": best, "ratios": ratios})
    print(f"\n{path}")
    return 0


def workloads(steps: int) -> dict[str, Workload]:
    """The runs of one round at Qwen's vocabulary, in their order."""
    ours = of_vocabulary(QWEN_VOCABULARY, steps)
    runs = {}
    for precision in ("bf16", "fp32"):
        stage_2 = replace(ours, precision=precision)
        runs |= {
            f"{precision} flare, stage 2": stage_2,
            f"{precision} HF Trainer, stage 2": replace(stage_2, trainer="hf"),
            f"{precision} flare, stage 1": replace(stage_2, stage=1),
            f"{precision} HF Trainer, stage 1": replace(stage_2, trainer="hf", stage=1),
        }
    return runs


def small_workloads(steps: int) -> dict[str, Workload]:
    """The pair of runs at a small vocabulary."""
    ours = of_vocabulary(SMALL_VOCABULARY, steps)
    return {"flare, small vocabulary": ours, "HF Trainer, small vocabulary": replace(ours, trainer="hf")}


def of_vocabulary(size: int, steps: int) -> Workload:
    """Flare's stage 2 with this vocabulary, in fp32."""
    shape = {**SHAPE, "vocab_size": size}
    return Workload("flare", shape, 2, auto_band(SHAPE["num_hidden_layers"]), batch_size=4, seq_len=512, steps=steps)


def summary(measured: list[Measured]) -> dict:
    """Over the rounds: the median rate and the highest peak."""
    return {
        "tokens_per_sec": median(m.tokens_per_sec for m in measured),
        "rounds": [m.tokens_per_sec for m in measured],
        "peak_bytes": max(m.peak_bytes for m in measured),
        "above_idle_bytes": max(m.peak_bytes - m.idle_bytes for m in measured),
        "losses": measured[0].losses,
    }


def row(name: str, s: dict) -> list[str]:
    gib = [f"{s[key] / 2**30:.2f}" for key in ("peak_bytes", "above_idle_bytes")]
    return [name, f"{s['tokens_per_sec']:,.0f}", *gib]


def ratios_of(best: dict[str, dict]) -> dict[str, float]:
    """What the targets speak of."""

    def of(name: str, other: str, key: str = "tokens_per_sec") -> float:
        return best[name][key] / best[other][key]

    values = []
    for precision in ("bf16", "fp32"):
        flare, trainer = f"{precision} flare, stage 2", f"{precision} HF Trainer, stage 2"
        values += [of(flare, trainer), of(flare, trainer, "peak_bytes"), of(f"{precision} flare, stage 1", flare)]
    values.append(of("flare, small vocabulary", "HF Trainer, small vocabulary"))
    return dict(zip(TARGETS, values, strict=True))


if __name__ == "__main__":
    sys.exit(main())
