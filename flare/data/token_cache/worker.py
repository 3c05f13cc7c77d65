"""A worker process that tokenises pieces of a corpus: ``python -m flare.data.token_cache.worker FD PARENT``.

It is a new process and not a fork, because a fork of a process with tokenizer threads hangs. It imports no torch, so
it starts in a fraction of a second. It receives tasks from the pipe FD and answers on the same pipe.
"""

import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from flare.child_process import end_with_parent
from flare.data.sources.base import CACHE_DIR_HINT
from flare.data.token_cache.encode import Encoder
from flare.data.token_cache.parts import write_part
from flare.errors import EnvError, FlareError


def main() -> int:
    end_with_parent(signal.SIGKILL, int(sys.argv[2]))
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches all processes of the terminal; the parent ends this one
    pipe = Connection(int(sys.argv[1]))
    try:
        encoder = Encoder.from_message(pipe.recv())
        while True:
            index, piece, directory, limit = pipe.recv()
            work(pipe, index, (piece, encoder, Path(directory), limit))
    except (EOFError, BrokenPipeError):  # no more work
        return 0


def work(pipe: Connection, index: int, task: tuple) -> None:
    """Write a part.

    Sends ("tokens", index, tokens, characters) after each batch, and at the end ("done", index) or ("error", error).
    """
    try:
        write_part(*task, lambda tokens, characters: pipe.send(("tokens", index, tokens, characters)))
    except BrokenPipeError:
        raise
    except FlareError as error:
        pipe.send(("error", error))
    except OSError as error:
        pipe.send(
            ("error", EnvError(f"cannot tokenise into {task[2].parent}: {error.strerror or error}; {CACHE_DIR_HINT}"))
        )
    except Exception as error:  # the parent must report every error of a reader
        pipe.send(("error", FlareError(f"tokenising failed: {type(error).__name__}: {error}")))
    else:
        pipe.send(("done", index))


if __name__ == "__main__":
    sys.exit(main())
