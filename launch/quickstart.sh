#!/usr/bin/env bash
# The whole product on a bare machine: install, draw a demo set, cache its latents, train a tiny SDXL, show the results.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment ""

# Two ranks, which a CPU can be shared by and a GPU cannot.
if [ "$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')" = 1 ]; then NPROC="${NPROC:-1}"; fi
export NPROC="${NPROC:-2}"
[ -f runs/demo/data/metadata.json ] || python -m sdxl_trainer.data.demo --out runs/demo/data
[ -f runs/demo/model/vae/config.json ] || python -m sdxl_trainer.train.tiny --out runs/demo/model
bash launch/cache.sh --cfg configs/tiny.yaml
bash launch/train.sh --cfg configs/tiny.yaml "$@"

cat <<'TEXT'

Done. What was made, under runs/tiny/:
  samples/      images of the prompts in configs/tiny.yaml; open the newest step-*.png
  models/       the model as one .safetensors file, for ComfyUI, diffusers and others
  report/       report.html: charts and samples in one page
  logs/         metrics.jsonl, tensorboard/, train.log
  checkpoints/  run the same command again with a larger train.max_steps to go on from the newest

For real SDXL copy one of configs/sdxl_*.yaml and change the four lines marked in it:
  (1) run.name             the name of the run's folder
  (2) model.path           your sd_xl_base_1.0.safetensors, diffusers folder, or stabilityai/stable-diffusion-xl-base-1.0
  (3) data.image_dirs      your folders, with a .txt caption beside each image; or data.metadata
  (4) cache.dir            where the latents go, 0.26 MB an image of 1024 px
Then README.md, "Real SDXL, real images".
TEXT
