#!/usr/bin/env bash
# Weak to strong on the tiny models, from nothing to a table of what each method recovers of the
# gap (configs/claims/eve.py). The same command goes on where it was; what rests on something that
# changed is made again. Arguments: the form (once, quick or smoke), and the folder.
#   bash launch/weak_to_strong.sh
#   bash launch/weak_to_strong.sh quick runs/weak_to_strong_quick
set -euo pipefail
form=${1:-once}
workdir=$(realpath -m "${2:-runs/weak_to_strong}")
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec .venv/bin/python -m opd_jax.main --config="configs/claims/eve.py:$form" --workdir="$workdir"
