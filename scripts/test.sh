#!/usr/bin/env bash
# Runs the tests in a virtual environment of their own. Arguments go to pytest: `bash scripts/test.sh -m "not slow"`.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
use_venv test "[test]"
# A process per core: most of the time goes into tracing and compiling, which use one.
exec python -m pytest --numprocesses=auto --dist=worksteal "$@"
