#!/usr/bin/env bash
# A run on GKE, by xpk. DRY_RUN=1 prints every command and runs none.
#   PROJECT=mine ZONE=us-west4-a CLUSTER=opd TYPE=v5litepod-16 IMAGE=... bash launch/gke_xpk.sh ...
#     cluster                        once: the cluster, and the share at /mnt/share
#     image                          whenever the code changes
#     run NAME --config=... --workdir=/mnt/share/runs/NAME
# SPOT is in launch/README.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/steps.sh
need PROJECT ZONE CLUSTER TYPE IMAGE
place=(--cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE")
size=(--tpu-type="$TYPE" --num-slices=1)  # a mesh over several would have to know which is where

case ${1:-} in
  cluster)
    kind=--spot
    [ "${SPOT:-1}" = 1 ] || kind=--on-demand
    step xpk cluster create "${place[@]}" "${size[@]}" "$kind" --enable-gcpfilestore-csi-driver
    step xpk storage create opd-share "${place[@]}" --type=gcpfilestore --vol=opd --size=1024 \
      --tier=BASIC_HDD --access-mode=ReadWriteMany --mount-point=/mnt/share --readonly=false \
      --auto-mount=true
    ;;
  image)
    step docker build --file=launch/docker/Dockerfile --build-arg=EXTRAS=tpu --tag="$IMAGE" .
    step docker push "$IMAGE"
    ;;
  run)
    name=${2:?"a name for the run is missing: bash launch/gke_xpk.sh run NAME --config=..."}
    shift 2
    workdir=
    for argument in "$@"; do
      [[ $argument != --workdir=* ]] || workdir=${argument#*=}
    done
    : "${workdir:?"--workdir=/mnt/share/... is missing"}"
    # A restart goes on from the last checkpoint: after a preemption (75), and after the loss of a
    # host, whose lock on the share nobody else takes back. `exec`, so that SIGTERM gets there.
    step xpk workload create "${place[@]}" "${size[@]}" --workload="$name" --docker-image="$IMAGE" \
      --max-restarts=50 --restart-on-exit-codes=1,75 --termination-grace-period-seconds=600 \
      --command="rm -f ${workdir@Q}/lock; exec bash launch/worker.sh ${*@Q}"
    ;;
  *)
    echo "error: the first argument is '${1:-}'; it must be cluster, image or run" >&2
    exit 2
    ;;
esac
