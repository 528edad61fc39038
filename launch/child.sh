# shellcheck shell=bash
# Sourced by the launch scripts: starts a launcher, forwards signals, and returns the program's own exit status.
# It keeps the working directory, because the user's paths are relative to it.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/launch/language.sh"
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f "$ROOT/.venv/bin/activate" ]; then
    source "$ROOT/.venv/bin/activate"
fi
# One thread per library keeps CPU ranks from competing for cores; an explicit setting wins.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Names and texts are UTF-8, whatever the locale is.
export PYTHONUTF8="${PYTHONUTF8:-1}"
# Ranks stop when this process ends, even if it is killed outright (launcher_watch.py). Its number means something only
# in its namespace of processes, until the machine starts anew.
space="$(readlink /proc/self/ns/pid || true) $(cat /proc/sys/kernel/random/boot_id 2>/dev/null || true)"
export SDXL_TRAINER_SCRIPT="${SDXL_TRAINER_SCRIPT:-$$ $space}"

fail() {  # reason in English and in Chinese
    say "$@" >&2
    exit 2
}

answer_first() {  # program, example, its arguments: help and mistakes are answered without ranks and their libraries
    local program="$1" example="$2" script; script="launch/$(basename "$0")"; shift 2
    if [ "$#" = 0 ]; then
        local name="${SDXL_TRAINER_COMMAND:-$(basename "$0")}"
        # Users of the command line may have no checkout.
        [ -z "${SDXL_TRAINER_COMMAND:-}" ] || example="${example/configs\/tiny.yaml/my.yaml}"
        say "$name needs to know what to work on:" "$name 需要知道处理什么：" >&2
        say "  bash $script $example" >&2
        local settings="docs/CONFIG.md" in_chinese="docs/zh/CONFIG.md"
        [ -z "${SDXL_TRAINER_COMMAND:-}" ] || settings="sdxl-trainer settings" in_chinese="sdxl-trainer settings"
        say "All options: bash $script --help; all settings: $settings" \
            "全部选项：bash $script --help；全部配置项：$in_chinese" >&2
        exit 2
    fi
    local word has_settings=""
    for word in "$@"; do
        case "$word" in
            -h|--help) exec python "$program" "$@" ;;
            --cfg|--cfg=*) has_settings=1 ;;
        esac
    done
    case "$has_settings$example" in --cfg*) exec python "$program" "$@" ;; esac  # prints what is missing
}

run_child() {  # command and its arguments
    command -v "$1" >/dev/null || fail \
        "$1 is not installed here: activate the environment, or run bash launch/quickstart.sh" \
        "这里没有安装 $1：请激活环境，或运行 bash launch/quickstart.sh"
    SDXL_TRAINER_STATUS_FILE="$(mktemp)"
    export SDXL_TRAINER_STATUS_FILE
    # In the background, because bash does not forward signals to a foreground child.
    python -m sdxl_trainer.launch.launcher "$@" &
    local child=$! status=0 signal=0
    trap 'signal=15; forward_signal TERM "$child"' TERM
    trap 'signal=2; forward_signal INT "$child"' INT
    trap 'signal=1; forward_signal HUP "$child"' HUP  # has no effect under nohup
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do  # a signal ends `wait`, not the child
        status=0; wait "$child" || status=$?
    done
    # Launchers return 1 for every failure. The first rank of this node recorded the real status, unless it was stopped
    # before it started.
    local recorded; recorded="$(cat "$SDXL_TRAINER_STATUS_FILE")"; rm -f "$SDXL_TRAINER_STATUS_FILE"
    # A rank may receive its launcher's signal before the terminal's; the script's own signal decides.
    if [ "$signal" -ne 0 ] && { [ -z "$recorded" ] || [ "$recorded" -gt 128 ]; }; then recorded=$((128 + signal)); fi
    if [ "$status" -ne 0 ] && [ -n "$recorded" ] && [ "$recorded" -ne 0 ]; then status="$recorded"; fi
    return "$status"
}

forward_signal() {  # signal, process
    kill "-$1" "$2" 2>/dev/null || true
}

count_gpus() {  # GPUs that a rank can use: those of the driver that CUDA_VISIBLE_DEVICES leaves
    local gpus=0 visible=0 device
    if command -v nvidia-smi >/dev/null 2>&1; then gpus="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"; fi
    if [ "$gpus" -eq 0 ] || [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then echo "$gpus"; return; fi
    # CUDA takes indices or the beginnings of UUIDs, and ignores the list from its first invalid entry on.
    for device in ${CUDA_VISIBLE_DEVICES//,/ }; do
        case "$device" in
            GPU-*|MIG-*) ;;
            *[!0-9]*) break ;;
            *) [ "$device" -lt "$gpus" ] || break ;;
        esac
        visible=$((visible + 1))
    done
    echo "$visible"
}

choose_num_ranks() {  # one rank per GPU, or one on the CPU
    local gpus; gpus="$(count_gpus)"
    echo "$(( gpus > 0 ? gpus : 1 ))"
}
