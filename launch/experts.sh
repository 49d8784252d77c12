#!/usr/bin/env bash
# The base model and the experts that configs/exopd_multi_teacher.py merges (configs/domains.py).
#   bash launch/experts.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
train="$PWD/.venv/bin/python -m opd_jax.main"
$train --config=configs/domains.py:base --workdir=runs/base
for task in sort count keep; do
  $train --config="configs/domains.py:$task" --workdir="runs/expert_$task"
done
