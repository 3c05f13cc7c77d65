# Sourced by run_training.sh and run_tests.sh. Sets PYTHON to an interpreter with the packages that Flare needs.
#
# If the user sets PYTHON=/path, that interpreter is used and nothing is installed; missing packages are printed.
# Otherwise the interpreter is in .venv next to this file, made from requirements.txt if it is missing or out of date.

FLARE_HOME=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

flare_fail() { # exit code, message
  local red='' plain=''
  if [ -t 2 ] && [ -z "${NO_COLOR:-}" ] && [ "${TERM:-dumb}" != dumb ]; then red=$'\033[1;31m' plain=$'\033[0m'; fi
  printf '%serror:%s %s\n' "$red" "$plain" "$2" >&2
  exit "$1"
}

# Prints the path of a Python 3.11 to 3.13 on PATH.
flare_find_python() {
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  flare_fail 4 "no Python 3.11 to 3.13 on PATH; install one, or set PYTHON=/path/to/python"
}

# Prints the wheel indexes to try, best first, if the default torch wheel does not fit this machine's driver and GPUs.
# The default wheel needs CUDA 13 and driver 580, but older drivers are common. A build for any CUDA 12 runs on every
# driver for CUDA 12, version 525 or newer. Source: NVIDIA, CUDA Compatibility, minor versions. Only the builds for
# CUDA 12.6 still contain kernels for GPUs before Turing (V100, P100): pytorch/pytorch#172352.
flare_torch_indexes() {
  command -v nvidia-smi >/dev/null 2>&1 || return 0
  local cuda
  cuda=$(timeout 10 nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\)\.\([0-9]*\).*/\1 \2/p' | head -n 1)
  [ -n "$cuda" ] || return 0
  set -- $cuda
  local version=$(($1 * 100 + $2))
  if flare_has_old_gpu; then
    echo "https://download.pytorch.org/whl/cu126"
    return 0
  fi
  [ "$version" -ge 1300 ] && return 0
  [ "$version" -ge 1200 ] ||
    flare_fail 4 "the driver supports only CUDA $1.$2; torch needs CUDA 12 (driver 525 or newer)"
  [ "$version" -ge 1208 ] && echo "https://download.pytorch.org/whl/cu128"
  echo "https://download.pytorch.org/whl/cu126"
}

flare_has_old_gpu() {
  timeout 10 nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
    awk -F. '/^[0-9]+\.[0-9]+/ { if ($1 * 10 + $2 < 75) old = 1 } END { exit !old }'
}

flare_install() { # requirements file
  local base indexes index pip torch
  base=$(flare_find_python) || exit $?
  indexes=$(flare_torch_indexes) || exit $?
  echo "setting up $FLARE_HOME/.venv from $(basename "$1") (only once; takes some minutes)" >&2
  "$base" -m venv "$FLARE_HOME/.venv" ||
    flare_fail 4 "cannot create a virtual environment; on Debian and Ubuntu: apt install python3-venv"
  pip=("$FLARE_HOME/.venv/bin/python" -m pip install --quiet --disable-pip-version-check)
  torch=$(grep '^torch==' "$FLARE_HOME/requirements.txt")
  if [ -n "$indexes" ]; then
    for index in $indexes; do
      "${pip[@]}" --index-url="$index" "$torch" && break
    done
    "$FLARE_HOME/.venv/bin/python" -c 'import torch' 2>/dev/null ||
      flare_fail 4 "no $torch for this driver's CUDA in: $indexes; install a torch that fits and set PYTHON to it"
  fi
  "${pip[@]}" -r "$1" ||
    flare_fail 4 "pip could not install $(basename "$1"); see the lines above"
}

# Sets PYTHON. Argument: the requirements file to satisfy.
flare_python() {
  local requirements=$1 missing stamp wanted
  if [ -n "${PYTHON:-}" ]; then
    missing=$("$PYTHON" - "$FLARE_HOME/requirements.txt" <<'PY'
import re, sys
from importlib import metadata, util

def numbers(version):
    return [int(number) for number in re.findall("[0-9]+", version)[:2]]

lacks = [] if sys.version_info >= (3, 11) else ["python>=3.11"]
for name, least in re.findall("^([a-z]+)[=>]=([0-9.]+)", open(sys.argv[1]).read(), re.M):
    least = "2.11" if name == "torch" else least  # the file pins what the tests ran on
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:  # some builds have no version
        found = least if util.find_spec(name) else None
    if found is None or numbers(found) < numbers(least):
        lacks.append(name if found is None else f"{name}>={least} (has {found})")
print(", ".join(lacks))
PY
) || flare_fail 4 "PYTHON=$PYTHON cannot be run"
    [ -z "$missing" ] || flare_fail 4 "PYTHON=$PYTHON lacks: $missing; install them, or unset PYTHON to use Flare's own .venv"
    return
  fi
  PYTHON=$FLARE_HOME/.venv/bin/python
  stamp=$FLARE_HOME/.venv/.installed-$(basename "$requirements")
  wanted=$(cat "$FLARE_HOME/requirements.txt" "$requirements" | cksum)
  [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
  (
    # If two processes start at once, one sets up and the other waits for it.
    command -v flock >/dev/null 2>&1 && flock 9
    [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && exit 0
    flare_install "$requirements"
    printf '%s\n' "$wanted" >"$stamp"
  ) 9>"$FLARE_HOME/.venv.lock" || exit $?
}
