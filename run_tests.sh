#!/usr/bin/env bash
# Run the tests: ./run_tests.sh [--fast] [--slow] [--faults] [any argument of pytest]
# Two at a time; FLARE_TEST_PROCESSES=0 runs them in one process, to use a debugger.
# --fast: ruff, and the files whose tests compute in this process and take seconds.
# Under a minute on two cores.
set -euo pipefail
. "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/env.sh"

FAST=(
  test_architecture test_documents test_documented_flags test_examples config/test_config data/test_mixture
  data/test_order data/test_sources
  evaluation/test_plots evaluation/test_report evaluation/test_verdict
  gpus/test_command gpus/test_gpu_ids gpus/test_nvidia_smi gpus/test_selection gpus/test_specs
  gpus/test_visible_devices nope/test_layers plan/test_flops plan/test_model_shape plan/test_plan
  plan/test_saved_activations plan/test_suggest plan/test_table
)

words=() fast=
for word in "$@"; do
  if [ "$word" = --fast ]; then fast=1; else words+=("$word"); fi
done
set -- ${words[@]+"${words[@]}"}

flare_python "$FLARE_HOME/requirements-dev.txt"
cd "$FLARE_HOME"
if [ -n "$fast" ]; then
  "$PYTHON" -m ruff check --quiet --no-cache .
  "$PYTHON" -m ruff format --check --quiet --no-cache . || flare_fail 1 "run: $PYTHON -m ruff format ."
  for name in "${FAST[@]}"; do set -- "$@" "tests/$name.py"; done
fi
exec "$PYTHON" -m pytest -n "${FLARE_TEST_PROCESSES:-2}" --dist worksteal "$@"
