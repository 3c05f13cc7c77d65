"""The role of each compared model in an experiment, its label, and whether a control had the same training."""

import json
from pathlib import Path

import pytest

from flare.errors import ConfigError
from flare.evaluation.models import milestones
from flare.evaluation.report.fair_control import differences, same_training, training_of


def test_control_is_distinguished_from_base_by_its_stages(tmp_path: Path) -> None:
    """Also where stage 1's model was set aside, one directory deeper."""
    for root, stages in (("base", {"2": {}}), ("control", {"1": {}, "2": {}})):
        for stage, directory in ((1, "stage1/final_model"), (2, "final_model")):
            (tmp_path / root / directory).mkdir(parents=True)
            config = {"model_type": "qwen2", "num_hidden_layers": 4, "flare": {"stage": stage}}
            (tmp_path / root / directory / "config.json").write_text(json.dumps(config))
        (tmp_path / root / "training_metrics.json").write_text(json.dumps({"stages": stages}))
    models = ("base/final_model", "control/stage1/final_model", "control/final_model")
    found = milestones([tmp_path / model for model in models])
    assert [m.label for m in found] == ["base", "control (stage 1)", "control (stage 2)"]
    assert [m.training for m in found] == [{}, {"stages": [1]}, {"stages": [1, 2]}]


def test_stages_are_found_when_stage1_and_stage2_are_two_experiments(tmp_path: Path) -> None:
    """NAME_stage2 that started from NAME_stage1: a control there is not a base. A moved model has no record."""
    for kind, nope_layers in (("control", []), ("mine", [1])):
        for stage in (1, 2):
            root = tmp_path / f"{kind}_stage{stage}"
            (root / "final_model").mkdir(parents=True)
            config = {"model_type": "qwen2", "num_hidden_layers": 4, "flare": {"stage": stage}}
            config |= {"nope_layers": nope_layers, "model_type": "qwen2_nope"} if nope_layers else {}
            (root / "final_model" / "config.json").write_text(json.dumps(config))
            start = tmp_path / (f"{kind}_stage1" if stage == 2 else "base") / "final_model"
            block = {"status": "finished", "starts_from": str(start)}
            metrics = {"current_stage": stage, "stages": {str(stage): block}}
            (root / "training_metrics.json").write_text(json.dumps(metrics))
    names = ("control_stage1", "control_stage2", "mine_stage2")
    found = milestones([tmp_path / name / "final_model" for name in names])
    assert [m.label for m in found] == ["control (stage 1)", "control (stage 2)", "stage 2"]
    assert [m.training["stages"] for m in found] == [[1], [1, 2], [1, 2]]
    other_start = {"current_stage": 2, "stages": {"2": {"status": "finished", "starts_from": str(tmp_path / "base")}}}
    (tmp_path / "mine_stage2" / "training_metrics.json").write_text(json.dumps(other_start))
    assert milestones([tmp_path / "mine_stage2" / "final_model"])[0].training == {"stages": [2]}
    (tmp_path / "mine_stage2" / "final_model").rename(tmp_path / "moved")
    assert milestones([tmp_path / "moved"])[0].training is None


def test_fair_control_had_the_same_training_except_for_rope() -> None:
    """By training_metrics.json: data, length, schedule, steps; not the division of work or the NoPE layers."""

    def block(**other: object) -> dict:
        identity = {"data": "5f", "max_seq_length": 4096, "packing": "document", "train_layers": "layers 20-32"}
        settings = {"learning_rate": 1e-4, "warmup_steps": 10, "per_device_train_batch_size": 3, "gpu_type": "A800"}
        facts = {"identity": identity, "settings": settings, "totals": {"steps": 1000, "tokens": 49_152_000}}
        return {name: fact | other.get(name, {}) for name, fact in facts.items()}

    mine = training_of({"1": block(), "2": block()}, 2)
    same = block(settings={"gpu_type": "A40", "per_device_train_batch_size": 1, "no_rope_layers": ["none"]})
    assert same_training(training_of({"1": same, "2": same}, 2), mine)
    assert same_training(
        training_of({"1": block(), "2": block(settings={"learning_rate": 1.0})}, 1), training_of({"1": block()}, 1)
    )
    for other, words in (
        (block(settings={"learning_rate": 3e-5}), "learning_rate of stage 2 3e-05 instead of 0.0001"),
        (block(totals={"tokens": 40_000_000}), "tokens of stage 2 40,000,000 instead of 49,152,000"),
        (block(identity={"data": "a1"}), "different data of stage 2"),
    ):
        control = training_of({"1": block(), "2": other}, 2)
        assert not same_training(control, mine) and differences(control, mine) == [words]
    assert same_training({"stages": [1, 2]}, mine)  # an earlier version recorded less
    assert not same_training(None, mine) and not same_training({}, {})


def test_labels_of_models_with_one_role_are_made_unique_by_their_paths(tmp_path: Path) -> None:
    """Two experiments of one name in two places, a model of the hub in its cache; one model twice is a mistake."""
    places = ("a/mine/final_model", "b/mine/final_model", "b/other/final_model", "hub/snapshots/1d2e")
    for place in places:
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").write_text('{"model_type": "qwen2", "num_hidden_layers": 4}')
    directories = [tmp_path / place for place in places]
    found = milestones(directories, [*map(str, directories[:3]), "Qwen/Qwen2.5-3B"])
    assert [m.label for m in found] == ["base (a/mine)", "base (b/mine)", "base (other)", "base (Qwen2.5-3B)"]
    (tmp_path / "link").symlink_to(directories[0])
    with pytest.raises(ConfigError, match=r"link: the same model is given twice"):
        milestones([directories[0], tmp_path / "link"])
