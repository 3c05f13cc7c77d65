"""The settings table of the report: model, protocol and environment."""

from flare.evaluation.report.markdown import table
from flare.nope.layers import format_layers


def settings_section(results: dict) -> str:
    """A table of model, settings and environment, and a description of the protocol."""
    model, probe = results["model"], results["model"]["nope_probe"]
    verdicts = {True: "as configured", False: "NOT as configured", None: "not available for this architecture"}
    rows = [
        ("model", model["path"]),
        ("model type", model["model_type"]),
        ("parameters", f"{model['num_parameters']:,}"),
        ("NoPE layers", format_layers(model["nope_layers"])),
        (
            "NoPE probe",
            f"{verdicts[probe['verified']]} (ignoring positions: {format_layers(probe['layers'])})",
        ),
        ("RoPE theta", "–" if model["rope_theta"] is None else f"{model['rope_theta']:g}"),
        ("tokenizer SHA-256", model["tokenizer_sha256"]),
        *((name.replace("_", " "), _value(value)) for name, value in results["settings"].items()),
    ]
    throughput = results["throughput"]
    if throughput["tokens_per_sec"]:
        rows.append(("scored tokens per second", f"{throughput['tokens_per_sec']:,.0f}"))
    if throughput["peak_memory_bytes"]:
        rows.append(("peak memory", f"{throughput['peak_memory_bytes'] / 2**30:.2f} GiB"))
    rows += results["environment"].items()
    text = "## Settings\n\n" + table(("setting", "value"), rows)
    return text + "\n\n" + _protocol(results["settings"])


def _protocol(settings: dict) -> str:
    """A description of the protocol."""
    what = {
        "document": "Protocol `document`: each document is scored separately after the prefix token",
        "concat": "Protocol `concat`: all documents are joined to one sequence after the prefix token, separated by the "
        "end-of-text token, which is not scored",
    }
    if settings.get("stride"):
        how = "in windows of `max_length` tokens that move by `stride`"
    else:
        how = (
            "in disjoint windows of `max_length` scored tokens with one token of context; the last window is extended "
            "to the left to full length"
        )
    same = ""
    if settings.get("protocol", "document") == "document" and not settings.get("stride"):
        same = ", as in the rolling log-likelihood of lm-eval"
    return f"{what[settings.get('protocol', 'document')]}, {how}. Every token is scored exactly once{same}."


def _value(value: object) -> object:
    """A setting as text for the table."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return value
