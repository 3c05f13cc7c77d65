"""Input of people and programs: config files, layer specs, nvidia-smi's output.

Each becomes what an independent reading of it says, or an error of one line; never a traceback.
"""

import json
import re
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flare.config.config_file import parse_jsonc
from flare.config.options import FIELDS, SECTIONS
from flare.config.parse import resolve
from flare.config.validate import parse_layer_words, parse_lengths, parse_weights
from flare.errors import ConfigError, EnvError, FlareError
from flare.files import REPO
from flare.gpus.nvidia_smi import Gpu, query_gpus
from flare.gpus.selection import GpuRequest, parse_gpu_ids, select_gpus
from flare.nope.layers import format_layers, parse_layers
from tests.fake_nvidia_smi import install_raw
from tests.faults.changes import CHANGES, changed

TEXT = st.text(max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)

# -- JSON with comments -------------------------------------------------------------------------------------------


@given(JSON.filter(lambda value: value == value and "NaN" not in json.dumps(value)), st.lists(TEXT, max_size=30))
def test_comments_change_nothing(value: object, comments: list[str]) -> None:
    """json.dumps knows where a token ends; comments are put there."""
    pieces = list(json.JSONEncoder(indent=1, allow_nan=True).iterencode(value))
    assume("Infinity" not in "".join(pieces))
    text = ""
    for number, piece in enumerate(pieces):
        words = " ".join(comments[number].splitlines()) if number < len(comments) else ""
        text += f"{piece}// {words}\n" if words else piece
    assert parse_jsonc(text, "x.json") == value


# -- config files -------------------------------------------------------------------------------------------------


def right_value(name: str) -> st.SearchStrategy:
    """Values that the option takes."""
    field = FIELDS[name]
    low, high = field.ge or field.gt or 0, field.le or field.lt or 1000
    numbers = st.floats(low, high, exclude_min=field.gt is not None, exclude_max=field.lt is not None)
    integers = st.integers(low, max(high, low + 1000) if field.le is None else high)
    texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)
    strategies: dict[object, st.SearchStrategy] = {
        "int": integers, "float": numbers, "bool": st.booleans(), "str": texts,
        parse_gpu_ids: st.just([0, 1]), parse_weights: st.just([0.5, 2.0]), parse_lengths: st.just([16, 32]),
        parse_layer_words: st.sampled_from((["1", "3-5"], ["every:4"], ["all"])),
    }  # fmt: skip
    if field.choices:
        return st.sampled_from(field.choices)
    values = strategies[field.parse or field.kind]
    return values | st.just("auto") if field.words else values


def entry(names: list[str]) -> st.SearchStrategy:
    return st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), right_value(name)))


NAMES = [name for name in FIELDS if name != "stage"]
RIGHT = st.lists(entry(NAMES), max_size=6).map(dict)
REPLACING = {"max_steps", "num_train_epochs", "warmup_steps", "warmup_ratio", "gpu_ids", "gpu_type"}
"""The higher rank's decides about the other one, too: tests/config/test_config.py."""


def one_error(error: FlareError) -> bool:
    """One line, or the number of problems and then one line for each."""
    lines = str(error).splitlines()
    return len(lines) == 1 or lines[0] == f"{len(lines) - 1} problems:"


