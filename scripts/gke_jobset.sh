#!/usr/bin/env bash
# Runs attnlab on TPU slices of a GKE cluster as a JobSet: one pod per host, restarted together when one is lost.
#
# Usage: bash scripts/gke_jobset.sh --name NAME --image IMAGE --accelerator A --topology T --hosts N [options] -- ARGUMENTS
#
#   --name NAME          of the JobSet
#   --image IMAGE        container with attnlab and jax[tpu] installed
#   --accelerator A      node label of the chips: tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
#   --topology T         of one slice, e.g. 4x4 (v5e-16) or 4x4x4 (v5p-128)
#   --hosts N            machines of one slice (v5e 4x4: 4; v5p 4x4x4: 16)
#   --chips N            chips per machine (default 4)
#   --slices N           slices, joined over the data-centre network (default 1)
#   --restarts N         how often all pods may be restarted (default 20)
#   --claim NAME         PersistentVolumeClaim that all pods write, mounted at /runs: the workdir goes there
#   --dry-run            print the manifest instead of applying it
#   ARGUMENTS            of `attnlab train`, e.g. --config configs/lm.py:size=1b --workdir /runs/a
#
# Needs kubectl, a cluster with the JobSet controller (an XPK cluster has it) and a node pool of the named topology.
# The log: kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME --max-log-requests 64
# To stop with a checkpoint: kubectl delete jobset NAME (pods get SIGTERM and 120 s).
set -euo pipefail

usage() { sed -n '/^# Usage/,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "$0"; }
fail() { echo "gke_jobset.sh: $*" >&2; exit 2; }

name="" image="" accelerator="" topology="" hosts="" chips=4 slices=1 restarts=20 claim="" dry_run=false
train_args=()
while [ $# -gt 0 ]; do
    case $1 in
        --name | --image | --accelerator | --topology | --hosts | --chips | --slices | --restarts | --claim)
            [ $# -ge 2 ] || fail "$1 needs a value"
            declare "${1#--}=$2"
            shift 2 ;;
        --dry-run) dry_run=true; shift ;;
        -h | --help) usage; exit 0 ;;
        --) shift; train_args=("$@"); break ;;
        *) fail "unknown option '$1' (--help tells more)" ;;
    esac
done
for key in name image accelerator topology hosts; do
    [ -n "${!key}" ] || fail "--$key is missing"
done
for key in hosts chips slices restarts; do
    [[ ${!key} =~ ^[0-9]+$ ]] || fail "--$key ${!key} is no number"
done
[ ${#train_args[@]} -gt 0 ] || fail "the arguments of attnlab train are missing after --"

command="[attnlab, train"
for argument in "${train_args[@]}"; do
    command+=", '${argument//\'/\'\'}'"
done
command+="]"

manifest() {
    cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
  replicatedJobs:
  - name: slice
    replicas: $slices
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $accelerator
              cloud.google.com/gke-tpu-topology: $topology
            containers:
            - name: train
              image: $image
              command: $command
              ports:
              - containerPort: 8471
              - containerPort: 8080
              resources:
                limits:
                  google.com/tpu: $chips
YAML
    if [ -n "$claim" ]; then
        cat <<YAML
              volumeMounts:
              - name: runs
                mountPath: /runs
            volumes:
            - name: runs
              persistentVolumeClaim:
                claimName: $claim
YAML
    fi
}

if "$dry_run"; then
    echo "+ kubectl apply -f - <<'YAML'" >&2
    manifest
    echo "YAML" >&2
else
    manifest | kubectl apply -f -
fi
