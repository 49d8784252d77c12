# Sourced by the other scripts: makes .venv on first use and installs the package into it
# under constraints.txt. Extras to install are in the variable EXTRAS, for example "test".

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

find_python() {
  local name
  for name in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
    if [ -n "$name" ] && command -v "$name" >/dev/null 2>&1 &&
       "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
    then
      command -v "$name"
      return
    fi
  done
  echo "error: no Python 3.11, 3.12 or 3.13 found; install one, or name it: PYTHON=/path/to/python3.12 bash launch/..." >&2
  return 1
}

if [ ! -x .venv/bin/python ]; then
  python=$(find_python) || exit 1
  echo "making .venv with $python"
  "$python" -m venv .venv || {
    echo "error: $python cannot make a virtual environment; on Debian or Ubuntu: apt-get install python3-venv" >&2
    rm -rf .venv
    exit 1
  }
fi

# Install again only when what is asked for has changed.
stamp=$(cat setup.py constraints.txt <(echo "${EXTRAS:-}") | sha256sum | cut -d' ' -f1)
if ! grep -qs "$stamp" .venv/installed; then
  echo "installing opd_jax${EXTRAS:+[$EXTRAS]} into .venv (about a minute, 1.3 GB)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable ".${EXTRAS:+[$EXTRAS]}" || exit 1
  echo "$stamp" >> .venv/installed
fi
