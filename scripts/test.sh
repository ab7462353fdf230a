#!/usr/bin/env bash
# Runs the tests in a virtual environment of their own: docs/testing.md. Arguments go to pytest: `-m "not slow"` leaves out
# what takes long; `--exhaustive` tries every case, which is for what you change: `--exhaustive tests/kernels_pallas -k flow`.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
use_venv test "[test]"
# A process per core: most of the time goes into tracing and compiling, which use one.
exec python -m pytest --numprocesses=auto --dist=worksteal "$@"
