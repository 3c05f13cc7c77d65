"""One evaluation: the model on every data set, then the models to compare it with on the same documents."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from flare.errors import ConfigError, DataError, EnvError, FlareError
from flare.evaluation.datasets import load_texts
from flare.evaluation.perplexity import DatasetScore, resolve_prefix, score_documents
from flare.evaluation.plots import plot_loss_by_position, plot_training_curve
from flare.evaluation.report import write_report
from flare.evaluation.results import (
    add_dataset,
    add_failure,
    add_throughput,
    model_record,
    new_results,
    write_results,
)
from flare.evaluation.tensorboard import write_tensorboard
from flare.evaluation.verdict import ComparisonRow, comparison_row
from flare.experiment import Experiment, environment_lines
from flare.hub import local_model_dir, read_model_config
from flare.logs import log
from flare.nope.canary import hold_to_canary
from flare.nope.canary_file import CANARY_FILE, check_recorded_layers
from flare.nope.format import nope_layers_of
from flare.nope.load import load_causal_lm, load_tokenizer
from flare.nope.probe import probe_nope_layers

EXIT_DATA = DataError.exit_code


@dataclass(frozen=True)
class EvaluationSettings:
    """What the user asked for."""

    model_path: str
    datasets: tuple[str, ...]
    output_dir: Path
    compare_to: tuple[str, ...] = ()
    max_length: int = 2048
    batch_size: int = 1
    max_samples_per_dataset: int | None = None
    min_tokens: int = 1
    device: str = "cpu"
    precision: str = "fp32"
    attn_implementation: str = "sdpa"
    cache_dir: str | None = None


def milestone(directory: Path) -> tuple[int, str, str]:
    """(order, label, role) of a model among the milestones of an experiment, by its config.json."""
    config = read_model_config(directory)
    stage = (config.get("flare") or {}).get("stage")
    if not nope_layers_of(config):
        return 0, "base", "base"
    if stage is None:
        return 1, "patched, untrained", "patched"
    return 1 + stage, f"stage {stage}", "trained"


class Evaluation:
    """Runs an evaluation and writes its files as they become true."""

    def __init__(self, settings: EvaluationSettings) -> None:
        self.settings = settings
        self.directory = local_model_dir(settings.model_path, settings.cache_dir)
        self.others = [local_model_dir(name, settings.cache_dir) for name in settings.compare_to]
        self.results_file = settings.output_dir / "evaluation_results.json"
        self.environment = _environment()  # asks git and nvidia-smi: once, not once a model
        self.texts: dict[str, list[str]] = {}
        self.failed: dict[str, str] = {}
        self.by_position: dict[str, dict[str, list[dict]]] = {}

    def run(self) -> int:
        """Evaluate and report; 3 when a data set could not be had or scored, else 0."""
        self._load_texts()
        results = self._evaluate(self.directory)
        write_results(results, self.results_file)
        rows = self._compare(results)
        write_results(results, self.results_file)
        self._report(results, rows)
        return EXIT_DATA if self.failed else 0

    def _load_texts(self) -> None:
        for name in self.settings.datasets:
            try:
                self.texts[name] = load_texts(name, self.settings.max_samples_per_dataset, self.settings.cache_dir)
            except (DataError, EnvError, ConfigError) as error:
                log.warning(f"data set {name}: {error}")
                self.failed[name] = str(error)

    def _evaluate(self, directory: Path) -> dict:
        """Results of one model on all data sets."""
        with self._loaded(directory) as (model, tokenizer):
            record = model_record(model, tokenizer, str(directory), _probe(model))
            results = new_results(record, self._settings(tokenizer), self.environment)
            scores: list[DatasetScore] = []
            for name, texts in self.texts.items():
                try:
                    scores.append(self._score(model, tokenizer, name, texts))
                except FlareError as error:
                    log.warning(f"data set {name}: {error}")
                    self.failed[name] = str(error)
                else:
                    add_dataset(results, name, scores[-1])
                    label = milestone(directory)[1]
                    self.by_position.setdefault(name, {})[label] = scores[-1].loss_by_position
                    log.info(f"{label} on {name}: perplexity {scores[-1].perplexity or float('inf'):.4g}")
            for name, error in self.failed.items():
                add_failure(results, name, error)
            add_throughput(results, scores, self.settings.device)
        return results

    @contextmanager
    def _loaded(self, directory: Path) -> Iterator[tuple]:
        """Model and tokenizer on the device; freed afterwards, so that compared models never lie side by side."""
        settings = self.settings
        check_recorded_layers(directory, nope_layers_of(read_model_config(directory)))
        if (directory / CANARY_FILE).is_file():  # as it is stored: rounded weights are another model
            hold_to_canary(load_causal_lm(directory), directory)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]
        model = load_causal_lm(directory, dtype, settings.attn_implementation).to(settings.device)
        try:
            yield model, load_tokenizer(directory)
        finally:
            del model
            gc.collect()

    def _score(self, model: object, tokenizer: object, name: str, texts: list[str]) -> DatasetScore:
        settings = self.settings
        bar = tqdm(unit=" tokens", unit_scale=True, desc=name, disable=None, leave=False)

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        with bar:
            return score_documents(
                model,
                tokenizer,
                texts,
                max_length=settings.max_length,
                batch_size=settings.batch_size,
                device=settings.device,
                min_tokens=settings.min_tokens,
                progress=progress,
            )

    def _settings(self, tokenizer: object) -> dict:
        hidden = ("output_dir", "cache_dir", "model_path", "datasets", "compare_to")
        settings = {k: v for k, v in asdict(self.settings).items() if k not in hidden and v is not None}
        prefix = resolve_prefix(tokenizer)
        return {
            "protocol": "document",
            "prefix_token": f"{tokenizer.convert_ids_to_tokens(prefix)} ({prefix})",
            **settings,
        }

    # -- comparison and report -----------------------------------------------------------------------

    def _compare(self, results: dict) -> list[ComparisonRow]:
        """Rows of this model and of those it is compared with, in the order in which they came to be."""
        if not self.others:
            return []
        milestones = [(*milestone(d), self._evaluate(d), d) for d in self.others]
        milestones.append((*milestone(self.directory), results, self.directory))
        milestones.sort(key=lambda m: m[0])
        results["milestones"] = [
            {
                "label": label,
                "role": role,
                "path": str(directory),
                "datasets": {
                    name: {key: entry[key] for key in ("loss", "perplexity", "bits_per_byte")}
                    for name, entry in other["datasets"].items()
                    if entry["status"] == "ok"
                },
            }
            for _, label, role, other, directory in milestones
        ]
        return [
            comparison_row(label, role, other, name)
            for name in self.texts
            if name not in self.failed
            for _, label, role, other, _ in milestones
        ]

    def _report(self, results: dict, rows: list[ComparisonRow]) -> None:
        out = self.settings.output_dir
        plots, figures = [], {}
        for name, series in self.by_position.items():
            path = plot_loss_by_position(series, out / "plots" / f"loss_by_position_{_file_name(name)}.png")
            figures[f"plots/loss_by_position/{name}"] = path
            plots.append(
                (path, f"Loss on {name} by position in the window: lower is better, and it should fall to the right.")
            )
        history = training_history(self.directory)
        if history:
            path = plot_training_curve(history, out / "plots" / "training_curve.png", _references(rows))
            figures["plots/training_curve"] = path
            plots.insert(
                0,
                (
                    path,
                    "Training loss (thin) and held-out loss (dots) over both stages; it should come down to the "
                    "dashed line of the base.",
                ),
            )
        write_tensorboard(results, out / "tensorboard", figures)
        experiment = experiment_of(self.directory)
        if experiment is not None:  # beside the stages' curves, too
            write_tensorboard(results, experiment.tensorboard / "evaluation", figures)
        report = out / "evaluation_report.md"
        write_report(results, report, plots, rows)
        log.info(f"report: {report}")


def _references(rows: list[ComparisonRow]) -> dict[str, float]:
    """The base's and the untrained model's losses, for lines across the training curve."""
    if not rows:
        return {}
    return {row.label: row.loss for row in rows if row.dataset == rows[0].dataset and row.role != "trained"}


def experiment_of(model_dir: Path) -> Experiment | None:
    """The experiment whose final_model this is."""
    experiment = Experiment(model_dir.resolve().parent)
    return experiment if experiment.read_metrics() else None


def training_history(model_dir: Path) -> dict:
    """Curves of both stages when the model is an experiment's final_model; else nothing."""
    experiment = experiment_of(model_dir)
    if experiment is None:
        return {}
    stages = experiment.read_metrics().get("stages", {})
    history = {}
    for stage, block in sorted(stages.items()):
        records = block.get("history", [])
        history[f"stage{stage}"] = {
            "train": [(r["tokens"], r["loss"]) for r in records if "loss" in r],
            "eval": [(r["tokens"], r["eval_loss"]) for r in records if "eval_loss" in r],
        }
    return {k: v for k, v in history.items() if v["train"]}


def _probe(model: object) -> list[int] | None:
    """NoPE layers found, or None for an architecture whose layers cannot be probed."""
    try:
        return probe_nope_layers(model)
    except (AttributeError, KeyError, TypeError) as error:
        log.debug(f"no probe for {type(model).__name__}: {error}")
        return None


def _environment() -> dict:
    pairs = (line.split(": ", 1) for line in environment_lines() if ": " in line and not line.startswith("env "))
    return {key: value for key, value in pairs} | {"evaluated": time.strftime("%Y-%m-%d %H:%M:%S %z")}


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "_" for c in Path(name).name)


def default_output_dir(model_path: str) -> Path:
    """``evaluation/`` in the experiment that the model belongs to, or beside a model that belongs to none.

    Raises: ConfigError for a hub name, which lies in no directory of the user's.
    """
    path = Path(model_path)
    if not path.is_dir():
        raise ConfigError(f"--output_dir is needed: {model_path!r} is no directory to put the results beside")
    return path.resolve().parent / "evaluation"
