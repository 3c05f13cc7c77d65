#!/usr/bin/env bash
# Run the tests: ./run_tests.sh [--slow] [any argument of pytest]
set -euo pipefail
. "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/env.sh"
flare_python "$FLARE_HOME/requirements-dev.txt"
cd "$FLARE_HOME"
exec "$PYTHON" -m pytest "$@"
