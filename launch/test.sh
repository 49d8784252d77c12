#!/usr/bin/env bash
# All tests, on CPU. Arguments go to pytest: bash launch/test.sh tests/losses -k golden
# Files side by side, two processes at a time: bash launch/test.sh -n 2 --dist loadfile
set -euo pipefail
export EXTRAS=test
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export JAX_PLATFORMS=cpu
exec .venv/bin/python -m pytest "$@"
