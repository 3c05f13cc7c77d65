"""Foreign files are data, never code; names stay inside the directory; secrets are not written anywhere."""

import ast
import json
import shutil
from pathlib import Path

import pytest

from flare.errors import ConfigError, first_line
from tests.processes import REPO, Zygote

SOURCES = sorted([*(REPO / "flare").rglob("*.py"), *REPO.glob("*.py")])
RUNS_CODE = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec", "compile", "marshal.loads", "shelve.open",
    "yaml.load", "os.system", "os.popen",
}  # fmt: skip


def calls_of(source: Path) -> list[tuple[str, dict[str, ast.expr]]]:
    """(name as written, keyword arguments) of every call."""
    calls = [node for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return [(ast.unparse(call.func), {k.arg: k.value for k in call.keywords if k.arg}) for call in calls]


def is_constant(value: ast.expr | None, constant: object) -> bool:
    return isinstance(value, ast.Constant) and value.value is constant


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(REPO)))
def test_no_file_is_executed_or_unpickled(source: Path) -> None:
    for name, arguments in calls_of(source):
        assert name not in RUNS_CODE
        if name == "torch.load":
            assert is_constant(arguments.get("weights_only"), True)
        assert not is_constant(arguments.get("weights_only"), False)
        assert not is_constant(arguments.get("allow_pickle"), True)
        assert not is_constant(arguments.get("shell"), True)
        trusted = arguments.get("trust_remote_code")
        own_model = source.name == "stock_check.py" or source.name == "compare.py"
        assert trusted is None or own_model or is_constant(trusted, False)


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    """A copy of the base model to make hostile."""
    return Path(shutil.copytree(base, tmp_path / "model"))


def touching(marker: Path) -> str:
    return f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n\n\nclass Evil:\n    pass\n"


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_model_directory_is_not_run(
    zygote: Zygote, flags: list[str], model: Path, tmp_path: Path, file: str
) -> None:
    """A model that brings code for its model or its tokenizer; no question is asked, because stdin is closed."""
    (model / "evil.py").write_text(touching(tmp_path / "marker"))
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    content = json.loads((model / file).read_text()) | {"auto_map": auto_map, "tokenizer_class": "Evil"}
    (model / file).write_text(json.dumps(content))
    ended = zygote.run(*flags, "--model_name_or_path", model, "--max_steps", 1)
    assert not (tmp_path / "marker").exists()
    if file == "config.json":
        assert ended.returncode == 2
        assert "wants to run its own code" in ended.errors[0]
    else:  # tokenizer.json alone says what the tokenizer is
        assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("name", ["../base/model.safetensors", "/etc/hostname"])
def test_an_index_names_no_file_elsewhere(zygote: Zygote, flags: list[str], run: Path, model: Path, name: str) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    ended = zygote.run(*flags, "--model_name_or_path", model)
    assert ended.returncode == 2
    assert f"names a file outside of the directory: {name}" in ended.errors[0]
    assert not run.exists()


def test_a_password_in_a_librarys_error_is_left_out() -> None:
    error = ConfigError("404 for url https://user:sEcReT@mirror.example/api/x")
    assert first_line(error) == "404 for url https://...@mirror.example/api/x"
