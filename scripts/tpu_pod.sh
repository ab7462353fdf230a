#!/usr/bin/env bash
# Runs attnlab on a Cloud TPU slice: asks for it, installs this commit on every worker, starts a run, follows it, stops it.
#
# Usage: bash scripts/tpu_pod.sh ACTION --name NAME --zone ZONE [options] [-- arguments of `attnlab train`]
#
# Actions
#   up       create the queued resource, or reuse the one of that name, and wait until it is active
#   install  copy the committed tree to every worker and install it there
#   train    start `attnlab train ARGUMENTS` on every worker; it goes on when this terminal closes
#   run      up, install, train and follow
#   follow   print the log of the first worker as it grows (Ctrl-C leaves the run alone)
#   status   the resource's state, and the last lines of every worker's log
#   stop     SIGTERM to the run on every worker: it saves a checkpoint and ends
#   down     delete the slice (and what is on its disks)
#
# Options
#   --name NAME          of the queued resource and of its slice
#   --zone ZONE          e.g. us-west4-a
#   --project PROJECT    default: gcloud's own
#   --type TYPE          accelerator type, e.g. v5litepod-16, v5p-128 (64 chips), v6e-256; for up and run
#   --version VERSION    software of the workers; default: by the type
#   --spot               cheaper, and may be taken away at any time
#   --wait MINUTES       how long `up` waits for the slice (default 60)
#   --dry-run            print every command instead of running it
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '/^# Usage/,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "scripts/tpu_pod.sh"; }
fail() { echo "tpu_pod.sh: $*" >&2; exit 2; }

action=${1:-}
case $action in
    -h | --help) usage; exit 0 ;;
    up | install | train | run | follow | status | stop | down) shift ;;
    *) fail "unknown action '${action}'; allowed: up, install, train, run, follow, status, stop, down (--help tells more)" ;;
esac

name="" zone="" project="" type="" version="" wait_minutes=60 spot=false dry_run=false
train_args=()
while [ $# -gt 0 ]; do
    case $1 in
        --name | --zone | --project | --type | --version | --wait)
            [ $# -ge 2 ] || fail "$1 needs a value"
            case $1 in
                --name) name=$2 ;; --zone) zone=$2 ;; --project) project=$2 ;;
                --type) type=$2 ;; --version) version=$2 ;; --wait) wait_minutes=$2 ;;
            esac
            shift 2 ;;
        --spot) spot=true; shift ;;
        --dry-run) dry_run=true; shift ;;
        -h | --help) usage; exit 0 ;;
        --) shift; train_args=("$@"); break ;;
        *) fail "unknown option '$1' (--help tells more)" ;;
    esac
done
[ -n "$name" ] || fail "--name is missing"
[ -n "$zone" ] || fail "--zone is missing"
[[ $wait_minutes =~ ^[0-9]+$ ]] || fail "--wait $wait_minutes is no number of minutes"
case $action in
    train | run) [ ${#train_args[@]} -gt 0 ] || fail "$action needs the arguments of attnlab train after --" ;;
    *) [ ${#train_args[@]} -eq 0 ] || fail "$action takes no arguments after --" ;;
esac

where=(--zone "$zone")
[ -z "$project" ] || where+=(--project "$project")

# Prints a command as it could be typed, and runs it unless this is a dry run.
run() {
    printf '+' >&2
    printf ' %q' "$@" >&2
    printf '\n' >&2
    "$dry_run" || "$@"
}

on_workers() { run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"; }

state() {
    gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>/dev/null || true
}

runtime_version() {
    case $type in
        v4-*) echo tpu-ubuntu2204-base ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v6e-*) echo v2-alpha-tpuv6e ;;
        *) fail "--type '$type' is not known; give its software with --version" ;;
    esac
}

up() {
    [ -n "$type" ] || fail "--type is missing"
    [ -n "$version" ] || version=$(runtime_version)
    local found=""
    "$dry_run" || found=$(state)
    if [ -z "$found" ]; then
        local flags=()
        "$spot" && flags+=(--spot)
        run gcloud compute tpus queued-resources create "$name" --node-id "$name" "${where[@]}" \
            --accelerator-type "$type" --runtime-version "$version" "${flags[@]}"
    else
        echo "reusing $name, which is $found"
    fi
    "$dry_run" && return
    local deadline=$((SECONDS + 60 * wait_minutes)) now
    while true; do
        now=$(state)
        case $now in
            ACTIVE) echo "$name is active"; return ;;
            FAILED | SUSPENDED) fail "$name is $now: delete it with: bash scripts/tpu_pod.sh down --name $name --zone $zone" ;;
        esac
        [ $SECONDS -lt $deadline ] || fail "$name is still '$now' after $wait_minutes minutes; it stays queued: run 'up' again to wait on"
        echo "$name is ${now:-not known yet}; waiting"
        sleep 20
    done
}

install() {
    local archive=/tmp/attnlab-$name.tar.gz
    [ -z "$(git status --porcelain)" ] || echo "note: changes that are not committed are not copied" >&2
    run git archive --format=tar.gz --output "$archive" HEAD
    run gcloud compute tpus tpu-vm scp "$archive" "$name":attnlab.tar.gz "${where[@]}" --worker=all
    on_workers all 'set -e; mkdir -p attnlab; tar -xzf attnlab.tar.gz -C attnlab; cd attnlab
python3 -m venv .venv/tpu; .venv/tpu/bin/pip install --quiet --upgrade pip; .venv/tpu/bin/pip install --quiet -e ".[tpu]"
.venv/tpu/bin/python -c "import attnlab, jax; print(\"installed, jax\", jax.__version__)"'
}

train() {
    local quoted
    quoted=$(printf ' %q' "${train_args[@]}")
    # The same command on every worker: each finds the others. A run that is already there is not started twice.
    on_workers all "cd attnlab; if [ -f train.pid ] && kill -0 \$(cat train.pid) 2>/dev/null; then echo already running; exit 1; fi
nohup .venv/tpu/bin/attnlab train$quoted >train.log 2>&1 </dev/null &
echo \$! >train.pid"
}

case $action in
    up) up ;;
    install) install ;;
    train) train ;;
    run) up; install; train; on_workers 0 'tail -n +1 -F attnlab/train.log' ;;
    follow) on_workers 0 'tail -n 50 -F attnlab/train.log' ;;
    status)
        run gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)'
        on_workers all 'hostname; tail -n 3 attnlab/train.log' ;;
    stop) on_workers all "kill -TERM \$(cat attnlab/train.pid)" ;;
    down) run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet ;;
esac
