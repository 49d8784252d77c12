#!/usr/bin/env bash
# Makes the environments of the libraries that decode.py and train.py are compared with, each its
# own because their requirements clash with ours and with each other's:
#
#     bash tests/bench/peers.sh            # both; a few minutes, several GB
#     bash tests/bench/peers.sh tunix      # or trl
#
# They lie in ${TMPDIR:-/tmp}/opd_jax_peers and can be thrown away. What fails is said on stderr, and
# the exit status is then 1; the other one is made all the same.

root=${TMPDIR:-/tmp}/opd_jax_peers

find_python() {
  local name
  for name in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  echo "error: no Python 3.11 or newer found; name one: PYTHON=/path/to/python3.11" >&2
  return 1
}

make_peer() {  # name, packages
  local name=$1
  shift
  local python=$root/$name/bin/python
  if [ "$(cat "$root/$name/installed" 2>/dev/null)" = "$*" ]; then
    echo "$name: there already"
    return
  fi
  "$(find_python)" -m venv --clear "$root/$name" &&
    "$python" -m pip install --quiet --disable-pip-version-check "$@" || {
      echo "error: $name could not be installed; the message is above" >&2
      return 1
    }
  echo "$*" > "$root/$name/installed"
  echo "$name: made"
}

status=0
for peer in ${@:-tunix trl}; do
  case $peer in
    tunix) make_peer tunix google-tunix==0.1.7 ;;
    trl) make_peer trl trl==1.16.0 torch==2.13.0 ;;
    *) echo "error: no peer is called $peer; there are tunix and trl" >&2; false ;;
  esac || status=1
done
exit $status
