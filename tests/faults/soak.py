"""Kill training again and again, at random moments in random ways, and check the remaining files each time.

    python -m tests.faults.soak --kills 200 [--seed 0]

An experiment is both stages under one name. Each start of it may be killed: by SIGKILL at a random file that it
touches or in a random step, or by a random signal at a random time; some starts have two processes. After each kill
the newest complete checkpoint must still exist and be complete. At the end the final model must be, bit for bit, that
of the uninterrupted run, and every row read once; where starts had two processes, which round differently,
the losses must agree. Prints a summary, and writes it to docs/soak.json.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import record
from tests.conftest import write_base, write_corpus
from tests.faults.conftest import run_flags
from tests.faults.harness import ROWS, STEPS, complete_steps, digest, rows_by_step, stage
from tests.processes import REPO, Running, Zygote

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
FILE_EVENTS = 200
"""About the number of files that a stage touches. A later moment kills nothing."""
LONGEST_DELAY_SEC = 1.5
KILLS_PER_STAGE = 6
TWO_PROCESSES = 0.15


@dataclass
class Soak:
    """One soak: what it runs, and what it has seen."""

    zygote: Zygote
    base: Path
    corpus: Path
    root: Path
    random: random.Random
    seen: Counter = field(default_factory=Counter)

    def deaths(self) -> dict[str, int]:
        """How many of each kind."""
        return {k: v for k, v in sorted(self.seen.items()) if "experiments" not in k and "too late" not in k}

    def flags(self, name: str, number: int, processes: int = 1) -> list[str]:
        flags = run_flags(self.base, self.corpus, self.root / "cache", self.root / "out")
        flags[flags.index("--experiment_name") + 1] = name
        flags += ["--stage", str(number), "--global_batch_size", str(ROWS)]
        if number == 2:  # starts from stage 1's result
            del flags[flags.index("--model_name_or_path") : flags.index("--model_name_or_path") + 2]
        if processes > 1:
            flags += ["--nproc_per_node", str(processes), "--per_device_train_batch_size", str(ROWS // processes)]
        return flags

    def experiment(self, name: str, kills: int) -> None:
        """Both stages, with about this many kills each; checked at the end."""
        run, mixed = self.root / "out" / name, False
        for number in (1, 2):
            finished = False
            for _ in range(kills):
                processes = 2 if self.random.random() < TWO_PROCESSES else 1
                mixed |= processes > 1
                if finished := self.start(run, number, processes, die=True):
                    break
            while not finished:
                finished = self.start(run, number, 1, die=False)
            assert stage(run, number)["totals"]["steps"] == STEPS
        self.judge(run, mixed)

    def start(self, run: Path, number: int, processes: int, die: bool) -> bool:
        """One start; whether the stage is finished."""
        rows = ("record_rows", str(self.rows_file(run, number)))
        before = newest(run, number)
        how = self.random.choice(("file", "step", "signal")) if die and processes == 1 else "signal" if die else "none"
        if how == "file":
            rows = (*rows, ["die_at", self.random.randint(1, FILE_EVENTS), str(run)])
        if how == "step":
            rows = (*rows, ["die_at_step", self.random.randint(1, STEPS)])
        running = self.zygote.start(*self.flags(run.name, number, processes), fault=rows)
        if how == "signal":
            how = self.signal_at_random(running)
        ended = running.wait()
        if "is running" in ended.stderr:  # workers of a killed launcher are still writing their checkpoint
            time.sleep(0.5)
            return False
        finished = ended.returncode == 0 and stage(run, number)["status"] == "finished"
        if not finished:
            self.seen[f"{how}, {processes} process{'es' if processes > 1 else ''}"] += 1
            codes = {0, 130, *(-s for s in SIGNALS), *(128 + s for s in SIGNALS)}
            assert ended.returncode in codes, (ended.returncode, ended.stderr)
        assert newest(run, number) >= before, f"{run}: {before} was there"
        return finished

    def signal_at_random(self, running: Running) -> str:
        chosen = self.random.choice(SIGNALS)
        time.sleep(self.random.uniform(0.0, LONGEST_DELAY_SEC))
        try:
            running.send(chosen)
        except ProcessLookupError:
            return "too late"
        return chosen.name

    def rows_file(self, run: Path, number: int) -> Path:
        return self.root / f"{run.name}-{number}.rows"

    def judge(self, run: Path, mixed: bool) -> None:
        """Results of the killed runs, compared with the uninterrupted run."""
        uninterrupted = self.root / "out" / "uninterrupted"
        if mixed:
            self.seen["experiments that changed the number of processes"] += 1
            ours, theirs = (stage(r, 2)["history"][-1]["eval_loss"] for r in (run, uninterrupted))
            assert abs(ours - theirs) < 1e-3 * theirs, (ours, theirs)
            return
        self.seen["experiments on one process, bit-equal"] += 1
        assert digest(run / "final_model") == digest(uninterrupted / "final_model"), run
        for number in (1, 2):
            assert rows_by_step(self.rows_file(run, number)) == rows_by_step(self.rows_file(uninterrupted, number)), (
                run
            )


def newest(run: Path, number: int) -> int:
    """Step of the newest complete checkpoint of a stage; -1 for none."""
    try:
        current = json.loads((run / "training_metrics.json").read_text())["current_stage"]
    except (OSError, ValueError, KeyError):
        return -1
    return max(complete_steps(run), default=-1) if current == number else -1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        zygote = Zygote(root)
        base, corpus = write_base(root / "base"), write_corpus(root / "corpus.jsonl")
        soak = Soak(zygote, base, corpus, root, random.Random(args.seed))
        soak.experiment("uninterrupted", 0)
        soak.seen.clear()
        count = 0
        while sum(soak.deaths().values()) < args.kills:
            count += 1
            soak.experiment(f"run{count}", KILLS_PER_STAGE)
            print(f"{count} experiments: {dict(soak.seen)}", flush=True)
        zygote.close()
    deaths = soak.deaths()
    results = {"deaths": sum(deaths.values()), "by": deaths, "experiments": count, "lost": 0, "seed": args.seed}
    results |= {k: v for k, v in soak.seen.items() if "experiments" in k}
    about = {"commit": record.commit(), "machine": record.machine(), "versions": record.versions()}
    (REPO / "docs" / "soak.json").write_text(json.dumps(results | about, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
