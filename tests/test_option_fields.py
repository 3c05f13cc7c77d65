"""Options declared once: type, default, limits and help of the dataclass field reach parser, validation and help."""

from dataclasses import dataclass

import pytest

from flare.argument_parser import OneLineParser, add_options, parse_options
from flare.errors import ConfigError
from flare.evaluation.options import resolve_settings
from flare.option_fields import option, option_fields
from flare.option_values import parse_words


@dataclass
class Example:
    path: str = option("a required text", group="example")
    steps: int = option("number of steps", 10, group="example", ge=1)
    rate: float | None = option("rate", None, group="example", gt=0, lt=1, default_help="the model's own")
    recompute: bool | str = option("switch", False, group="example", words=("auto",))
    mode: str = option("mode", "one", group="example", choices=("one", "two"))
    names: tuple[str, ...] = option("names", (), group="example", parse=parse_words, metavar="NAME")
    seconds: int = 5  # not an option


FIELDS = option_fields(Example)


def parse(*argv: str) -> Example:
    parser = OneLineParser("example", "[flags]", "", "")
    add_options(parser, FIELDS)
    return Example(**parse_options(parser, FIELDS, list(argv)))


def test_types_and_defaults_come_from_the_fields() -> None:
    assert parse("--path", "x") == Example("x")
    given = parse("--path", "x", "--rate", "0.5", "--recompute", "--names", "a", "b", "--steps", "3")
    assert given == Example("x", steps=3, rate=0.5, recompute=True, names=("a", "b"))
    assert parse("--path", "x", "--recompute", "auto").recompute == "auto"
    assert "seconds" not in FIELDS


def test_help_states_each_default_once() -> None:
    assert FIELDS["path"].full_help == "a required text"
    assert FIELDS["steps"].full_help == "number of steps (default: 10)"
    assert FIELDS["rate"].full_help == "rate (default: the model's own)"
    assert FIELDS["recompute"].value_name == "BOOL|auto"
    assert FIELDS["mode"].value_name == "{one,two}"


def test_all_mistakes_of_a_command_line_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        parse("--path", "x", "--steps", "0", "--rate", "1", "--mode", "tow", "--names", "--stepps", "2")
    assert str(error.value).splitlines()[1:] == [
        "  1. unknown argument --stepps; did you mean '--steps'?",
        "  2. --steps must be >= 1, got 0",
        "  3. --rate must be < 1, got 1.0",
        "  4. --mode must be one of one, two; got 'tow'; did you mean 'two'?",
        "  5. --names needs at least one value, none of them empty",
    ]


def test_a_missing_required_option_is_an_error() -> None:
    with pytest.raises(ConfigError, match="required: --path; see example --help"):
        parse()


def test_evaluation_checks_its_flags_in_the_same_way() -> None:
    with pytest.raises(ConfigError, match=r"(?s)--max_length must be >= 1, got 0.*--seed must be a whole number"):
        resolve_settings(["--model_path", "m", "--max_length", "0", "--seed", "x"])
