#!/usr/bin/env bash
# Gathers what benchmarks/gpu_day.py needs on a GPU machine without a network:  bash benchmarks/gpu_pack.sh DIR
#
# The machine has Python 3.12 on x86-64 Linux, torch with CUDA, transformers, peft, pyarrow, rich, matplotlib, tensorboard,
# safetensors, jinja2 and fsspec, and need not have a compiler. DIR gets wheels of everything else, in the versions of
# constraints.txt; deepspeed's is built here, without its compiled operators. PYTHON names the interpreter that downloads
# and builds (python3); it has torch. At the end the command is printed that installs the wheels and starts the day, from
# the root of the checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ $# -ne 1 ]; then
    echo "usage: bash benchmarks/gpu_pack.sh DIR" >&2
    exit 2
fi
folder=$1
python=${PYTHON:-python3}
limit_mb=60
packages=(diffusers importlib_metadata zipp lazy-importer filelock # diffusers and what it needs
    hjson einops msgpack ninja psutil py-cpuinfo # deepspeed's
    pydantic pydantic_core annotated-types typing-inspection typing_extensions
    loguru webdataset braceexpand orjson msgspec isal torch-optimi prodigyopt torchao)

find_version() { # NAME: the version that constraints.txt pins
    local line
    line=$(grep -i "^$1==" constraints.txt) || {
        echo "constraints.txt pins no $1" >&2
        return 1
    }
    echo "${line#*==}"
}

requirements=()
for name in "${packages[@]}"; do
    version=$(find_version "$name")
    requirements+=("$name==$version")
done
deepspeed=$(find_version deepspeed)
mkdir -p "$folder"
rm -f "$folder"/*.whl
platforms=()
for platform in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux2010 manylinux1; do
    platforms+=(--platform "${platform}_x86_64")
done
"$python" -m pip download -qq --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --dest "$folder" "${requirements[@]}"
DS_BUILD_OPS=0 "$python" -m pip wheel -qq --no-deps --no-build-isolation --wheel-dir "$folder" "deepspeed==$deepspeed"

size_mb=$(du -sm "$folder" | cut -f1)
echo "$folder: $(find "$folder" -name '*.whl' | wc -l) wheels, $size_mb MB"
if [ "$size_mb" -ge "$limit_mb" ]; then
    echo "more than $limit_mb MB" >&2
    exit 1
fi
cat <<END
On the GPU machine, in the root of the checkout, with the wheels in $folder and OUT a folder for the results:
SITE=\$(mktemp -d) && python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "\$SITE" $folder/*.whl && PYTHONPATH=.types:\$SITE python3 benchmarks/gpu_day.py --out "\$OUT"
END
