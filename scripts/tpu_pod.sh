#!/usr/bin/env bash
# Runs attnlab on a Cloud TPU slice: asks for it, installs this commit on every worker, starts a run, follows it, stops it.
#
# Usage: bash scripts/tpu_pod.sh ACTION --name NAME --zone ZONE [options] [-- arguments of `attnlab train`]
#
# Actions; each can be repeated
#   up       create the queued resource, or reuse the one of that name, and wait until it is active
#   install  copy the committed tree to every worker and install it there, unless a run is on
#   train    start `attnlab train ARGUMENTS` on every worker, unless a run is on; it goes on when this terminal closes
#   run      up, install, train and follow
#   follow   print the log of the first worker until the run ends, then its exit code (Ctrl-C leaves the run alone)
#   status   the resource's state; of every worker whether the run is on, and the last lines of its log
#   stop     SIGTERM to the run on every worker, and wait until it has saved a checkpoint and ended
#   down     delete the slice, and what is on its disks. THE SLICE COSTS UNTIL THEN, whether anything runs or not
#
# Options
#   --name NAME          of the queued resource and of its slice
#   --zone ZONE          e.g. us-west4-a
#   --project PROJECT    default: gcloud's own
#   --type TYPE          accelerator type, e.g. v5litepod-16, v5p-128 (64 chips), v6e-256; for up and run
#   --version VERSION    software of the workers; default: by the type
#   --spot               cheaper, and may be taken away at any time
#   --wait MINUTES       how long `up` waits for the slice (default 60); a request that is not met by then expires, so
#                        that no slice comes, and costs, when nobody waits for it
#   --down-when-done     `run` and `follow` delete the slice once the run has ended, well or not, if this terminal is
#                        still open then
#   --dry-run            print every command instead of running it
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '/^# Usage/,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "scripts/tpu_pod.sh"; }
note() { echo "tpu_pod.sh: $*" >&2; }
fail() { note "$@"; exit 2; }

action=${1:-}
case $action in
    -h | --help) usage; exit 0 ;;
    up | install | train | run | follow | status | stop | down) shift ;;
    *) fail "unknown action '${action}'; allowed: up, install, train, run, follow, status, stop, down (--help tells more)" ;;
esac

name="" zone="" project="" type="" version="" wait_minutes=60 spot=false down_when_done=false dry_run=false
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
        --down-when-done) down_when_done=true; shift ;;
        --dry-run) dry_run=true; shift ;;
        -h | --help) usage; exit 0 ;;
        --) shift; train_args=("$@"); break ;;
        *) fail "unknown option '$1' (--help tells more)" ;;
    esac
done
[ -n "$name" ] || fail "--name is missing"
[ -n "$zone" ] || fail "--zone is missing"
[[ $wait_minutes =~ ^[1-9][0-9]*$ ]] || fail "--wait $wait_minutes is no number of minutes"
case $action in
    train | run)
        [ ${#train_args[@]} -gt 0 ] || fail "$action needs the arguments of attnlab train after --"
        case " ${train_args[*]} " in
            *" --workdir "* | *" --workdir="*) ;;
            *) fail "--workdir is missing after --; it is gs://... or s3://..., or on a filesystem that all workers share" ;;
        esac ;;
    *) [ ${#train_args[@]} -eq 0 ] || fail "$action takes no arguments after --" ;;
esac
case $action in
    run | follow) ;;
    *) ! "$down_when_done" || fail "--down-when-done is for run and follow" ;;
esac

where=(--zone "$zone")
[ -z "$project" ] || where+=(--project "$project")
meter_stops="bash scripts/tpu_pod.sh down --name $name ${where[*]}"

# Words as they could be typed.
quoted() {
    local word
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./:=@,%+-]+$ ]]; then printf ' %s' "$word"; else printf " '%s'" "${word//\'/\'\\\'\'}"; fi
    done
}

# Prints a command as it could be typed, and runs it unless this is a dry run.
run() {
    echo "+$(quoted "$@")" >&2
    "$dry_run" || "$@"
}

on_workers() { run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"; }

# A field of the queued resource; nothing if there is none of that name.
describe() {
    local out
    if out=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format="value($1)" 2>&1); then
        echo "$out"
    elif [[ $out != *NOT_FOUND* ]]; then
        note "$out"
        return 1
    fi
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
    local found="" found_type
    "$dry_run" || found=$(describe state.state)
    if [ -z "$found" ]; then
        local flags=(--valid-until-duration "${wait_minutes}m")
        "$spot" && flags+=(--spot)
        run gcloud compute tpus queued-resources create "$name" --node-id "$name" "${where[@]}" \
            --accelerator-type "$type" --runtime-version "$version" "${flags[@]}"
    else
        found_type=$(describe 'tpu.nodeSpec[0].node.acceleratorType')
        [ -z "$found_type" ] || [ "$found_type" = "$type" ] || fail "$name is there and is a $found_type, not a $type"
        note "reusing $name, which is $found"
    fi
    "$dry_run" && return
    local deadline=$((SECONDS + 60 * wait_minutes)) now
    while true; do
        now=$(describe state.state) || now="not known: gcloud failed"
        case $now in
            ACTIVE) note "$name is active, and costs until: $meter_stops"; return ;;
            FAILED | SUSPENDED | SUSPENDING)
                note "$name is $now: it was not to be had in time, or was taken away"
                fail "delete what is left of it, then try again: $meter_stops" ;;
        esac
        [ $SECONDS -lt $deadline ] || fail "$name is still '$now' after $wait_minutes minutes; 'up' waits on, 'down' deletes it"
        note "$name is ${now:-not known yet}; waiting"
        sleep "${POLL_SECONDS:-20}"
    done
}

