"""Flare's evaluation compared with lm-eval's rolling log-likelihood: scored tokens/s and peak memory of the same work.

    python -m benchmarks.evaluation

Both score the same documents with the same random model of Qwen's vocabulary, in windows of the same length and
batches of the same size. Each run has its own process; runs alternate (A B A B). The sums of log-likelihoods must
agree. Peak memory is the resident peak of the process; also without the loaded model.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from statistics import median

from benchmarks import record
from flare.cpu import wait_without_spinning
from flare.files import REPO

SHAPE = {
    "vocab_size": 151_936,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
DOCUMENT_CHARACTERS = 2000
TARGETS = {"tokens/s of lm-eval's": (1.5, "at least"), "peak memory of lm-eval's": (0.5, "at most")}
AGREEMENT = 1e-5
"""Relative: fp32 sums of a head with 151,936 outputs, in another order."""


@dataclass(frozen=True)
class Work:
    """What one process does."""

    side: str  # flare or lm-eval
    documents: int
    max_length: int
    batch_size: int


@dataclass(frozen=True)
class Measured:
    """What it took."""

    tokens: int
    seconds: float
    cpu_sec: float  # of all threads: steady where other programs take the cores away
    idle_bytes: int
    peak_bytes: int
    nll: float


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help="times each side runs [2]")
    parser.add_argument("--documents", type=int, default=12, help="documents, cut to 2,000 characters [12]")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of a window [512]")
    parser.add_argument("--batch_size", type=int, default=4, help="windows at once [4]")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    wait_without_spinning()  # both sides: threads that spin would count as work, and steal it
    if args.work:
        print(json.dumps(asdict(run(Work(**json.loads(args.work))))))
        return 0
    runs: dict[str, list[Measured]] = {"flare": [], "lm-eval": []}
    for _ in range(args.rounds):
        for side, measured in runs.items():
            measured.append(measure(Work(side, args.documents, args.max_length, args.batch_size)))
            print(f"{side}: {measured[-1].tokens / measured[-1].seconds:,.0f} tokens/s", flush=True)
    summaries = {side: summary(measured) for side, measured in runs.items()}
    check_agreement(summaries)
    header = ["", "tokens/s", "tokens/CPU s", "peak GiB", "above the model GiB"]
    print("\n" + record.table(header, [row(n, s) for n, s in summaries.items()]))
    ratios = ratios_of(summaries)
    print("\n" + record.ratio_table(ratios, TARGETS))
    path = record.write("evaluation", {"shape": SHAPE, "work": vars(args), "runs": summaries, "ratios": ratios})
    print(f"\n{path}")
    return 0


def measure(work: Work) -> Measured:
    """Do the work in a new process, so that its peak memory can be measured."""
    command = [sys.executable, "-m", "benchmarks.evaluation", "--work", json.dumps(asdict(work))]
    result = subprocess.run(command, cwd=REPO, stdout=subprocess.PIPE, text=True, check=True)
    return Measured(**json.loads(result.stdout.splitlines()[-1]))


def run(work: Work) -> Measured:
    """Make the model, score the documents."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    from flare.data.cache_dir import default_cache_dir
    from flare.data.sources.embedded import embedded_documents

    texts = [text for _, text in embedded_documents(default_cache_dir(None))]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, 2048, show_progress=False)
    texts = [text[:DOCUMENT_CHARACTERS] for text in sorted(texts, key=len)[-work.documents :]]
    end = tokenizer.eos_token_id
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, bos_token_id=end, eos_token_id=end)).eval()
    idle = peak_bytes()
    t0, cpu0 = time.perf_counter(), time.process_time()
    nll = (score_flare if work.side == "flare" else score_lm_eval)(model, tokenizer, texts, work)
    seconds, cpu_sec = time.perf_counter() - t0, time.process_time() - cpu0
    tokens = sum(len(ids) for ids in tokenizer(texts)["input_ids"])
    return Measured(tokens, seconds, cpu_sec, idle, peak_bytes(), nll)


def peak_bytes() -> int:
    """Peak resident memory of this process so far (Linux counts KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def score_flare(model, tokenizer, texts: list[str], work: Work) -> float:
    """Sum of NLLs as Flare computes it."""
    from flare.evaluation.scoring.perplexity import score_documents

    score = score_documents(
        model, tokenizer, texts, max_length=work.max_length, batch_size=work.batch_size, device="cpu"
    )
    return float(score.document_nll.sum())


def score_lm_eval(model, tokenizer, texts: list[str], work: Work) -> float:
    """Sum of NLLs as lm-eval computes it."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(
        pretrained=model, tokenizer=tokenizer, max_length=work.max_length, batch_size=work.batch_size, backend="causal"
    )
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    return -sum(lm.loglikelihood_rolling(requests, disable_tqdm=True))


def summary(measured: list[Measured]) -> dict:
    """Over the rounds: the median rate and the highest peak."""
    return {
        "tokens_per_sec": median(m.tokens / m.seconds for m in measured),
        "tokens_per_cpu_sec": median(m.tokens / m.cpu_sec for m in measured),
        "rounds": [m.tokens / m.seconds for m in measured],
        "peak_bytes": max(m.peak_bytes for m in measured),
        "above_model_bytes": max(m.peak_bytes - m.idle_bytes for m in measured),
        "tokens": measured[0].tokens,
        "nll": measured[0].nll,
    }


def check_agreement(summaries: dict[str, dict]) -> None:
    """Both sides must have done the same work."""
    ours, theirs = summaries["flare"]["nll"], summaries["lm-eval"]["nll"]
    if abs(ours - theirs) > AGREEMENT * theirs:
        raise SystemExit(f"not the same work: NLL {ours} by Flare, {theirs} by lm-eval")


def row(side: str, s: dict) -> list[str]:
    gib = [f"{s[key] / 2**30:.2f}" for key in ("peak_bytes", "above_model_bytes")]
    return [side, f"{s['tokens_per_sec']:,.0f}", f"{s['tokens_per_cpu_sec']:,.0f}", *gib]


def ratios_of(summaries: dict[str, dict]) -> dict[str, float]:
    """What the targets speak of."""
    ours, theirs = summaries["flare"], summaries["lm-eval"]
    values = (ours[key] / theirs[key] for key in ("tokens_per_sec", "peak_bytes"))
    return dict(zip(TARGETS, values, strict=True))


if __name__ == "__main__":
    sys.exit(main())
