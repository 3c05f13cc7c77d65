"""logs/resolved_config-*.json: what a start settled on, option by option, and where each value came from. No torch."""

import time

from flare.config.options import FIELDS, SECTIONS
from flare.config.parse import ResolvedOptions
from flare.files import write_json
from flare.nope.config_json import theta_of
from flare.nope.layers import format_layers
from flare.plan.trainable import Trainable
from flare.run.run import Run


def write_resolved_config(run: Run) -> None:
    """Write the file of this start into the experiment's logs. Raises: OSError.

    It is a file of named configurations: ``--config FILE#options`` starts the same run. ``sources`` says of each
    option which level of precedence gave it, and ``run`` what it meant here.
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
    """The run's options with ``auto``, and what the model decides, replaced by what they came to."""
    return run.resolved.with_values(
        precision=run.precision,
        attn_implementation=run.attention,
        no_rope_layers=format_layers(list(run.nope_layers)).split(),
        rope_theta=theta_of(run.config, run.model_name),
        train_layers=_words(run.trainable),
    )


def _words(trainable: Trainable) -> list[str]:
    """``--train_layers`` that means this."""
    if trainable.everything:
        return ["all"]
    return ["nope_attention"] if trainable.attention_only else format_layers(list(trainable.layers)).split()