# For the workers: `alive` says whether the run of train.pid is on.
# shellcheck disable=SC2016  # it expands there
alive='alive() { [ -s train.pid ] && grep -qa attnlab "/proc/$(cat train.pid)/cmdline" 2>/dev/null; }'

install() {
    local archive=${TMPDIR:-/tmp}/attnlab-$name.tar.gz commit
    commit=$(git rev-parse HEAD)
    [ -z "$(git status --porcelain)" ] || note "changes that are not committed are not copied"
    run git archive --format=tar.gz --output "$archive" "$commit"
    run gcloud compute tpus tpu-vm scp "$archive" "$name":attnlab.tar.gz "${where[@]}" --worker=all
    on_workers all "set -e; mkdir -p attnlab; cd attnlab; $alive
if alive; then echo \"\$(hostname): a run is on, nothing installed\"; exit 0; fi
rm -rf attnlab configs kernels_pallas; tar -xzf ../attnlab.tar.gz; echo $commit >COMMIT
$(python_on_worker)
.venv/tpu/bin/python -m pip install --quiet -e '.[tpu,gcs,s3]'
.venv/tpu/bin/python -c 'import attnlab, jax; print(\"installed, jax\", jax.__version__)'"
}

# The workers' own Python is often older than attnlab needs; uv brings one.
python_on_worker() {
    cat <<'SH'
fits='import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'
if [ ! -x .venv/tpu/bin/python ]; then
    for python in python3.13 python3.12 python3.11 python3 none; do "$python" -c "$fits" 2>/dev/null && break; done
    if [ "$python" != none ]; then "$python" -m venv .venv/tpu
    else python3 -m pip install --quiet --user uv; python3 -m uv venv --quiet --seed --python 3.12 .venv/tpu; fi
fi
SH
}

train() {
    # Its exit code is kept: `follow` and `status` tell it.
    local command
    command=".venv/tpu/bin/attnlab train$(quoted "${train_args[@]}") & echo \$! >train.pid; wait \$!; echo \$? >train.exit"
    # The same command on every worker: each finds the others.
    on_workers all "cd attnlab || exit 1; $alive
if alive; then echo \"\$(hostname): a run is on, not started again\"; exit 0; fi
rm -f train.pid train.exit train.stop
nohup bash -c$(quoted "$command") >>train.log 2>&1 </dev/null &
for i in \$(seq 50); do [ -s train.pid ] && break; sleep 0.1; done"
}

follow() {
    local code=0
    on_workers 0 "cd attnlab || exit 1
[ -s train.pid ] || { echo 'no run was started here'; exit 1; }
tail -n 50 -F --pid=\"\$(cat train.pid)\" train.log
for i in \$(seq 50); do [ -s train.exit ] && break; sleep 0.1; done
code=\$(cat train.exit) || exit 1
echo \"the run has ended with exit code \$code\"; exit \"\$code\"" || code=$?
    if "$down_when_done"; then
        down
    else
        note "$name costs until: $meter_stops"
    fi
    return "$code"
}

stop() {
    # A second SIGTERM would end the run before it has saved.
    on_workers all "cd attnlab || exit 1; $alive
alive || { echo \"\$(hostname): nothing runs\"; exit 0; }
[ -e train.stop ] || kill -TERM \"\$(cat train.pid)\"; touch train.stop
for i in \$(seq 600); do alive || { echo \"\$(hostname): ended\"; exit 0; }; sleep 1; done
echo \"\$(hostname): still running after 600 s\"; exit 1"
    note "$name costs until: $meter_stops"
}

status() {
    run gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)'
    on_workers all "hostname; cd attnlab || exit 1; $alive
if alive; then echo 'the run is on'; elif [ -s train.exit ]; then echo \"the run has ended with exit code \$(cat train.exit)\"
else echo 'no run is on'; fi; tail -n 3 train.log 2>/dev/null || true"
}

down() {
    local found=any
    "$dry_run" || found=$(describe state.state)
    if [ -z "$found" ]; then
        note "there is no $name"
        return
    fi
    run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

case $action in
    run) up; install; train; follow ;;
    *) "$action" ;;
esac
