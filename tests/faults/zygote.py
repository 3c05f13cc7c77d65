"""Runs of train_qwen_multi_gpu.py without the seconds that imports take: a process that has them forks one per run.

Each run is a real process (environment, directory, streams, session) that receives real signals and is really
killed; only the imported modules are shared. The fault to inject, if any, is installed in it before the script's
main is called. Started by tests/processes.py, which talks to it in lines of JSON.
"""

import importlib
import json
import os
import sys
import traceback

from flare.logs import quiet_torchao
from tests.faults import injections

IMPORTED = (
    "flare.train.worker",
    "flare.launch.launch",
    "flare.plan.plan",
    "flare.plan.table",
    "flare.data.token_cache.build",
    "tensorboard",
)


def main() -> None:
    quiet_torchao()
    for name in ("train_qwen_multi_gpu", *IMPORTED, "torch.utils.tensorboard", "transformers.models.qwen2"):
        importlib.import_module(name)
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = {"returncode": os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])}
        else:
            pid = os.fork()
            if pid == 0:
                become_run(request)
            answer = {"pid": pid}
        print(json.dumps(answer), file=replies, flush=True)


def become_run(request: dict) -> None:
    """In the forked process: be the script. Does not return."""
    code = 1
    try:
        os.setsid()
        for fd, path, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, request["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            (2, request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ):
            os.dup2(os.open(path, flags, 0o644), fd)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["cwd"])
        import train_qwen_multi_gpu
        from flare.errors import run_script

        if request["fault"]:
            getattr(injections, request["fault"][0])(*request["fault"][1:])
        code = run_script(lambda: train_qwen_multi_gpu.main(request["argv"]))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
