"""Finds out over HTTP which model a server runs: the true one, the one with RoPE everywhere, or neither.

Works with completions servers of OpenAI's form, from log-probabilities of fixed token ids (file.py):

- vLLM and SGLang answer ``echo`` with ``logprobs`` with the log-probability of every prompt token (both read in
  their sources, ``serving_completion(s).py``): one request a sequence.
- llama.cpp refuses ``echo`` ("Only no echo is supported"), other servers echo the text alone. Then the most
  likely next tokens after prefixes are requested, one request each. llama.cpp lists them
  under ``logprobs.content``, OpenAI under ``logprobs.top_logprobs``.
  Both are compared by rank, because not all servers name token ids.

Standard library only.
"""

import json
import os
import urllib.error
import urllib.request
from http.client import HTTPException

from flare.errors import ConfigError, EnvError
from flare.nope.canary.file import SERVER, TOP_K, Canary, Verdict

TIMEOUT_SEC = 60.0
"""For one answer: a first request may have to wait for a kernel to be compiled."""


class Refused(Exception):
    """The server answered with an HTTP error status; its first line of text."""


def verify_endpoint(
    url: str, canary: Canary, served_model_name: str | None = None, timeout_sec: float = TIMEOUT_SEC
) -> Verdict:
    """Find out which of a canary's two models a server runs.

    Args:
        url: ``http://host:port`` or ``http://host:port/v1``.
        served_model_name: as the server knows the model; default: the only one of its /v1/models.
        timeout_sec: for each answer.
    Raises: EnvError when it does not answer in time, refuses, or returns no log-probabilities; ConfigError when it
        serves several models and none is named.

    The environment's OPENAI_API_KEY, if any, is sent, as OpenAI's client does.
    """
    server = Server(url, timeout_sec)
    model = served_model_name or server.only_model()
    nll = [server.prompt_nll(model, tokens) for tokens in canary.sequences]
    if all(row is not None for row in nll):
        return canary.classify_nll(nll, SERVER)
    top = [
        [{"logprobs": server.next_logprobs(model, tokens[: position + 1])} for position in canary.top_positions]
        for tokens in canary.sequences
    ]
    return canary.classify_top(top, SERVER)


class Server:
    """A completions server."""

    def __init__(self, url: str, timeout_sec: float) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--verify_endpoint {url}: give a URL like http://localhost:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout_sec = timeout_sec

    def only_model(self) -> str:
        """The name of the one model that is served.

        Raises: ConfigError when there are several or none; EnvError when the server does not say.
        """
        try:
            names = [str(entry["id"]) for entry in self._request_json("/v1/models")["data"]]
        except (Refused, KeyError, TypeError) as error:
            raise EnvError(f"{self.url}/v1/models names no model ({error}); give --served_model_name") from error
        if len(names) != 1:
            found = ", ".join(names) or "no model"
            raise ConfigError(f"{self.url} serves {found}; name one with --served_model_name")
        return names[0]

    def prompt_nll(self, model: str, tokens: list[int]) -> list[float] | None:
        """-log p of every token but the first (nats); None when the server does not score prompts."""
        try:
            logprobs = self._complete(model, tokens, echo=True).get("token_logprobs")
        except Refused:
            return None
        # One more is the generated token; the first has no log-probability.
        if not isinstance(logprobs, list) or len(logprobs) < len(tokens) or not _numbers(logprobs[1 : len(tokens)]):
            return None
        return [-value for value in logprobs[1 : len(tokens)]]

    def next_logprobs(self, model: str, tokens: list[int]) -> list[float]:
        """The highest log-probabilities of the token after a prompt, highest first.

        Raises: EnvError when the server gives none.
        """
        try:
            logprobs = self._complete(model, tokens, echo=False)
        except Refused as error:
            raise EnvError(f"{self.url} refuses a completion with logprobs: {error}") from error
        values = _top_of_first(logprobs)
        if len(values) < TOP_K or not _numbers(values):
            raise EnvError(f"{self.url} returns no log-probabilities ({TOP_K} a token are needed)")
        return sorted(values, reverse=True)[:TOP_K]

    def _complete(self, model: str, tokens: list[int], echo: bool) -> dict:
        """The ``logprobs`` of a completion of one token, {} when there are none.

        Raises: Refused, and EnvError as ``_request_json``.
        """
        request = {"model": model, "prompt": tokens, "max_tokens": 1, "temperature": 0, "logprobs": TOP_K}
        answer = self._request_json("/v1/completions", request | ({"echo": True} if echo else {}))
        try:
            return dict(answer["choices"][0].get("logprobs") or {})
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise EnvError(f"{self.url}/v1/completions answers in a form unlike OpenAI's: {answer!r:.80}") from error

    def _request_json(self, path: str, content: dict | None = None) -> dict:
        """JSON of a GET, or of a POST with content.

        Raises: Refused for an HTTP error; EnvError for no answer, a late answer, or one that is not JSON.
        """
        body = json.dumps(content).encode() if content is not None else None
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_sec) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            text = error.read(2000).decode("utf-8", "replace").strip().splitlines()
            raise Refused(f"HTTP {error.code} {text[0] if text else error.reason}"[:160]) from error
        except TimeoutError as error:
            raise EnvError(self._timeout_message()) from error
        except (OSError, HTTPException) as error:  # urllib.error.URLError is an OSError
            if isinstance(getattr(error, "reason", None), TimeoutError):
                raise EnvError(self._timeout_message()) from error
            raise EnvError(f"no server answers at {self.url}: {getattr(error, 'reason', error)}") from error
        except ValueError as error:
            raise EnvError(f"{self.url}{path} does not answer with JSON") from error

    def _timeout_message(self) -> str:
        return f"{self.url} gave no answer within {self.timeout_sec:g} s"


def _top_of_first(logprobs: dict) -> list[float]:
    """Log-probabilities listed for the first generated token, in llama.cpp's form or OpenAI's."""
    try:
        if logprobs.get("content"):
            return [entry["logprob"] for entry in logprobs["content"][0]["top_logprobs"]]
        return list(logprobs["top_logprobs"][0].values())
    except (KeyError, IndexError, TypeError, AttributeError):
        return []


def _numbers(values: list) -> bool:
    return all(isinstance(value, int | float) for value in values)
