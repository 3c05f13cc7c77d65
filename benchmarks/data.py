"""From text to packed rows: Flare, cached and streamed, compared with encode_batch alone and with HF run_clm. Also
memory, the cached start, and reading.

    python -m benchmarks.data [--size_mb 32] [--memory_mb 10,1000] [--rounds 3]

Each document has random paragraphs of the embedded corpus, with numbers so that words differ. The compared programs
run in turn (A B C C B A), each in its own process, so that other work on the machine affects all of them. A ratio is
computed within a round, and the median round is reported. Memory is the proportional set size of all processes of a
program together, sampled; also without that of the interpreter and its libraries.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks import record
from benchmarks.data_jobs import train_tokenizer, write_corpus
from flare.child_process import HUGE_PAGES
from flare.files import REPO

SIDES = ("encode_batch", "encode_batch_huge_pages", "flare", "streaming", "run_clm")
ENVIRONMENT = {"encode_batch_huge_pages": {"GLIBC_TUNABLES": HUGE_PAGES}}
"""What Flare's workers start with, for the library alone: how much of a ratio is that."""
QWEN_VOCABULARY = 151_643
DEMO_TOKENS_PER_SEC = 5_744
"""Training rate of the demo's model on one thread (docs/experiments.md)."""
SAMPLE_SEC = 0.1
MIB = 2**20


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with tempfile.TemporaryDirectory(dir=args.work_dir) as name:
        bench = Bench(Path(name))
        results = {"vocabulary": train_tokenizer(bench.tokenizer, QWEN_VOCABULARY), "size_mb": args.size_mb}
        results["rounds"] = bench.compare(args.size_mb, args.rounds)
        results["memory"] = bench.memory(args.memory_mb)
        results["cached_start"] = bench.cached_start(args.documents)
        results["reading"] = bench.reading()
    results["summary"] = summary(results)
    print("\n" + record.table(["what", "measured", "target"], rows_of(results["summary"])))
    print(f"\n{record.write(args.name, results)}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size_mb", type=int, default=32, help="text of the comparison [32]")
    parser.add_argument("--memory_mb", type=sizes, default=[10, 1000], help="texts whose peak is taken [10,1000]")
    parser.add_argument("--documents", type=int, default=1_000_000, help="of the cached start [1000000]")
    parser.add_argument("--rounds", type=int, default=3, help="times each side runs [3]")
    parser.add_argument("--work_dir", help="where corpora and caches go while it runs [the system's own]")
    parser.add_argument("--name", default="data", help="of the file in benchmarks/results [data]")
    return parser.parse_args(argv)


