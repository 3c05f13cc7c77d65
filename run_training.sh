#!/usr/bin/env bash
# Train one stage on the chosen GPUs, or run the demo. See --help.
set -euo pipefail
. "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/env.sh"

usage() {
  cat <<'TEXT'
usage: ./run_training.sh STAGE GPU [NAME] [IDS] [--FLAG VALUE ...]
       ./run_training.sh demo [--control] [--seed N] [--output_dir DIR]

  STAGE  1 (train only the NoPE layers) or 2 (train all layers)
  GPU    words of a GPU name as nvidia-smi prints it (A800, A40, h200),
         auto (all free GPUs), manual (the GPUs in IDS) or cpu
  NAME   name of the experiment (default: stage<STAGE>_<date>_<time>)
  IDS    nvidia-smi's GPU numbers for manual: "0,1,2,3"
  --FLAG any flag of train_qwen_multi_gpu.py, see its --help

  --dry_run anywhere prints the plan and the command of a stage, and starts
  nothing.

examples:
  ./run_training.sh demo
  ./run_training.sh 1 A800 my_experiment
  ./run_training.sh 1 manual my_experiment "0,1,2,3"
  ./run_training.sh 2 auto my_experiment --max_steps 50
  ./run_training.sh 1 cpu my_experiment --nproc_per_node 2
TEXT
}

# --dry_run may also come before the positional arguments.
words=() dry_run=()
for word in "$@"; do
  if [ "$word" = --dry_run ]; then dry_run=(--dry_run); else words+=("$word"); fi
done
set -- ${words[@]+"${words[@]}"}

case ${1:-} in
  demo)
    shift
    flare_python "$FLARE_HOME/requirements.txt"
    # Run in the user's directory, because --output_dir and PYTHON may be relative. -P: import no modules from there.
    PYTHONPATH=$FLARE_HOME${PYTHONPATH:+:$PYTHONPATH} \
      exec "$PYTHON" -P -m flare.demo "$@" ${dry_run[@]+"${dry_run[@]}"}
    ;;
  1 | 2) ;;
  -h | --help) usage && exit 0 ;;
  "") usage >&2 && exit 2 ;;
  *) flare_fail 2 "unknown stage '$1'; give 1, 2 or demo (see ./run_training.sh --help)" ;;
esac

stage=$1
[ $# -ge 2 ] || flare_fail 2 "no GPU given; name one (A800), or auto, manual or cpu (see ./run_training.sh --help)"
gpu=$2
shift 2
flags=(--stage "$stage")
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
  flags+=(--experiment_name "$1")
  shift
fi
if [ "$gpu" = manual ]; then
  [ $# -gt 0 ] && [ "${1#--}" = "$1" ] || flare_fail 2 'GPU "manual" needs the GPU numbers, for example "0,1,2,3"'
  flags+=(--gpu_ids "$1")
  shift
else
  [ $# -eq 0 ] || [ "${1#-}" != "$1" ] || flare_fail 2 "'$1' is not a flag; GPU numbers are for GPU \"manual\" only"
  flags+=(--gpu_type "$gpu")
fi

flare_python "$FLARE_HOME/requirements.txt"
exec "$PYTHON" "$FLARE_HOME/train_qwen_multi_gpu.py" "${flags[@]}" "$@" ${dry_run[@]+"${dry_run[@]}"}
