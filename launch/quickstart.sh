#!/usr/bin/env bash
# On-policy distillation of a tiny student, five minutes on two CPU cores.
#   bash launch/quickstart.sh [workdir]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec .venv/bin/python -m opd_jax.main --config=configs/quickstart.py --workdir="${1:-runs/quickstart}"
