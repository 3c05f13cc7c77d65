"""Two ranks, one of them at half speed: rows by measured speed, compared with equal rows and with the ideal.

    python -m benchmarks.balance

Runs alternate (A B A B) within the same two processes. The slow rank sleeps in each forward pass for as long as its
rows take to compute, which is measured before. So it has half the speed under any load, and takes no core from the
other rank. A step of 36 rows has 9,216 tokens, few compared with real runs. With 12 rows the reduction takes a larger
share, and integer numbers of rows fit the speeds less well. The ideal is the sum of the rates of both ranks, each
measured alone: no reduction, no update, fractions of rows.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import record
from flare.files import REPO

TARGETS = {"balanced, tokens/s of equal shares'": 1.3, "balanced, tokens/s of the ideal": 0.9}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="times each side runs [3]")
    parser.add_argument("--steps", type=int, default=6, help="steps of a run, 1 of them warm-up [6]")
    parser.add_argument("--rows", type=int, default=36, help="rows of a step [36]")
    args = parser.parse_args(argv)
    found = measure(args.rounds, args.steps, args.rows)
    equal, balanced, ideal = found["equal"], found["balanced"], found["ideal"]
    rows = [
        ["equal shares", str(found["rows"]["equal"]), f"{equal:,.0f}"],
        ["by measured speed", str(found["rows"]["balanced"]), f"{balanced:,.0f}"],
        ["ideal", "", f"{ideal:,.0f}"],
    ]
    print(record.table(["run", "rows by rank", "tokens/s"], rows))
    ratios = dict(zip(TARGETS, (balanced / equal, balanced / ideal), strict=True))
    lines = [
        [name, f"{value:.2f}", f"at least {TARGETS[name]}", "met" if value >= TARGETS[name] else "MISSED"]
        for name, value in ratios.items()
    ]
    print("\n" + record.table(["ratio", "measured", "target", ""], lines))
    print(f"\n{record.write('balance', {**found, 'ratios': ratios})}")
    return 0


def measure(rounds: int, steps: int, rows: int) -> dict:
    """Start both ranks and read what rank 0 wrote.

    Raises: RuntimeError with the last line of their output, when they fail.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "balance.json"
        command = [
            sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            "-m", "benchmarks.balance_ranks", *map(str, (out, rounds, steps, rows)),
        ]  # fmt: skip
        result = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError((result.stderr.strip() or f"exit code {result.returncode}").splitlines()[-1])
        return json.loads(out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
