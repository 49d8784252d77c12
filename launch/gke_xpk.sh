#!/usr/bin/env bash
# A run on GKE, by xpk. DRY_RUN=1 prints every command and runs none.
#   PROJECT=mine ZONE=us-west4-a CLUSTER=opd TYPE=v5litepod-16 IMAGE=... bash launch/gke_xpk.sh ...
#     cluster                        once: the cluster, and the share at /mnt/share
#     image                          whenever the code changes
#     run NAME --config=... --workdir=/mnt/share/runs/NAME
# SLICES and SPOT are in launch/README.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/steps.sh
need PROJECT ZONE CLUSTER TYPE IMAGE
place=(--cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE")
size=(--tpu-type="$TYPE" --num-slices="${SLICES:-1}")

case ${1:-} in
  cluster)
    kind=--spot
    [ "${SPOT:-1}" = 1 ] || kind=--on-demand
    step xpk cluster create "${place[@]}" "${size[@]}" "$kind" --enable-gcpfilestore-csi-driver
    step xpk storage create opd-share "${place[@]}" --type=gcpfilestore --vol=opd --size=1024 \
      --tier=BASIC_HDD --access_mode=ReadWriteMany --mount-point=/mnt/share --readonly=false \
      --auto-mount=true
    ;;
  image)
    step docker build --file=launch/docker/Dockerfile --build-arg=EXTRAS=tpu --tag="$IMAGE" .
    step docker push "$IMAGE"
    ;;
  run)
    name=${2:?"a name for the run is missing: bash launch/gke_xpk.sh run NAME --config=..."}
    shift 2
    # A restart goes on from the last checkpoint.
    step xpk workload create "${place[@]}" "${size[@]}" --workload="$name" --docker-image="$IMAGE" \
      --max-restarts=50 --command="bash launch/worker.sh ${*@Q}"
    ;;
  *)
    echo "error: the first argument is '${1:-}'; it must be cluster, image or run" >&2
    exit 2
    ;;
esac
