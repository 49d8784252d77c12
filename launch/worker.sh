#!/usr/bin/env bash
# One process of a run of several: `python -m opd_jax.main` with the arguments given.
# Asked to stop by SIGTERM a run saves and ends with 0. Here it then ends with 75, so that whoever
# starts failed jobs again (GKE does) does not take it for finished. The exit status is also written
# to the file STATUS, if there is such a variable.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export OPD_JAX_DISTRIBUTED="${OPD_JAX_DISTRIBUTED-auto}"

stopped='' child=''
trap 'stopped=75; [ -z "$child" ] || kill -TERM "$child"' TERM
.venv/bin/python -u -m opd_jax.main "$@" &
child=$!
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do  # a signal ends `wait`, not the run
  wait "$child"
  code=$?
done
[ "$code" = 0 ] || [ -z "$stopped" ] || echo "stopped; the process ended with $code" >&2
[ -z "${STATUS:-}" ] || echo "${stopped:-$code}" > "$STATUS"
exit "${stopped:-$code}"
