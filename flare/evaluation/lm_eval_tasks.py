"""Tasks of EleutherAI's lm-eval on the loaded model. lm-eval is optional: ``pip install lm-eval``."""

import functools
import math
import re
from importlib.util import find_spec
from pathlib import Path

from torch import nn

from flare.distributed import process_group
from flare.distributed.process_group import World
from flare.errors import ConfigError, EnvError
from flare.evaluation.options import EvaluationSettings


def check_lm_eval(tasks: tuple[str, ...]) -> None:
    """Check that lm-eval is installed and knows the tasks, before anything is loaded.

    Raises: EnvError when it is not installed; ConfigError for an unknown task.
    """
    if find_spec("lm_eval") is None:
        raise EnvError(f"--lm_eval_tasks {','.join(tasks)} needs lm-eval, which is not installed: pip install lm-eval")
    files = [task for task in tasks if _is_file(task)]
    missing = [file for file in files if not Path(file).is_file()]
    if not missing:
        known = _task_manager(tasks)
        missing = [task for task in tasks if not known.match_tasks([_name(task)])]
    if missing:
        raise ConfigError(f"--lm_eval_tasks {','.join(tasks)}: no such task: {', '.join(missing)} (lm-eval ls tasks)")


def run_lm_eval(model: nn.Module, tokenizer, settings: EvaluationSettings, world: World) -> dict:
    """Run tasks with lm-eval's wrapper of transformers models; all ranks answer requests. A collective.

    Call ``check_lm_eval`` first.

    Returns: ``{"version", "tasks": {task: {metric: value}}, "num_samples": {task: n}, "num_fewshot"}``; metrics are
    named as in lm-eval: ``name,filter``.
    Raises: FlareError on every rank, for any error in lm-eval.
    """
    from flare.evaluation.lm_eval_ranks import SharedHFLM

    lm = SharedHFLM(
        world,
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        max_length=settings.max_length,
        batch_size=settings.batch_size,
    )
    return process_group.run_on_all_ranks(world, lambda: _evaluate(lm, settings) if world.is_main else lm.serve())[0]


def _evaluate(lm, settings: EvaluationSettings) -> dict:
    """Rank 0: the tasks' documents, prompts and metrics."""
    import lm_eval

    tasks = settings.lm_eval_tasks
    with lm.others_serve():
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=[_name(task) for task in tasks],
            task_manager=_task_manager(tasks),
            limit=settings.lm_eval_limit,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
            bootstrap_iters=1000,
            log_samples=False,
        )
    return {
        "version": lm_eval.__version__,
        "tasks": {task: _plain(metrics) for task, metrics in found["results"].items()},
        "num_samples": {task: counts["effective"] for task, counts in found.get("n-samples", {}).items()},
        "num_fewshot": found.get("n-shot", {}),
    }


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _name(task: str) -> str:
    """The name of a task; for a file, the name in its ``task:`` line."""
    if not _is_file(task):
        return task
    found = re.search(r"^task:\s*[\"']?([^\"'\s]+)", Path(task).read_text(encoding="utf-8"), re.M)
    if not found:
        raise ConfigError(f"--lm_eval_tasks {task}: the file names no task (a line 'task: NAME')")
    return found[1]


@functools.cache
def _task_manager(tasks: tuple[str, ...]):
    """lm-eval's index of tasks: those in the directories of given files, and its own if a task is given by name."""
    from lm_eval.tasks import TaskManager

    directories = sorted({str(Path(task).resolve().parent) for task in tasks if _is_file(task)})
    return TaskManager(include_path=directories or None, include_defaults=not all(map(_is_file, tasks)))


def _plain(metrics: dict) -> dict[str, float]:
    """Finite metrics. Keys without a filter, such as ``sample_len``, are not metrics."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if "," in name and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