def options_of(path: Path, text: str | bytes) -> dict | None:
    """The options that the file sets; None when it is refused."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", errors="surrogatepass"))
    try:
        return vars(resolve(["--config", str(path)]).options)
    except ConfigError as error:
        assert one_error(error), error
        return None


@given(RIGHT, RIGHT, st.booleans(), st.sampled_from([1, 2]))
def test_right_values_arrive_by_rank(
    tmp_path_factory: pytest.TempPathFactory, general: dict, special: dict, in_sections: bool, stage: int
) -> None:
    content: dict = {"stage": stage, "stages": {str(stage): special, str(3 - stage): {"save_steps": 77}}}
    for name, value in general.items():
        block = content.setdefault(FIELDS[name].section, {}) if in_sections else content
        block[name] = value
    found = options_of(tmp_path_factory.getbasetemp() / "right.json", json.dumps(content))
    for name, value in (general | special).items() if found else ():
        if name not in REPLACING:
            assert found[name] == value, name


KEYS = st.sampled_from([*FIELDS, *SECTIONS, "stages", "1", "2"]) | TEXT
ODD = st.recursive(
    JSON | st.integers(10**300, 10**310) | st.sampled_from([True, None, "", "auto", "none", [], {}, -1, 0, 1e308]),
    lambda inner: st.dictionaries(KEYS, inner, max_size=4) | st.lists(inner, max_size=3),
    max_leaves=10,
)


@given(
    st.dictionaries(KEYS, ODD, max_size=5)
    | RIGHT.flatmap(lambda d: st.dictionaries(KEYS, ODD, max_size=1).map(d.__or__))
)
def test_any_json_is_options_or_an_error(tmp_path_factory: pytest.TempPathFactory, content: dict) -> None:
    found = options_of(tmp_path_factory.getbasetemp() / "odd.json", json.dumps(content))
    for name, value in content.items() if found else ():
        if is_plain(name) and value is not None:
            assert found[name] == value, name
            assert isinstance(found[name], bool) == isinstance(value, bool)


def is_plain(name: str) -> bool:
    """Whether an option of this name arrives as it was written."""
    return name in FIELDS and name not in REPLACING and not FIELDS[name].parse and not FIELDS[name].words


SHIPPED = (REPO / "training_config.json").read_bytes()


@given(CHANGES)
def test_a_damaged_config_file_is_options_or_an_error(tmp_path_factory: pytest.TempPathFactory, changes: list) -> None:
    options_of(tmp_path_factory.getbasetemp() / "changed.json", changed(SHIPPED, changes))


TYPED = st.text(st.characters(exclude_characters="\0"), max_size=8)  # no command line holds a NUL
TYPICAL = ("auto", "1", "-1", "1e999", "9" * 5000, "0-3", ".", "#")
FLAGS = st.tuples(
    st.sampled_from([*NAMES, "config", "output_dir", "stage1_max_seq_len"]),
    st.lists(TYPED | st.sampled_from(TYPICAL), max_size=2),
)


@given(st.lists(FLAGS, max_size=3))
def test_any_command_line_is_options_or_an_error(flags: list[tuple[str, list[str]]]) -> None:
    argv = [word for name, words in flags for word in (f"--{name}", *words)]
    assume("--help" not in argv and "-h" not in argv)
    try:
        resolve(argv)
    except ConfigError as error:
        assert one_error(error), error


# -- layers -------------------------------------------------------------------------------------------------------


def layers_by_table(words: list[str], depth: int) -> list[int] | None:
    """What the words mean, looked up in a table of all that can be said of such a model; None for an error."""
    every = range(depth)
    alone = {"none": [], "all": list(every)}
    alone["auto"] = [i for i in every if round(20 * depth / 36) <= i <= round(32 * depth / 36)]
    if len(words) == 1 and words[0] in alone:
        return alone[words[0]]
    table = {str(i): [i] for i in every}
    table |= {f"{a}-{b}": [i for i in every if a <= i <= b] for a in every for b in every if a <= b}
    table |= {f"every:{n}": [i for i in every if (i + 1) % n == 0] for n in range(1, depth + 1)}
    found = [table.get(re.sub(r"(?<![0-9])0+(?=[0-9])", "", word)) for word in words]
    if not found or None in found:
        return None
    named = [layer for layers in found for layer in layers]
    return sorted(named) if len(set(named)) == len(named) else None


NUMBER = st.integers(0, 14).map(str)
ODD_WORDS = ("auto", "none", "all", "٣", "²", "1--2", "9" * 5000, "every:" + "9" * 5000)
WORD = st.one_of(
    NUMBER,
    st.tuples(NUMBER, NUMBER).map("-".join),
    NUMBER.map("every:{}".format),
    st.sampled_from(ODD_WORDS),
    st.text("0123456789-:every", max_size=5).filter(str.strip),
)


@given(st.lists(WORD, max_size=4), st.integers(1, 14), st.sampled_from((" ", ",", ", ")))
def test_layer_specs_mean_what_a_table_says(words: list[str], depth: int, separator: str) -> None:
    expected = layers_by_table(words, depth)
    for spec in (words, separator.join(words)):
        try:
            assert parse_layers(spec, depth) == expected
        except ConfigError as error:
            assert expected is None, error
            assert len(str(error).splitlines()) == 1
    if expected:
        assert parse_layers(format_layers(expected), depth) == expected


@given(st.text(max_size=12) | st.integers() | JSON)
def test_any_spec_is_layers_or_an_error(spec: object) -> None:
    for parse in (lambda: parse_layers(spec, 12), lambda: parse_gpu_ids(spec)):
        try:
            found = parse()
            assert all(type(i) is int and i >= 0 for i in found) and len(set(found)) == len(found)
        except ConfigError as error:
            assert len(str(error).splitlines()) == 1


# -- nvidia-smi ---------------------------------------------------------------------------------------------------

MEMORY = st.integers(0, 200_000).map(str) | st.sampled_from(
    ("[N/A]", "N/A", "[Not Supported]", "[Insufficient Permissions]")
)
GOOD_GPU = st.fixed_dictionaries(
    {
        "name": st.sampled_from(("NVIDIA A40", "NVIDIA A800 80GB PCIe", "Tesla, T4", "显卡")),
        "uuid": st.uuids().map("GPU-{}".format),
        "total": MEMORY,
        "used": MEMORY,
    }
)
BAD_LINES = st.sampled_from(
    (
        "Segmentation fault",
        "0, A40",
        "x, NVIDIA A40, GPU-1, 1, 1, 570",
        "0, , GPU-1, 1, 1, 570",
        "1, A40, GPU-1, -5, 1, 570",
        "2, A40, GPU-1, 1, 1e3, 5",
        "²,A,B,1,1,5",
    )
)
IGNORED = st.sampled_from(("", "  ", "WARNING: infoROM is corrupted at gpu 0000:3B:00.0"))


@given(st.lists(GOOD_GPU, max_size=5), st.lists(IGNORED, max_size=2), BAD_LINES | st.none(), st.data())
def test_every_gpu_is_read_as_it_was_printed_or_the_line_is_named(
    tmp_path_factory: pytest.TempPathFactory,
    gpus: list[dict],
    ignored: list[str],
    bad: str | None,
    data: st.DataObject,
) -> None:
    lines = [f"{i}, {c['name']}, {c['uuid']}, {c['total']}, {c['used']}, 570.1" for i, c in enumerate(gpus)]
    output = data.draw(st.permutations([*lines, *ignored, *([bad] if bad else [])]))
    try:
        found = gpus_printed(tmp_path_factory, "\n".join(output).encode(), 0)
    except EnvError as error:
        assert bad or not gpus
        assert len(str(error).splitlines()) == 1
        return
    assert gpus and not bad
    expected = [
        Gpu(i, c["name"], c["uuid"], *(int(c[m]) if c[m].isdecimal() else None for m in ("total", "used")), "570.1")
        for i, c in enumerate(gpus)
    ]
    assert sorted(found, key=lambda gpu: gpu.index) == expected


def gpus_printed(
    tmp_path_factory: pytest.TempPathFactory, output: bytes, exit_code: int, **environment: str
) -> list[Gpu]:
    """What ``query_gpus`` makes of a program that prints this."""
    fake = install_raw(tmp_path_factory.getbasetemp() / "bin", output, exit_code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{fake.directory}:/usr/bin:/bin")
        return query_gpus(**environment)


@given(
    st.binary(max_size=200)
    | CHANGES.map(lambda c: changed(b"0, NVIDIA A40, GPU-1, 46068, 4, 570\n1, NVIDIA A40, GPU-2, 46068, 4, 570\n", c)),
    st.sampled_from([0, 0, 14, 9]),
    TEXT | st.none(),
)
def test_any_output_is_gpus_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, output: bytes, exit_code: int, visible: str | None
) -> None:
    try:
        gpus = gpus_printed(tmp_path_factory, output, exit_code)
        chosen = select_gpus(GpuRequest(allow_busy=True), gpus, visible).gpus
        assert chosen and all(gpu in gpus for gpu in chosen)
    except FlareError as error:
        assert len(str(error).splitlines()) == 1
