#!/usr/bin/env python3
"""Evaluate a causal language model: perplexity and its kin, a JSON file, a report with plots, TensorBoard.

examples:
  python evaluate_model_enhanced.py --model_path runs/my_experiment/final_model --use_default_datasets
  python evaluate_model_enhanced.py --model_path runs/my_experiment/final_model --datasets my.jsonl \\
      --compare_to Qwen/Qwen2.5-3B runs/my_experiment/stage1/final_model --max_length 4096
"""

import argparse
import sys
from pathlib import Path

from flare.errors import ConfigError, run_script
from flare.threads import wait_without_spinning


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_path", required=True, metavar="DIR", help="model directory or hub name, ours or any causal LM")
    add("--compare_to", nargs="+", default=[], metavar="MODEL", help="models to score on the same documents")
    add("--use_default_datasets", action="store_true", help="wikitext2, c4, lambada, pg19 (also when none is named)")
    add(
        "--datasets", nargs="+", default=[], metavar="NAME",
        help="those names, embedded, local files, or owner/name[:config[:split[:column]]] of the hub",
    )  # fmt: skip
    add("--output_dir", metavar="DIR", help="where results go [evaluation/ in the experiment]")
    add("--max_length", type=positive, default=2048, metavar="N", help="tokens predicted in a window [2048]")
    add("--batch_size", type=positive, default=1, metavar="N", help="windows scored at once [1]")
    add("--max_samples_per_dataset", type=positive, metavar="N", help="use the first N documents of each set")
    add("--min_tokens", type=positive, default=1, metavar="N", help="a set with fewer tokens is an error [1]")
    add("--device", metavar="NAME", help="cpu, cuda or cuda:1 [cuda where there is one]")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="of the weights [bf16 on cuda]")
    add("--attn_implementation", choices=("sdpa", "eager"), default="sdpa", help="attention code [sdpa]")
    add("--cache_dir", metavar="DIR", help="where the hub's data and models are cached")
    return parser


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {value}")
    return value


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    wait_without_spinning()
    import torch

    from flare.evaluation.datasets import DEFAULT_DATASETS
    from flare.evaluation.session import Evaluation, EvaluationSettings, default_output_dir
    from flare.logs import start_logging

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: torch {torch.__version__} sees no card; give --device cpu")
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if device.startswith("cuda") else "fp32"
    names = [*(DEFAULT_DATASETS if args.use_default_datasets or not args.datasets else ()), *args.datasets]
    settings = EvaluationSettings(
        model_path=args.model_path,
        datasets=tuple(dict.fromkeys(names)),
        output_dir=Path(args.output_dir) if args.output_dir else default_output_dir(args.model_path),
        compare_to=tuple(args.compare_to),
        max_length=args.max_length,
        batch_size=args.batch_size,
        max_samples_per_dataset=args.max_samples_per_dataset,
        min_tokens=args.min_tokens,
        device=device,
        precision=precision,
        attn_implementation=args.attn_implementation,
        cache_dir=args.cache_dir,
    )
    start_logging()
    return Evaluation(settings).run()


if __name__ == "__main__":
    sys.exit(run_script(main))
