"""What TensorBoard shows of a run: both stages on one axis, no point of a resumed run twice, settings and plan."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer import event_file_writer

from flare.run.experiment import Experiment
from flare.run.metrics_file import record_status
from flare.train.tensorboard import RESULTS, TensorBoardWriter, earlier_stages


def events_of(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory), size_guidance={"tensors": 0}).Reload()


def curve(directory: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, round(event.value, 4)) for event in events_of(directory).Scalars(tag)]


def evaluation(step: int, loss: float, **more: float) -> dict:
    return {"step": step, "tokens": 100 * step, "eval_loss": loss, **more}


def write(experiment: Experiment, stage: int, records: list[dict], history: list[dict] = ()) -> None:
    board = TensorBoardWriter(experiment, stage, history)
    for record in records:
        board.record(record)
    board.close()


@pytest.fixture(autouse=True)
def a_second_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Event files are read in the order of the seconds in their names; the starts of a run are further apart."""
    seconds = itertools.count(1_800_000_000)
    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: next(seconds)))


def test_tokens_and_the_bases_loss_come_from_earlier_stages() -> None:
    stages = {
        "1": {"history": [evaluation(0, 3.0, rope_eval_loss=2.0), evaluation(4, 2.5)]},
        "2": {"history": [evaluation(9, 2.1)]},
    }
    assert earlier_stages(stages, 1) == (0, None)
    assert earlier_stages(stages, 2) == (400, 2.0)
    assert earlier_stages({}, 2) == (0, None)


def test_stages_follow_each_other_on_one_axis_of_tokens_with_the_base_as_a_line(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path / "run")
    experiment.root.mkdir()
    first = [evaluation(0, 3.0, rope_eval_loss=2.0), evaluation(4, 2.5)]
    write(experiment, 1, first)
    record_status(experiment, 1, "finished", history=first)
    write(experiment, 2, [evaluation(0, 2.5), evaluation(3, 2.2)])
    by_tokens = experiment.tensorboard / "by_tokens"
    assert curve(by_tokens / "stage1", "all_stages/eval_loss") == [(0, 3.0), (400, 2.5)]
    assert curve(by_tokens / "stage2", "all_stages/eval_loss") == [(400, 2.5), (700, 2.2)]
    assert curve(by_tokens / "base", "all_stages/eval_loss") == [(0, 2.0), (400, 2.0), (700, 2.0)]
    assert curve(experiment.tensorboard / "stage2", "eval/loss") == [(0, 2.5), (3, 2.2)]  # the stages' steps overlay


def test_steps_after_a_killed_runs_checkpoint_are_not_shown_twice(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path / "run")
    history = [evaluation(0, 3.0, rope_eval_loss=2.0), evaluation(2, 2.8)]
    write(experiment, 1, [*history, evaluation(4, 9.9)])
    write(experiment, 1, [evaluation(4, 2.5)], history)
    by_tokens = experiment.tensorboard / "by_tokens"
    assert curve(experiment.tensorboard / "stage1", "eval/loss") == [(0, 3.0), (2, 2.8), (4, 2.5)]
    assert curve(by_tokens / "stage1", "all_stages/eval_loss") == [(0, 3.0), (200, 2.8), (400, 2.5)]
    assert curve(by_tokens / "base", "all_stages/eval_loss") == [(0, 2.0), (200, 2.0), (400, 2.0)]


def test_settings_and_plan_are_written(tmp_path: Path) -> None:
    board = TensorBoardWriter(Experiment(tmp_path / "run"), 1, [])
    board.describe({"learning_rate": 1e-4, "nope_layers": "20-32"}, ["model    Qwen", "GPUs     4 x A800"])
    board.close()
    events = events_of(board.steps.log_dir)
    text = events.Tensors("plan/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "    model    Qwen\n    GPUs     4 x A800\n"
    found = events.summary_metadata
    start = HParamsPluginData.FromString(found["_hparams_/session_start_info"].plugin_data.content).session_start_info
    assert start.hparams["learning_rate"].number_value == pytest.approx(1e-4)
    assert start.hparams["nope_layers"].string_value == "20-32"
    columns = HParamsPluginData.FromString(found["_hparams_/experiment"].plugin_data.content).experiment
    assert [metric.name.tag for metric in columns.metric_infos] == list(RESULTS)
