"""What a user can ask of an evaluation: the flags of evaluate_model_enhanced.py. No torch."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from flare.argument_parser import OneLineParser
from flare.config.validate import parse_lengths
from flare.errors import ConfigError
from flare.gpus.selection import parse_gpu_ids

DEFAULT_DATASETS = ("wikitext2", "c4", "lambada", "pg19")

EXAMPLES = """\
examples:
  python evaluate_model_enhanced.py --model_path runs/mine/final_model \\
      --use_default_datasets
  python evaluate_model_enhanced.py --model_path runs/mine/final_model \\
      --datasets pg19 --passkey --context_lengths 1024,4096,16384 \\
      --compare_to Qwen/Qwen2.5-3B runs/control/final_model --gpu_ids 0 1 2 3
  python evaluate_model_enhanced.py --model_path runs/big/final_model \\
      --datasets my.jsonl --device auto
"""


@dataclass(frozen=True)
class EvaluationSettings:
    """What the user asked for."""

    model_path: str
    datasets: tuple[str, ...]
    output_dir: Path
    compare_to: tuple[str, ...] = ()
    protocol: str = "document"
    max_length: int = 2048
    stride: int | None = None
    batch_size: int = 1
    max_samples_per_dataset: int | None = None
    min_tokens: int = 1
    prefix_token_id: int | None = None
    context_lengths: tuple[int, ...] = ()
    passkey: bool = False
    passkey_samples: int = 5
    lm_eval_tasks: tuple[str, ...] = ()
    lm_eval_limit: int | None = None
    generate_tokens: int = 64
    seed: int = 0
    device: str | None = None
    precision: str = "auto"
    attn_implementation: str = "sdpa"
    cache_dir: str | None = None
    data_mirror: str | None = None
    gpu_type: str | None = None
    gpu_ids: list[int] | None = None
    allow_busy_gpus: bool = False
    nproc_per_node: int | None = None
    ddp_timeout: int = 1800

    @property
    def passkey_lengths(self) -> tuple[int, ...]:
        """Context lengths of the passkey: those asked for, else the window of the other metrics."""
        return self.context_lengths or (self.max_length,)


def build_parser(description: str) -> argparse.ArgumentParser:
    """The flags, in groups."""
    parser = OneLineParser(
        "evaluate_model_enhanced.py", "--model_path DIR [--compare_to MODEL ...]", description, EXAMPLES
    )
    _add_what(parser.add_argument_group("what is evaluated"))
    _add_how(parser.add_argument_group("how"))
    _add_more(parser.add_argument_group("beyond perplexity"))
    _add_hardware(parser.add_argument_group("hardware"))
    return parser


def _add_what(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model_path", required=True, metavar="DIR", help="model directory or hub name, ours or any causal LM")
    add("--compare_to", nargs="+", default=[], metavar="MODEL", help="models to score on the same documents")
    add("--use_default_datasets", action="store_true", help="wikitext2, c4, lambada, pg19 (also when none is named)")
    add(
        "--datasets", nargs="+", default=[], metavar="NAME",
        help="those names, embedded, local files, owner/name[:config[:split[:column]]] of the hub, or NAME=FILE: "
        "a local copy of a set that has a name (lambada=my.jsonl)",
    )  # fmt: skip
    add("--data_mirror", metavar="DIR", help="hub sets lie in DIR/owner/name as on the hub: no network is needed")
    add("--cache_dir", metavar="DIR", help="where the hub's data and models are cached")
    add("--max_samples_per_dataset", type=positive, metavar="N", help="use the first N documents of each set")
    add("--min_tokens", type=positive, default=1, metavar="N", help="a set with fewer tokens is an error [1]")
    add("--output_dir", metavar="DIR", help="where results go [evaluation/ in the experiment]")


def _add_how(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--max_length", type=positive, default=2048, metavar="N", help="tokens that the model sees at most [2048]")
    add("--stride", type=positive, metavar="N", help="windows overlap: N new tokens each [windows are disjoint]")
    add(
        "--protocol", choices=("document", "concat"), default="document",
        help="each document alone, or all joined by the end-of-text token [document]",
    )  # fmt: skip
    add("--batch_size", type=positive, default=1, metavar="N", help="full windows scored at once [1]")
    add("--prefix_token_id", type=int, metavar="ID", help="token before a document's first one [bos, else eos]")
    add(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="of the weights [GPUs bf16, old ones fp16]",
    )
    add("--attn_implementation", choices=("sdpa", "eager"), default="sdpa", help="attention code [sdpa]")
    add("--seed", type=int, default=0, metavar="N", help="of passkeys, samples and bootstrap [0]")


def _add_more(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--context_lengths", nargs="+", default=[], metavar="N,N,...",
        help="perplexity of the same last tokens of long documents with so much context; may exceed the model's "
        "max_position_embeddings",
    )  # fmt: skip
    add(
        "--passkey",
        action="store_true",
        help="find a number in noise, lengths x depths (RULER niah_single_1)",
    )
    add("--passkey_samples", type=positive, default=5, metavar="N", help="texts per length and depth [5]")
    add(
        "--lm_eval_tasks",
        default="",
        metavar="A,B",
        help="tasks of lm-eval (pip install lm-eval), or their .yaml",
    )
    add("--lm_eval_limit", type=positive, metavar="N", help="documents of each of these tasks [all]")
    add(
        "--generate_tokens",
        type=int,
        default=64,
        metavar="N",
        help="tokens of each sample [64]; 0: no samples",
    )


def _add_hardware(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--device", metavar="NAME", help="one process on cpu, cuda or cuda:1; auto: one model over all GPUs")
    add("--gpu_type", metavar="NAME", help="a process on each free GPU of this type (A800), auto, or cpu")
    add("--gpu_ids", nargs="+", metavar="ID", help="a process on each of these GPUs, as nvidia-smi counts")
    add("--allow_busy_gpus", action="store_true", help="also GPUs that another process holds")
    add("--nproc_per_node", type=positive, metavar="N", help="processes [one a GPU; 1 on the CPU]")


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {value}")
    return value


def settle(args: argparse.Namespace) -> EvaluationSettings:
    """Settings from parsed flags.

    Raises: ConfigError for values that make no sense, alone or together.
    """
    values = vars(args).copy()
    if args.stride is not None and args.stride > args.max_length:
        raise ConfigError(
            f"--stride {args.stride} is more than --max_length {args.max_length}; windows would have gaps"
        )
    if args.generate_tokens < 0:
        raise ConfigError(f"--generate_tokens {args.generate_tokens}: must be 0 or more")
    values["gpu_ids"] = parse_gpu_ids(args.gpu_ids) if args.gpu_ids else None
    _check_device(args)
    use_default = values.pop("use_default_datasets") or not args.datasets
    local = {word.partition("=")[0] for word in args.datasets if "=" in word}  # NAME=FILE stands for NAME
    names = [*(name for name in DEFAULT_DATASETS if use_default and name not in local), *args.datasets]
    values |= {
        "datasets": tuple(dict.fromkeys(names)),
        "compare_to": tuple(args.compare_to),
        "context_lengths": _lengths(args.context_lengths),
        "lm_eval_tasks": tuple(filter(None, args.lm_eval_tasks.replace(" ", "").split(","))),
        "output_dir": Path(args.output_dir) if args.output_dir else default_output_dir(args.model_path),
    }
    return EvaluationSettings(**values)


def _lengths(words: list[str]) -> tuple[int, ...]:
    return tuple(parse_lengths(words, "--context_lengths")) if words else ()


def _check_device(args: argparse.Namespace) -> None:
    """``--device`` says where one process computes; the other flags choose GPUs for several."""
    if args.device is None:
        return
    if args.gpu_type is not None or args.gpu_ids is not None:
        raise ConfigError(f"--device {args.device} and --gpu_type/--gpu_ids both choose GPUs; give one of them")
    if args.nproc_per_node not in (None, 1) and args.device != "cpu":
        raise ConfigError(f"--device {args.device} is for one process; for several give --gpu_ids, --gpu_type or cpu")


def default_output_dir(model_path: str) -> Path:
    """``evaluation/`` in the experiment that the model belongs to, or beside a model that belongs to none.

    Raises: ConfigError for a hub name, which lies in no directory of the user's.
    """
    path = Path(model_path)
    if not path.is_dir():
        raise ConfigError(f"--output_dir is needed: {model_path!r} is no directory to put the results beside")
    return path.resolve().parent / "evaluation"
