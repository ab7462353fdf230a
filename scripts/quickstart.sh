#!/usr/bin/env bash
# Trains a small language model on the Python standard library's source, evaluates it and lets it write.
# Usage: bash scripts/quickstart.sh [WORKDIR]     (default: runs/quickstart)
set -euo pipefail
workdir=${1:-$PWD/runs/quickstart}
case $workdir in /*) ;; *) workdir=$PWD/$workdir ;; esac
cd "$(dirname "$0")/.."
source scripts/venv.sh
use_venv quickstart ""

config=configs/lm.py:mixer=gated,size=nano
echo
echo "== train: attnlab train --config $config --workdir $workdir"
attnlab train --config "$config" --workdir "$workdir"
echo
echo "== evaluate: attnlab eval --workdir $workdir"
attnlab eval --workdir "$workdir"
echo
echo "== sample: attnlab generate --workdir $workdir --prompt 'def '"
attnlab generate --workdir "$workdir" --prompt "def " --prompt "class " --tokens 300
cat <<TEXT

== where things are, in $workdir
config.json     the resolved config, versions, what ran
metrics.jsonl   one object per logged step; tensorboard/ holds the same
checkpoints/    the newest ones and the best
samples.txt     continuations of held-out text
log.txt         what was printed

== next
another layer:  attnlab train --config configs/lm.py:mixer=softmax,size=nano --workdir runs/softmax
all layers:     attnlab list
a hybrid:       attnlab train --config configs/lm.py:mixer=gated,pattern=MMMS,size=nano --workdir runs/hybrid
(attnlab is in $PWD/.venv/quickstart/bin)
TEXT