def sizes(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


class Bench:
    """Runs jobs on corpora in one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tokenizer = root / "tokenizer.json"
        self.last_corpus = root / "none"

    def corpus(self, size_mb: int) -> Path:
        path = self.root / f"{size_mb}mb.jsonl"
        if not path.exists():
            write_corpus(path, size_mb * 10**6)
        return path

    def run(self, job: str, corpus: Path, work: Path | None = None) -> dict:
        """One job in a fresh process; without ``work`` in an empty directory that goes away again."""
        with tempfile.TemporaryDirectory(dir=self.root) as empty:
            command = [sys.executable, "-m", "benchmarks.data_jobs", job]
            process = subprocess.Popen(
                [*command, str(corpus), str(self.tokenizer), str(work or empty)],
                cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=os.environ | ENVIRONMENT.get(job, {}),
            )  # fmt: skip
            peak = 0
            while process.poll() is None:
                peak = max(peak, proportional_set_bytes(process.pid))
                time.sleep(SAMPLE_SEC)
            output, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{job} failed:\n{errors}")
        return json.loads(output.splitlines()[-1]) | {"peak_bytes": peak}

    def compare(self, size_mb: int, rounds: int) -> list[dict]:
        """Tokens/s of the sides, round by round."""
        corpus = self.corpus(size_mb)
        measured = []
        for number in range(rounds):
            order = SIDES if number % 2 == 0 else SIDES[::-1]
            runs = {side: self.run(side, corpus) for side in order}
            rates = {side: run["tokens"] / run["seconds"] for side, run in runs.items()}
            print("  ".join(f"{side} {rates[side]:,.0f} tokens/s" for side in SIDES), flush=True)
            measured.append({"tokens_per_sec": rates, "tokens": {s: r["tokens"] for s, r in runs.items()}})
        return measured

    def memory(self, sizes_mb: list[int]) -> list[dict]:
        """Peaks of a build above the idle interpreter."""
        idle = self.run("idle", self.root)["max_rss_bytes"]
        measured = []
        for size_mb in sizes_mb:
            run = self.run("flare", self.corpus(size_mb))
            above = run["peak_bytes"] - idle
            print(f"{size_mb} MB of text: {above / MIB:,.0f} MiB above the interpreter", flush=True)
            seconds = run["seconds"]
            measured.append({"size_mb": size_mb, "peak_bytes": run["peak_bytes"], "above_idle_bytes": above})
            measured[-1] |= {"tokens_per_sec": run["tokens"] / seconds}
        return measured

    def cached_start(self, documents: int) -> dict:
        """Seconds of a second start on a corpus of short documents."""
        corpus, work = self.root / "documents.jsonl", self.root / "cached"
        write_corpus(corpus, 0, documents)
        self.run("flare", corpus, work)
        self.last_corpus = corpus
        runs = [self.run("cached_start", corpus, work) for _ in range(3)]
        size = corpus.stat().st_size
        print(f"cached start: {[round(run['seconds'], 3) for run in runs]} s, {size / 1e6:.0f} MB", flush=True)
        return {"documents": documents, "corpus_bytes": size, "seconds": [run["seconds"] for run in runs]}

    def reading(self) -> dict:
        """Tokens/s that one process reads."""
        return self.run("read_rows", self.last_corpus, self.root / "cached")


def proportional_set_bytes(pid: int) -> int:
    """Memory of a process and all below it, shared pages divided among their users; 0 for one that has ended."""
    total = 0
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total = next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(proportional_set_bytes(int(child)) for child in (task / "children").read_text().split())
    except (OSError, StopIteration):
        pass
    return total


def summary(results: dict) -> dict[str, dict]:
    """What the targets are about: measured value, target, and whether more is better."""
    rates = [r["tokens_per_sec"] for r in results["rounds"]]
    reading = results["reading"]["tokens"] / results["reading"]["seconds"]
    found = {
        "tokens/s, of encode_batch alone": (median(r["flare"] / r["encode_batch"] for r in rates), 0.9, True),
        "tokens/s, of encode_batch with huge pages": (
            median(r["flare"] / r["encode_batch_huge_pages"] for r in rates), None, True,
        ),
        "tokens/s, of HF run_clm": (median(r["flare"] / r["run_clm"] for r in rates), 1.5, True),
        "tokens/s streamed, of encode_batch": (median(r["streaming"] / r["encode_batch"] for r in rates), None, True),
        "peak above the interpreter, GiB": (
            max(m["above_idle_bytes"] for m in results["memory"]) / 2**30, 1.0, False,
        ),
        "cached start, s": (median(results["cached_start"]["seconds"]), 1.0, False),
        "reading, of the demo's training rate": (reading / DEMO_TOKENS_PER_SEC, 1000.0, True),
    }  # fmt: skip
    return {
        name: {"measured": value, "target": target, "more_is_better": more}
        for name, (value, target, more) in found.items()
    }


def rows_of(summary: dict[str, dict]) -> list[list[str]]:
    """The summary as rows of a table."""
    return [[name, f"{line['measured']:.2f}", target_of(line)] for name, line in summary.items()]


def target_of(line: dict) -> str:
    """In words; a number without a target is there to be known."""
    if line["target"] is None:
        return "none"
    return f"{'at least' if line['more_is_better'] else 'at most'} {line['target']:g}"


if __name__ == "__main__":
    sys.exit(main())
