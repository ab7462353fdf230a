#!/usr/bin/env bash
# Runs attnlab on TPU slices of a GKE cluster as a JobSet: one pod per host, restarted together when one is lost.
#
# Usage: bash scripts/gke_jobset.sh --name NAME --image IMAGE --accelerator A --topology T --hosts N [options] -- ARGUMENTS
#
#   --name NAME          of the JobSet
#   --image IMAGE        container with attnlab[gcs] (or [s3]) and jax[tpu] installed
#   --accelerator A      node label of the chips: tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
#   --topology T         of one slice, e.g. 4x4 (v5e-16) or 4x4x4 (v5p-128)
#   --hosts N            machines of one slice (v5e 4x4: 4; v5p 4x4x4: 16)
#   --chips N            chips per machine (default 4)
#   --slices N           slices, joined over the data-centre network (default 1)
#   --restarts N         how often all pods may be restarted (default 20)
#   --claim NAME         PersistentVolumeClaim that all pods write, mounted at /runs, for a workdir that is in no bucket
#   --account NAME       Kubernetes service account of the pods, which may write the bucket (default: the namespace's)
#   --spot               only nodes that may be taken away at any time; the run goes on where it stopped
#   --dry-run            print the manifest instead of applying it
#   ARGUMENTS            of `attnlab train`, e.g. --config configs/lm.py:size=1b --workdir gs://BUCKET/a
#
# Needs kubectl, a cluster with the JobSet controller (an XPK cluster has it) and a node pool of the named topology.
# The log: kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME --max-log-requests 64
# A JobSet that has ended, or is to have other arguments, is deleted before the next one of its name is applied.
# To stop with a checkpoint: kubectl delete jobset NAME (pods get SIGTERM and 120 s). The nodes cost until the node pool is
# gone, or has scaled to none: that is another command, see docs/pods.md.
set -euo pipefail

usage() { sed -n '/^# Usage/,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "$0"; }
fail() { echo "gke_jobset.sh: $*" >&2; exit 2; }

name="" image="" accelerator="" topology="" hosts="" chips=4 slices=1 restarts=20 claim="" account="" spot=false dry_run=false
train_args=()
while [ $# -gt 0 ]; do
    case $1 in
        --name | --image | --accelerator | --topology | --hosts | --chips | --slices | --restarts | --claim | --account)
            [ $# -ge 2 ] || fail "$1 needs a value"
            declare "${1#--}=$2"
            shift 2 ;;
        --spot) spot=true; shift ;;
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
for key in name claim account; do
    [[ ${!key} =~ ^([a-z0-9]([a-z0-9-]*[a-z0-9])?)?$ ]] || fail "--$key ${!key}: only a-z, 0-9 and - are allowed"
done
for key in image accelerator; do
    [[ ${!key} =~ ^[A-Za-z0-9._/:@-]+$ ]] || fail "--$key '${!key}' is none"
done
[[ $topology =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || fail "--topology $topology is none; one is 4x4 or 4x4x4"
[ $((hosts * chips)) = $((${topology//x/*})) ] ||
    fail "--topology $topology has $((${topology//x/*})) chips; --hosts $hosts of --chips $chips have $((hosts * chips))"
[ ${#train_args[@]} -gt 0 ] || fail "the arguments of attnlab train are missing after --"
case " ${train_args[*]} " in
    *" --workdir "* | *" --workdir="*) ;;
    *) fail "--workdir is missing after --; it is gs://... or s3://..., or below /runs (--claim)" ;;
esac
case " ${train_args[*]} " in
    *" --workdir gs://"* | *" --workdir=gs://"* | *" --workdir s3://"* | *" --workdir=s3://"*) ;;
    *) [ -n "$claim" ] || echo "gke_jobset.sh: without --claim, or a workdir in a bucket, the checkpoints go with the pods:" \
        "nothing goes on after a restart" >&2 ;;
esac

# A run that SIGTERM stopped has saved and ends with 0. To Kubernetes that would be the end of it: the pod that got the signal
# ends with 143 instead, so that all are started again, and go on.
# shellcheck disable=SC2016  # the pod's shell expands it
entry='trap "stopped=1; kill -TERM \$!" TERM; attnlab train "$@" & wait $!; code=$?; '
# shellcheck disable=SC2016
entry+='if [ -n "${stopped-}" ]; then wait $!; code=$?; [ $code != 0 ] || code=143; fi; exit $code'
command="[sh, -c, '$entry', train"
for argument in "${train_args[@]}"; do
    command+=", '${argument//\'/\'\'}'"
done
command+="]"

more=""
if "$spot"; then
    more+='
              cloud.google.com/gke-spot: "true"
            tolerations:
            - {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}'
fi
if [ -n "$account" ]; then
    more+="
            serviceAccountName: $account"
fi
if [ "$slices" -gt 1 ]; then # the network between slices, without the pods' own in between
    more+='
            hostNetwork: true
            dnsPolicy: ClusterFirstWithHostNet'
fi

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
              cloud.google.com/gke-tpu-topology: $topology$more
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
