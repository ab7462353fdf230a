#!/usr/bin/env bash
# Compares five attention layers on text and on recall, three seeds each, and writes a page of verdicts.
# The same command goes on where it stopped. Usage: bash scripts/quick_ablation.sh [WORKDIR]     (default: runs/quick)
set -euo pipefail
workdir=${1:-$PWD/runs/quick}
case $workdir in /*) ;; *) workdir=$PWD/$workdir ;; esac
cd "$(dirname "$0")/.."
source scripts/venv.sh
use_venv quickstart ""

plan=configs/ablations/quick.py
echo
echo "== attnlab ablate --config $plan --workdir $workdir"
attnlab ablate --config "$plan" --workdir "$workdir"
cat <<TEXT

== next
read            $workdir/report.html
price another:  attnlab ablate --config configs/ablations/core_six.py --workdir runs/six --dry-run
write your own: docs/ablations.md
(attnlab is in $PWD/.venv/quickstart/bin)
TEXT
