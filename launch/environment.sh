# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: creates an environment with all dependencies once, and reuses it.

source "$(dirname "${BASH_SOURCE[0]}")/language.sh"

prepare_environment() {  # $1: extras of the package, such as [test]
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { say "Python 3.10 or newer is needed" "需要 Python 3.10 或更高版本" >&2; return 1; }
        [ -x .venv/bin/python ] || python3 -m venv .venv || { say "python3 -m venv failed: install your system's python3-venv" "python3 -m venv 失败：请安装系统的 python3-venv" >&2; return 1; }
        source .venv/bin/activate
    fi
    local stamp="$VIRTUAL_ENV/.sdxl-trainer-installed"
    local wanted; wanted="$PWD $1 $(cat setup.py pyproject.toml constraints.txt | cksum)"
    if [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ]; then return 0; fi
    say "installing into $VIRTUAL_ENV (once; a few minutes)" "正在安装到 $VIRTUAL_ENV（仅一次；需要几分钟）"
    local pins; pins="$(mktemp)"
    if python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        cp constraints.txt "$pins"
    else
        grep '^torch==' constraints.txt > "$pins"  # the other pins need Python 3.11
    fi
    if python -c 'import torch' 2>/dev/null; then
        sed -i '/^torch==/d' "$pins"  # keep the machine's own torch
    else
        # First and alone, so that a machine without GPU gets the CPU build where the index offers one.
        python -m pip install --quiet "$(grep '^torch==' constraints.txt)"
    fi
    python -m pip install --quiet --constraint "$pins" --editable ".$1"
    rm -f "$pins"
    echo "$wanted" > "$stamp"
}
