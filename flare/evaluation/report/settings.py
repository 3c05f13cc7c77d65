"""The report's last table: how the numbers were made."""

from flare.evaluation.report.markdown import table
from flare.nope.layers import format_layers


def settings_section(results: dict) -> str:
    """Model, protocol and machine, a line each, and the protocol in words."""
    model, probe = results["model"], results["model"]["nope_probe"]
    verdicts = {True: "as configured", False: "NOT as configured", None: "this architecture is not probed"}
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
    """The protocol in words."""
    what = {
        "document": "Protocol `document`: each document alone, behind the prefix token",
        "concat": "Protocol `concat`: all documents in one sequence behind the prefix token, joined by the "
        "end-of-text token, which is context and not scored",
    }
    if settings.get("stride"):
        how = "in windows of `max_length` tokens that move by `stride`"
    else:
        how = (
            "in disjoint windows of `max_length` predicted tokens with one token of context, the last window filled "
            "to the left"
        )
    same = ""
    if settings.get("protocol", "document") == "document" and not settings.get("stride"):
        same = ", as by lm-eval's rolling log-likelihood"
    return f"{what[settings.get('protocol', 'document')]}, {how}. Every token is scored exactly once{same}."


def _value(value: object) -> object:
    """A setting as a table shows it."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return value
