# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: creates an environment with all dependencies once, and reuses it.

source "$(dirname "${BASH_SOURCE[0]}")/language.sh"

install() {  # pip's arguments
    local log="$VIRTUAL_ENV/.sdxl-trainer-installed.log"
    # `uv venv` creates environments without pip.
    python -m pip --version >/dev/null 2>&1 || python -m ensurepip >> "$log" 2>&1 || true
    python -m pip install --progress-bar off "$@" 2>&1 | tee -a "$log" | show_progress && return 0
    tail -n 12 "$log" >&2
    say "the installation failed; all of pip's output is in $log" "安装失败；pip 的全部输出在 $log" >&2
    return 1
}

show_progress() {  # prints the larger downloads and the steps of pip's output, with the time since the script's start
    local line name packages
    while IFS= read -r line; do
        case "$line" in
            *Downloading*" MB)"|*Downloading*" GB)")
                name="${line#*Downloading }"
                show_step "downloading ${name##*/}" "正在下载 ${name##*/}" ;;
            "Installing collected packages:"*)
                packages="${line//[^,]/}"
                show_step "installing $((${#packages} + 1)) packages" "正在安装 $((${#packages} + 1)) 个软件包" ;;
        esac
    done
}

show_step() {  # text in English and in Chinese
    printf '  %d:%02d  ' $((SECONDS / 60)) $((SECONDS % 60))
    say "$@"
}

prepare_environment() {  # $1: extras of the package, such as [test]
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { say "Python 3.10 or newer is needed" "需要 Python 3.10 或更高版本" >&2; return 1; }
        [ -x .venv/bin/python ] || python3 -m venv .venv || { say "python3 -m venv failed: install your system's python3-venv" "python3 -m venv 失败：请安装系统的 python3-venv" >&2; return 1; }
        source .venv/bin/activate
    fi
    local stamp="$VIRTUAL_ENV/.sdxl-trainer-installed"
    local wanted; wanted="$PWD $1 $(cat setup.py pyproject.toml constraints.txt | cksum)"
    if [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ]; then return 0; fi
    say "installing into $VIRTUAL_ENV (once; 1 to 10 minutes; pip's output is in $stamp.log)" \
        "正在安装到 $VIRTUAL_ENV（仅一次；1 至 10 分钟；pip 的输出在 $stamp.log）"
    : > "$stamp.log"
    local pins="$stamp.pins"
    if python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        cp constraints.txt "$pins"
    else
        grep '^torch==' constraints.txt > "$pins"  # the other pins need Python 3.11
    fi
    if python -c 'import torch' 2>/dev/null; then
        sed -i '/^torch==/d' "$pins"  # keep the machine's own torch
    else
        # First and alone, so that a machine without GPU gets the CPU build where the index offers one.
        install "$(grep '^torch==' constraints.txt)" || return 1
    fi
    install --constraint "$pins" --editable ".$1" || return 1
    echo "$wanted" > "$stamp"
}
