"""--verify_endpoint against real HTTP servers in this process, in the forms of vLLM, SGLang and llama.cpp."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from flare.errors import ConfigError, EnvError
from flare.nope.canary.endpoint import verify_endpoint
from flare.nope.canary.file import Canary, read_canary
from flare.nope.canary.measure import write_canary
from flare.nope.load import load_causal_lm
from flare.nope.patch import patch_checkpoint
from tests.conftest import write_base
from tests.processes import run_script, script_environment

LAYERS = [1, 3]
SHARP = {"initializer_range": 0.1}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """true, base (RoPE everywhere) and other: three models; true has a canary."""
    root = tmp_path_factory.mktemp("endpoint")
    write_base(root / "base", **SHARP)
    write_base(root / "other", seed=3, **SHARP)
    patch_checkpoint(root / "base", root / "true", LAYERS)
    write_canary(load_causal_lm(root / "true"), root / "true")
    return root


@pytest.fixture(scope="module")
def models(directory: Path) -> dict[str, torch.nn.Module]:
    return {name: load_causal_lm(directory / name) for name in ("true", "base", "other")}


@pytest.fixture
def canary(directory: Path) -> Canary:
    return read_canary(directory / "true")


class Completions(BaseHTTPRequestHandler):
    """One request of a server; what it serves and how hangs on ``self.server``."""

    def log_message(self, *_args: object) -> None:
        pass

    def reply(self, content: object, status: int = 200) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers), None))
        self.reply({"object": "list", "data": [{"id": name} for name in self.server.names]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), request))
        form = FORMS[self.server.form]
        form(self, request)

    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """(T, V) of the served model."""
        with torch.no_grad():
            return self.server.model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)


def answer_like_vllm(self: Completions, request: dict) -> None:
    """vLLM and SGLang: prompt tokens and the generated one, the first without a number."""
    rows = self.logprobs(request["prompt"])
    tokens = request["prompt"] + [int(rows[-1].argmax())]
    values = [None] + [rows[i, token].item() for i, token in enumerate(tokens[1:])]
    top = [None] + [{f"t{i}": v for i, v in enumerate(row.topk(6).values.tolist())} for row in rows]
    if not request.get("echo"):
        tokens, values, top = tokens[-1:], values[-1:], top[-1:]
    logprobs = {"tokens": [f"t{t}" for t in tokens], "token_logprobs": values, "top_logprobs": top}
    self.reply({"choices": [{"index": 0, "text": "", "logprobs": logprobs}]})


def answer_like_llama_cpp(self: Completions, request: dict) -> None:
    """llama.cpp: no echo; the next token's most likely ones with ids."""
    if request.get("echo"):
        self.reply({"error": {"code": 500, "message": "Only no echo is supported"}}, 500)
        return
    values, ids = self.logprobs(request["prompt"])[-1].topk(request["logprobs"])
    listed = [{"id": i, "token": f"t{i}", "logprob": v} for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    self.reply({"choices": [{"text": "", "logprobs": {"content": [listed[0] | {"top_logprobs": listed}]}}]})


def answer_text_echo(self: Completions, request: dict) -> None:
    """echo changes the text only, log-probabilities are of generated tokens (llama.cpp issue 27174)."""
    answer_like_vllm(self, request | {"echo": False})


def answer_without_logprobs(self: Completions, request: dict) -> None:
    self.reply({"choices": [{"index": 0, "text": " a", "logprobs": None}]})


def answer_error(self: Completions, request: dict) -> None:
    self.reply(b"CUDA error: out of memory\nTraceback", 500)


def answer_late(self: Completions, request: dict) -> None:
    self.server.let_go.wait(30)
    self.close_connection = True


def answer_html(self: Completions, request: dict) -> None:
    self.reply(b"<html>a login page</html>")


def answer_chat(self: Completions, request: dict) -> None:
    self.reply({"message": "hello"})


FORMS = {
    "vllm": answer_like_vllm,
    "llama.cpp": answer_like_llama_cpp,
    "text echo": answer_text_echo,
    "no logprobs": answer_without_logprobs,
    "error": answer_error,
    "late": answer_late,
    "html": answer_html,
    "chat": answer_chat,
}


@contextlib.contextmanager
def serving(
    form: str, model: torch.nn.Module | None = None, names: tuple[str, ...] = ("tiny",)
) -> Iterator[ThreadingHTTPServer]:
    """A server on a free port; ``server.url``, and its requests in ``server.requests``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Completions)
    server.form, server.model, server.names = form, model, names
    server.requests, server.let_go = [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.let_go.set()
        server.shutdown()
        server.server_close()
        thread.join()


# -- three cases, three forms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["vllm", "llama.cpp", "text echo"])
@pytest.mark.parametrize(
    ("served", "what"), [("true", "true model"), ("base", "RoPE everywhere"), ("other", "neither")]
)
def test_the_three_cases_are_distinguished(
    models: dict, canary: Canary, form: str, served: str, what: str, monkeypatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(form, models[served]) as server:
        verdict = verify_endpoint(server.url, canary)
    assert verdict.what == what
    assert verdict.count == (189 if form == "vllm" else 120)
    if served != "other":
        distances = (verdict.to_true, verdict.to_rope)
        assert min(distances) < 1e-4 < 0.2 < max(distances)


@pytest.mark.parametrize("form", ["vllm", "llama.cpp"])
def test_bf16_servers_are_distinguished_too(directory: Path, canary: Canary, form: str) -> None:
    for name, what in (("true", "true model"), ("base", "RoPE everywhere")):
        with serving(form, load_causal_lm(directory / name, dtype=torch.bfloat16)) as server:
            verdict = verify_endpoint(server.url, canary)
        assert verdict.what == what
        assert min(verdict.to_true, verdict.to_rope) > 1e-3  # bf16 did matter


def test_the_named_model_is_requested_by_token_ids(models: dict, canary: Canary, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "abc")
    with serving("vllm", models["true"], ("a", "b")) as server:
        assert verify_endpoint(server.url + "/v1/", canary, "b").is_true_model
        assert [path for path, *_ in server.requests] == ["/v1/completions"] * 3
        for tokens, (_, headers, request) in zip(canary.sequences, server.requests, strict=True):
            assert request["prompt"] == tokens
            assert (request["model"], request["echo"], request["logprobs"]) == ("b", True, 5)
            assert headers["Authorization"] == "Bearer abc"


# -- servers that cannot be asked ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("no logprobs", "returns no log-probabilities"),
        ("error", "HTTP 500 CUDA error: out of memory$"),
        ("html", "does not answer with JSON"),
        ("chat", "in a form unlike OpenAI's"),
    ],
)
def test_servers_without_an_answer_are_one_clear_line(canary: Canary, form: str, words: str) -> None:
    with serving(form) as server, pytest.raises(EnvError, match=words) as caught:
        verify_endpoint(server.url, canary)
    assert server.url in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_late_answer_is_not_waited_for(canary: Canary) -> None:
    with serving("late") as server, pytest.raises(EnvError, match=r"gave no answer within 0\.2 s"):
        verify_endpoint(server.url, canary, timeout_sec=0.2)


def test_a_server_that_hangs_up_is_named(canary: Canary) -> None:
    with serving("late") as server, pytest.raises(EnvError, match="no server answers at http"):
        server.let_go.set()
        verify_endpoint(server.url, canary)


def test_several_models_need_a_name(canary: Canary) -> None:
    with (
        serving("vllm", names=("a", "b")) as server,
        pytest.raises(ConfigError, match=r"serves a, b; .*--served_model"),
    ):
        verify_endpoint(server.url, canary)


def test_an_invalid_url_is_refused(canary: Canary) -> None:
    with pytest.raises(ConfigError, match="--verify_endpoint localhost:8000: give a URL like http"):
        verify_endpoint("localhost:8000", canary)


# -- the script ------------------------------------------------------------------------------------------------------


def test_script_prints_the_verdict_and_exits_by_it(models: dict, directory: Path) -> None:
    def script(url: str, *flags: object) -> tuple[int, str, str]:
        result = run_script(
            "patch_qwen_rope.py", "--verify_endpoint", url, *flags, env=script_environment(OPENAI_API_KEY="")
        )
        return result.returncode, result.stdout, result.stderr

    model = ("--model_name_or_path", directory / "true")
    for name, code, what in (("true", 0, "true model"), ("base", 5, "RoPE everywhere")):
        with serving("vllm", models[name]) as server:
            returned, out, err = script(server.url, *model)
        assert (returned, err) == (code, "")
        assert out.startswith(f"{server.url} runs: {what} (")
    with socket.socket() as free:  # bound, not listening: nothing answers here, and nobody else can take the port
        free.bind(("127.0.0.1", 0))
        returned, out, err = script(f"http://127.0.0.1:{free.getsockname()[1]}", *model)
    assert (returned, out, err.count("\n")) == (4, "", 1)
    assert "no server answers at http://127.0.0.1" in err
    assert script("http://127.0.0.1:1", "--model_name_or_path", directory / "base")[0] == 2  # no canary there
    assert "--model_name_or_path" in script("http://127.0.0.1:1")[2]
    result = run_script("patch_qwen_rope.py", "--served_model_name", "x", "--inspect", directory / "true")
    assert (result.returncode, result.stdout) == (2, "")
    assert "--inspect does not use --served_model_name" in result.stderr
