"""logs/resolved_config-*.json: the resolved options of a start, and the source of each value. No torch."""

import time

from flare.config.options import FIELDS, SECTIONS
from flare.config.parse import ResolvedOptions
from flare.files import write_json
from flare.nope.config_json import theta_of
from flare.nope.layers import format_layers
from flare.plan.trainable import Trainable
from flare.run.run import Run


def write_resolved_config(run: Run) -> None:
    """Write the resolved options of this start to the experiment's logs. Raises: OSError.

    The file can be used as a configuration: ``--config FILE#options`` starts the same run. ``sources`` has the source
    of each option, and ``run`` the model and the hardware.
    """
    resolved = resolved_options(run)
    values, hardware = vars(resolved.options), run.hardware
    content = {
        "options": {
            section: {name: values[name] for name, spec in FIELDS.items() if spec.section == section}
            for section in SECTIONS
        },
        "sources": {name: resolved.sources.get(name, "default") for name in FIELDS},
        "run": {
            "init_from": str(run.init_from),
            "processes": hardware.world_size,
            "hosts": hardware.nodes,
            "gpus_of_this_host": [f"{gpu.index}: {gpu.name}" for gpu in hardware.gpus],
        },
    }
    stamp = time.strftime("%Y%m%d_%H%M%S")
    write_json(run.experiment.logs / f"resolved_config-stage{run.options.stage}-{stamp}.json", content)


def resolved_options(run: Run) -> ResolvedOptions:
    """The options with ``auto`` and the values that the model determines replaced by the resolved values."""
    return run.resolved.with_values(
        precision=run.precision,
        attn_implementation=run.attention,
        no_rope_layers=format_layers(list(run.nope_layers)).split(),
        rope_theta=theta_of(run.config, run.model_name),
        train_layers=_train_layers_option(run.trainable),
    )


def _train_layers_option(trainable: Trainable) -> list[str]:
    """The value of ``--train_layers`` for these trainable layers."""
    if trainable.everything:
        return ["all"]
    return ["nope_attention"] if trainable.attention_only else format_layers(list(trainable.layers)).split()
