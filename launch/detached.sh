#!/usr/bin/env bash
# Starts launch/worker.sh apart from whoever asks for it, and follows what it prints until it ends,
# with its exit status. Asked again while the run is under way, it follows that one.
#   bash launch/detached.sh --config=... --workdir=...
#   kill -TERM "$(cat worker.pid)"                     stops it: it saves, and ends
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# By its command too: after a reboot its number may be another's.
running() { grep -qs worker.sh "/proc/$(cat worker.pid 2>/dev/null)/cmdline"; }

if ! running; then
  rm -f worker.status
  echo "${*@Q}" > worker.arguments
  STATUS=worker.status setsid nohup bash launch/worker.sh "$@" > worker.log 2>&1 < /dev/null &
  echo "$!" > worker.pid
elif [ "${*@Q}" != "$(cat worker.arguments)" ]; then
  echo "error: another run is under way here: $(cat worker.arguments); wait for it, or stop it:" \
       "kill -TERM $(cat worker.pid)" >&2
  exit 2
fi
tail --lines=+1 --follow --sleep-interval=0.5 --pid="$(cat worker.pid)" worker.log
if [ ! -s worker.status ]; then
  echo "error: the run ended without a word: it was killed" >&2
  exit 137
fi
exit "$(cat worker.status)"
