"""An evaluation: measures the model, then the compared models on the same documents, and writes the report."""

import time

import torch

from flare.distributed import process_group
from flare.distributed.process_group import World
from flare.errors import ConfigError, DataError, EnvError
from flare.evaluation.compare import Measured, comparison, comparison_rows, milestone_records, reference_of
from flare.evaluation.datasets import DatasetRequest, load_texts, parse_name
from flare.evaluation.finished import FinishedParts, texts_identity
from flare.evaluation.lm_eval_tasks import check_lm_eval
from flare.evaluation.measure import Measurement, Place, Task
from flare.evaluation.models import Milestone, experiment_of, milestones
from flare.evaluation.options import EvaluationSettings
from flare.evaluation.report.fair_control import same_training
from flare.evaluation.report.figures import Curves, draw_figures, training_length
from flare.evaluation.report.recovery import control_curve, recovery_of
from flare.evaluation.report.report import report_verdict, write_report
from flare.evaluation.report.tensorboard import write_tensorboard
from flare.evaluation.results import write_results
from flare.hub import local_model_dir
from flare.logs import log
from flare.run.environment_info import environment_lines
from flare.run.experiment import check_writable
from flare.run.metrics_file import recorded_stages

EXIT_DATA = DataError.exit_code


class Evaluation:
    """Runs an evaluation and writes results after each part. Exists on every rank; rank 0 writes.

    Args:
        device: of this rank, or None to distribute the model over all GPUs.
    """

    def __init__(self, settings: EvaluationSettings, world: World, device: torch.device | None) -> None:
        self.settings, self.world = settings, world
        if settings.lm_eval_tasks:
            process_group.run_on_main_rank(world, lambda: check_lm_eval(settings.lm_eval_tasks))
        process_group.run_on_main_rank(world, lambda: check_writable("--output_dir", settings.output_dir))
        self.parts = FinishedParts(settings.output_dir)
        self.place = Place(world, device, self.parts)
        names = [settings.model_path, *settings.compare_to]
        # Rank 0 downloads; the others use its cache.
        process_group.run_on_main_rank(world, lambda: [str(local_model_dir(n, settings.cache_dir)) for n in names])
        self.milestones = milestones([local_model_dir(n, settings.cache_dir) for n in names], names)
        self.results_file = settings.output_dir / "evaluation_results.json"
        self.environment = process_group.run_on_main_rank(world, _environment)  # runs git and nvidia-smi, so only once

    def run(self) -> int:
        """Evaluate and write the report. Returns 3 if a data set could not be read or scored, otherwise 0."""
        task = self._load_task()
        model = self._measure(self.milestones[0], task, with_extras=True)
        results = model.results
        others = [self._measure_other(who, task, results) for who in self.milestones[1:]]
        process_group.run_on_main_rank(self.world, lambda: self._conclude(model, others, not task.failed))
        return EXIT_DATA if task.failed else 0

    def _load_task(self) -> Task:
        """Load all data sets; every rank has the same texts."""
        task = Task({}, {})
        for word in self.settings.datasets:
            try:
                request = parse_name(word, self.settings.cache_dir)
                if request.name in task.requests:
                    raise ConfigError(f"--datasets {word}: {request.name} is given twice")
                task.texts[request.name] = self._load_texts(request)
                task.requests[request.name] = request
            except (DataError, EnvError, ConfigError) as error:
                log.warning(f"data set {word}: {error}")
                task.failed[word] = str(error)
        return task

    def _load_texts(self, request: DatasetRequest) -> list[str]:
        """Rank 0 reads (and downloads) first, then the other ranks read the same texts."""
        settings, texts = self.settings, []

        def read() -> str:
            texts.extend(load_texts(request, settings.max_samples_per_dataset, settings.data_mirror))
            return texts_identity(texts)

        expected = process_group.run_on_main_rank(self.world, read)
        found = process_group.run_on_all_ranks(self.world, lambda: expected if self.world.is_main else read())
        if set(found) != {expected}:
            raise DataError(f"data set {request.name!r} differs between processes")
        return texts

    def _measure(self, who: Milestone, task: Task, with_extras: bool = False) -> Measured:
        """Measure one model. Results of the evaluated model are saved after each part."""
        save = self._save if with_extras else lambda _results: None
        measurement = Measurement(self.settings, task, self.place, who, save)
        results = measurement.run(self.environment, with_extras)
        save(results)
        return Measured(who, results, measurement.scores)

    def _measure_other(self, who: Milestone, task: Task, results: dict) -> Measured:
        """Measure a compared model. Its failures are recorded under ``not_compared`` in ``results``."""
        before = set(task.failed)
        measured = self._measure(who, task)
        missing = {name: f"{who.label}: {error}" for name, error in task.failed.items() if name not in before}
        if missing:
            results["not_compared"] = results.get("not_compared", {}) | missing
        return measured

    def _save(self, results: dict) -> None:
        process_group.run_on_main_rank(self.world, lambda: write_results(results, self.results_file))

    # -- comparison and report -----------------------------------------------------------------------

    def _conclude(self, model: Measured, others: list[Measured], complete: bool) -> None:
        """Write comparison, recovery, report, plots and TensorBoard; then delete finished parts."""
        results, settings, rows = model.results, self.settings, []
        ordered = sorted([*others, model], key=lambda m: m.who.order)
        experiment = experiment_of(model.who.directory)
        stages = recorded_stages(experiment) if experiment else {}
        recovered = recovery_of(stages)
        if recovered is not None:
            results["recovery"] = recovered.to_json()
        if others:
            results["comparison"] = comparison(model, reference_of(others), settings.seed)
            results["milestones"] = milestone_records(ordered)
            rows = comparison_rows(ordered, settings.seed)
        trained = training_length(stages)
        results["verdict"] = report_verdict(results, rows, model.who.label, trained)
        write_results(results, self.results_file)
        curves = Curves(stages, control_curve(recovered, _control_stages(ordered, model.who)))
        plots = settings.output_dir / "plots"
        figures = draw_figures(results, model.who.label, _positions(ordered), curves, plots)
        report = settings.output_dir / "evaluation_report.md"
        write_report(results, report, figures, rows, model.who.label, trained)
        boards = [settings.output_dir / "tensorboard"]
        boards += (
            [experiment.tensorboard / "evaluation"] if experiment else []
        )  # also next to the curves of the stages
        for board in boards:
            write_tensorboard(results, board, figures, model.who.label, report.read_text(encoding="utf-8"))
        if complete:
            self.parts.clear()
        log.info(results["verdict"])
        log.info(f"report: {report}")


def _control_stages(models: list[Measured], evaluated: Milestone) -> dict:
    """Recorded stages of the last control with the same training; {} without one."""
    controls = [m.who for m in models if m.who.role == "control" and same_training(m.who.training, evaluated.training)]
    experiment = experiment_of(controls[-1].directory) if controls else None
    return recorded_stages(experiment) if experiment else {}


def _positions(models: list[Measured]) -> dict[str, dict[str, list[dict]]]:
    """Data set -> label -> position buckets."""
    names = dict.fromkeys(name for m in models for name in m.scores)
    return {n: {m.who.label: m.scores[n].loss_by_position for m in models if n in m.scores} for n in names}


def _environment() -> dict:
    pairs = (line.split(": ", 1) for line in environment_lines() if ": " in line and not line.startswith("env "))
    return {key: value for key, value in pairs} | {"evaluated": time.strftime("%Y-%m-%d %H:%M:%S %z")}
