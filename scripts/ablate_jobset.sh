#!/usr/bin/env bash
# Runs `attnlab ablate` on a GKE cluster as a JobSet: every pod takes its slice of the plan's runs, on the chips of one host.
#
# Usage: bash scripts/ablate_jobset.sh --name NAME --image IMAGE --accelerator A --topology T --slices N --claim C -- ARGUMENTS
#
#   --name NAME          of the JobSet
#   --image IMAGE        container with attnlab and jax[tpu] installed
#   --accelerator A      node label of the chips: tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
#   --topology T         of one host's chips, e.g. 2x2 (v5e, four chips) or 2x2x1 (v5p)
#   --slices N           pods, each with its slice of the runs
#   --claim NAME         PersistentVolumeClaim that all pods write, mounted at /runs: the workdir goes there
#   --restarts N         how often a pod may be restarted (default 20)
#   --spot               only nodes that may be taken away at any time; runs go on where they stopped
#   --dry-run            print the manifest instead of applying it
#   ARGUMENTS            of `attnlab ablate`, e.g. --config configs/ablations/core_six.py --workdir /runs/a
#
# Needs kubectl, a cluster with the JobSet controller and a node pool of the named topology. A pod that is lost is started
# again, and goes on; the one that is last writes the report.
# To stop: kubectl delete jobset NAME (pods get SIGTERM and 120 s). The nodes cost until the node pool is gone: docs/pods.md.
set -euo pipefail

usage() { sed -n '/^# Usage/,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "$0"; }
fail() { echo "ablate_jobset.sh: $*" >&2; exit 2; }

name="" image="" accelerator="" topology="" slices="" claim="" restarts=20 spot=false dry_run=false
ablate_args=()
while [ $# -gt 0 ]; do
    case $1 in
        --name | --image | --accelerator | --topology | --slices | --claim | --restarts)
            [ $# -ge 2 ] || fail "$1 needs a value"
            declare "${1#--}=$2"
            shift 2 ;;
        --spot) spot=true; shift ;;
        --dry-run) dry_run=true; shift ;;
        -h | --help) usage; exit 0 ;;
        --) shift; ablate_args=("$@"); break ;;
        *) fail "unknown option '$1' (--help tells more)" ;;
    esac
done
for key in name image accelerator topology slices claim; do
    [ -n "${!key}" ] || fail "--$key is missing"
done
for key in slices restarts; do
    [[ ${!key} =~ ^[0-9]+$ ]] || fail "--$key ${!key} is no number"
done
[ "$slices" -ge 1 ] || fail "--slices $slices: one or more are needed"
for key in name claim; do
    [[ ${!key} =~ ^[a-z0-9]([a-z0-9-]*[a-z0-9])?$ ]] || fail "--$key ${!key}: only a-z, 0-9 and - are allowed"
done
for key in image accelerator; do
    [[ ${!key} =~ ^[A-Za-z0-9._/:@-]+$ ]] || fail "--$key '${!key}' is none"
done
[[ $topology =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || fail "--topology $topology is none; one is 2x2 or 2x2x1"
[ ${#ablate_args[@]} -gt 0 ] || fail "the arguments of attnlab ablate are missing after --"
case " ${ablate_args[*]} " in
    *" --slice "* | *" --slice="*) fail "--slice is the pods' to say (--slices $slices)" ;;
    *" --workdir gs://"* | *" --workdir=gs://"* | *" --workdir s3://"* | *" --workdir=s3://"*)
        fail "slices of a plan share files, in no bucket; allowed: a directory below /runs" ;;
    *" --workdir "* | *" --workdir="*) ;;
    *) fail "--workdir is missing after --; it goes below /runs" ;;
esac

# A stopped process ends with 143, which Kubernetes takes for a failure: the pod is started again, and goes on. Of runs that
# failed (3) the report tells; a pod that tried them again would find the same.
# shellcheck disable=SC2016  # the pod's shell expands it
entry='trap "kill -TERM \$!" TERM; attnlab ablate "$@" --slice "$JOB_COMPLETION_INDEX/'"$slices"'" & wait $!; code=$?; '
# shellcheck disable=SC2016
entry+='while kill -0 $! 2>/dev/null; do wait $!; code=$?; done; [ $code != 3 ] || code=0; exit $code'
command="[sh, -c, '$entry', ablate"
for argument in "${ablate_args[@]}"; do
    command+=", '${argument//\'/\'\'}'"
done
command+="]"
more=""
if "$spot"; then
    more='
              cloud.google.com/gke-spot: "true"
            tolerations:
            - {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}'
fi

manifest() {
    cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
spec:
  replicatedJobs:
  - name: slice
    replicas: 1
    template:
      spec:
        completionMode: Indexed
        parallelism: $slices
        completions: $slices
        backoffLimit: $restarts
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $accelerator
              cloud.google.com/gke-tpu-topology: $topology$more
            containers:
            - name: ablate
              image: $image
              command: $command
              resources:
                limits:
                  google.com/tpu: $((${topology//x/*}))
              volumeMounts:
              - name: runs
                mountPath: /runs
            volumes:
            - name: runs
              persistentVolumeClaim:
                claimName: $claim
YAML
}

if "$dry_run"; then
    echo "+ kubectl apply -f - <<'YAML'" >&2
    manifest
    echo "YAML" >&2
else
    manifest | kubectl apply -f -
fi
