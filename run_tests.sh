#!/usr/bin/env bash
# Run the tests: ./run_tests.sh [--slow] [--faults] [any argument of pytest]
# Two at a time; FLARE_TEST_PROCESSES=0 runs them in one process, to use a debugger.
set -euo pipefail
. "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/env.sh"
flare_python "$FLARE_HOME/requirements-dev.txt"
cd "$FLARE_HOME"
exec "$PYTHON" -m pytest -n "${FLARE_TEST_PROCESSES:-2}" --dist worksteal "$@"
