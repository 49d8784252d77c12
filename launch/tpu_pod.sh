#!/usr/bin/env bash
# A run on a TPU slice, from the request to the metrics. When the slice is preempted another one is
# asked for, and the run goes on from its last checkpoint. DRY_RUN=1 prints every command and runs
# none.
#   PROJECT=mine ZONE=us-west4-a TPU=opd TYPE=v5litepod-16 SHARE=10.0.0.2:/opd \
#     bash launch/tpu_pod.sh --config=configs/opd.py:paper --workdir=/mnt/share/runs/opd
# RUNTIME, SPOT and KEEP are in launch/README.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/steps.sh
need PROJECT ZONE TPU TYPE SHARE
place=(--project="$PROJECT" --zone="$ZONE")
pretended=  # in a dry run: what the slice's state would be

state() {  # "" if there is no such slice
  step gcloud compute tpus queued-resources describe "$TPU" "${place[@]}" \
    --format='value(state.state)' || true
  [ -z "${DRY_RUN:-}" ] || echo "$pretended"
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
      ACTIVE) return ;;
      "") request ;;
      FAILED | SUSPENDING | SUSPENDED)
        release || true  # one that is going is refused at times
        step sleep "${POLL_S:-60}" ;;
      *) step sleep "${POLL_S:-60}" ;;  # it waits in the queue, or is being made or given back
    esac
  done
}

everywhere() {
  step gcloud compute tpus tpu-vm ssh "$TPU" "${place[@]}" --worker=all --command="$1"
}

install() {  # locks are a host's own: those of a host that was taken away would stay for ever
  step git archive --format=tar.gz --output=/tmp/opd_jax.tar.gz HEAD &&
    step gcloud compute tpus tpu-vm scp /tmp/opd_jax.tar.gz "$TPU:" "${place[@]}" --worker=all &&
    everywhere "sudo apt-get update -q && sudo apt-get install -qy nfs-common python3.11-venv" &&
    everywhere "sudo mkdir -p /mnt/share" &&
    everywhere "mountpoint -q /mnt/share || sudo mount -o nolock $SHARE /mnt/share" &&
    everywhere "sudo chmod 1777 /mnt/share" &&
    everywhere "mkdir -p opd_jax && tar -xzf opd_jax.tar.gz -C opd_jax" &&
    everywhere "EXTRAS=tpu bash opd_jax/launch/env.sh"
}

while :; do
  ensure
  code=0
  { install && everywhere "bash opd_jax/launch/worker.sh ${*@Q}"; } || code=$?
  [ "$code" = 0 ] && break
  step sleep "${POLL_S:-60}"  # a slice that was taken away says so a little later
  [ "$(state)" = ACTIVE ] && break
  echo "the slice was taken away; asking for another" >&2
done
if [ "$code" != 0 ]; then
  echo "error: the run failed, its message is above; the slice $TPU still runs, and costs" >&2
elif [ "${KEEP:-0}" != 1 ]; then
  release
fi
exit "$code"
