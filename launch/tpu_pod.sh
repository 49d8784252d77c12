#!/usr/bin/env bash
# A run on a TPU slice, from the request to the metrics. When the slice is preempted another one is
# asked for, and the run goes on from its last checkpoint. The run is the slice's own: a connection
# that breaks, or this script's end, does not end it. DRY_RUN=1 prints every command and runs none.
#   PROJECT=mine ZONE=us-west4-a TPU=opd TYPE=v5litepod-16 SHARE=10.0.0.2:/opd \
#     bash launch/tpu_pod.sh --config=configs/opd.py:paper --workdir=/mnt/share/runs/opd
# RUNTIME, SPOT, KEEP and POLL_S are in launch/README.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/steps.sh
need PROJECT ZONE TPU TYPE SHARE
place=(--project="$PROJECT" --zone="$ZONE")
pretended=  # in a dry run: what the slice's state would be

wait_a_little() {
  step sleep "${POLL_S:-60}"
}

look() {  # at a kind of resource under the slice's name; "" if there is none
  step gcloud compute tpus "$1" list "${place[@]}" --filter="name ~ '/$TPU\$'" \
    --format="value($2)" || return
  [ -z "${DRY_RUN:-}" ] || echo "$pretended"
}

state() {  # "" if nothing is asked for; of its machines once there are some, of the request before
  local queued node
  while :; do
    if queued=$(look queued-resources state.state); then
      [ "$queued" = ACTIVE ] || { echo "$queued"; return; }
      node=$(look tpu-vm state) && { echo "${node:-GONE}"; return; }
    fi
    echo "gcloud gave no answer; asking again" >&2
    wait_a_little
  done
}

request() {
  local spot=(--spot)
  [ "${SPOT:-1}" = 1 ] || spot=()
  step gcloud compute tpus queued-resources create "$TPU" --node-id="$TPU" "${place[@]}" \
    --accelerator-type="$TYPE" --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}" "${spot[@]}"
  pretended=ACTIVE
}

release() {
  step gcloud compute tpus queued-resources delete "$TPU" "${place[@]}" --force --quiet
}

ensure() {  # a slice that runs; one that was preempted is given back first
  while :; do
    case $(state) in
      READY | ACTIVE) return ;;  # ACTIVE is a dry run's
      "") request ;;
      FAILED)
        step gcloud compute tpus queued-resources describe "$TPU" "${place[@]}" >&2
        echo "error: the request failed, its reason is above; delete it before asking again:" \
             "gcloud compute tpus queued-resources delete $TPU ${place[*]} --force" >&2
        exit 1 ;;
      SUSPENDING | SUSPENDED | PREEMPTED | TERMINATED | GONE)
        release || true  # one that is going is refused at times
        wait_a_little ;;
      *) wait_a_little ;;  # it waits in the queue, or is being made, repaired or given back
    esac
  done
}

everywhere() {
  step gcloud compute tpus tpu-vm ssh "$TPU" "${place[@]}" --worker=all --command="$1"
}

unless_running() {  # a run that is under way keeps the code that it has
  everywhere "grep -qs worker.sh /proc/\$(cat opd_jax/worker.pid 2>/dev/null)/cmdline || { $1; }"
}

install() {  # locks are a host's own: those of a host that was taken away would stay for ever
  step git archive --format=tar.gz --output=/tmp/opd_jax.tar.gz HEAD &&
    step gcloud compute tpus tpu-vm scp /tmp/opd_jax.tar.gz "$TPU:" "${place[@]}" --worker=all &&
    everywhere "sudo apt-get -o DPkg::Lock::Timeout=600 update -q &&
      sudo apt-get -o DPkg::Lock::Timeout=600 install -qy nfs-common python3.11-venv" &&
    everywhere "sudo mkdir -p /mnt/share" &&
    everywhere "mountpoint -q /mnt/share || sudo mount -o nolock $SHARE /mnt/share" &&
    everywhere "sudo chmod 1777 /mnt/share" &&
    unless_running "mkdir -p opd_jax && tar -xzf opd_jax.tar.gz -C opd_jax" &&
    unless_running "EXTRAS=tpu bash opd_jax/launch/env.sh"
}

taken_away() {  # a slice that is going may say so minutes later
  for _ in 1 2 3 4 5; do
    wait_a_little
    [ "$(state)" = READY ] || return 0
  done
  return 1
}

look queued-resources state.state >/dev/null  # what gcloud has against PROJECT or ZONE, it says now
for ((lost = 0; lost < 12; )); do
  ensure
  code=0
  { install && everywhere "bash opd_jax/launch/detached.sh ${*@Q}"; } || code=$?
  case $code in 0 | 2) break ;; esac  # it has ended well, or refuses its arguments
  if taken_away; then
    echo "the slice was taken away; asking for another" >&2
  elif [ "$code" = 255 ]; then  # ssh's own
    lost=$((lost + 1))
    echo "the connection was lost; taking it up again" >&2
  else
    break
  fi
done
if [ "$code" != 0 ]; then
  echo "error: the run failed, or cannot be reached; its message is above. The slice $TPU still" \
       "runs, and costs; this command again follows a run that is under way" >&2
elif [ "${KEEP:-0}" != 1 ]; then
  release
fi
exit "$code"
