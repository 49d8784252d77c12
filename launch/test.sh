#!/usr/bin/env bash
# All tests, on CPU. Further arguments go to pytest: bash launch/test.sh -k sampler
set -euo pipefail
export EXTRAS=test
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export JAX_PLATFORMS=cpu
exec .venv/bin/python -m pytest tests "$@"
