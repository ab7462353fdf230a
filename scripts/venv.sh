# shellcheck shell=bash
# Sourced by the other scripts: `use_venv NAME EXTRAS` makes .venv/NAME with attnlab and its extras, or reuses it.

use_venv() {
    local name=$1 extras=$2 python=${PYTHON:-python3}
    local venv=.venv/$name
    if ! "$python" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info < (3, 14))'; then
        echo "attnlab needs Python 3.11 to 3.13; $python is $("$python" --version 2>&1)." \
            "Name another with PYTHON=/path/to/python $0" >&2
        exit 2
    fi
    local stamp
    stamp=$("$python" --version; cksum pyproject.toml; pwd; echo "$extras")
    if [ "$(cat "$venv/stamp" 2>/dev/null)" != "$stamp" ]; then
        echo "installing attnlab$extras into $venv (once)"
        rm -rf "$venv"
        "$python" -m venv "$venv"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".$extras"
        printf '%s\n' "$stamp" >"$venv/stamp"
    fi
    PATH=$PWD/$venv/bin:$PATH
    export PATH
}
