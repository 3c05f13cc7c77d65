"""What a token costs on the CPU as depth, row length, vocabulary or the number of ranks grows, all else equal.

    python -m benchmarks.scaling

Next to each cost is the one predicted by the plan's FLOPs, relative to the first line of its group. Work that is not
in that count (softmax, norms, the optimizer, Python) shows as a difference. Ranks share the cores: with more ranks
than cores a token does not get cheaper.
"""

import argparse
import sys
from dataclasses import replace
from statistics import median

from benchmarks import record
from benchmarks.train_cpu import SHAPE, SMALL_VOCABULARY
from benchmarks.workload import Workload, measure
from flare.nope.layers import auto_band
from flare.plan.flops import token_flops
from flare.plan.model_shape import ModelShape
from flare.plan.trainable import Trainable

GROUPS = {
    "depth": ("num_hidden_layers", (4, 8, 16)),
    "row length": ("seq_len", (128, 512, 1024)),
    "vocabulary": ("vocab_size", (2_048, 16_384, 65_536)),
    "ranks": ("processes", (1, 2)),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help="times each case runs [2]")
    parser.add_argument("--steps", type=int, default=6, help="steps of a run, 2 of them warm-up [6]")
    parser.add_argument("--groups", nargs="*", choices=GROUPS, default=list(GROUPS), help="what to vary [all]")
    args = parser.parse_args(argv)
    cases = {(g, v): workload(GROUPS[g][0], v, args.steps) for g in args.groups for v in GROUPS[g][1]}
    seconds: dict[tuple, list[float]] = {case: [] for case in cases}
    for _ in range(args.rounds):
        for case, load in cases.items():
            seconds[case].append(1 / measure(load).tokens_per_sec)
            print(f"{case[0]} {case[1]}: {seconds[case][-1] * 1e6:,.0f} us a token", flush=True)
    lines = [line(case, cases, seconds) for case in cases]
    print("\n" + record.table(["varied", "value", "us/token", "relative", "by FLOPs"], [words(x) for x in lines]))
    print(f"\n{record.write('scaling', {'shape': SHAPE, 'lines': lines})}")
    return 0


def workload(key: str, value: int, steps: int) -> Workload:
    """The middle case with one thing changed; always 2,048 tokens a step, so that nothing else changes with it."""
    shape = {**SHAPE, "vocab_size": SMALL_VOCABULARY, "max_position_embeddings": 4096}
    load = Workload("flare", shape, 2, [], batch_size=4, seq_len=512, steps=steps)
    if key in shape:
        load = replace(load, shape={**shape, key: value})
    elif key == "seq_len":
        load = replace(load, seq_len=value, batch_size=2048 // value)
    else:
        load = replace(load, **{key: value})
    return replace(load, nope_layers=auto_band(load.shape["num_hidden_layers"]))


def line(case: tuple, cases: dict[tuple, Workload], seconds: dict[tuple, list[float]]) -> dict:
    """Cost of a case, and relative to the first one of its group as measured and by FLOPs."""
    first = next(other for other in cases if other[0] == case[0])
    cost, base = median(seconds[case]), median(seconds[first])
    return {
        "varied": case[0],
        "value": case[1],
        "us_per_token": cost * 1e6,
        "rounds": [s * 1e6 for s in seconds[case]],
        "relative": cost / base,
        "by_flops": executed(cases[case]) / executed(cases[first]),
    }


def executed(load: Workload) -> int:
    """FLOPs a token by the plan, everything training."""
    return token_flops(ModelShape.from_config(load.shape), Trainable.of("all"), load.seq_len).executed


def words(entry: dict) -> list[str]:
    numbers = [f"{entry[key]:.2f}" for key in ("relative", "by_flops")]
    return [entry["varied"], f"{entry['value']:,}", f"{entry['us_per_token']:,.0f}", *numbers]


if __name__ == "__main__":
    sys.exit(main())
