#!/usr/bin/env bash
# Runs the tests in a virtual environment of their own. Arguments go to pytest: `bash scripts/test.sh -m "not slow"`.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
use_venv test "[test]"
exec python -m pytest "$@"
