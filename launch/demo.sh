#!/usr/bin/env bash
# The demo in the working directory: draw images of six shapes, cache their latents, and fine-tune a tiny SDXL that was
# pre-trained on four of them. Started by quickstart.sh and by `sdxl-trainer quickstart`, which has no checkout.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/child.sh"
configs="$ROOT/configs"
if [ "$ROOT" = "$PWD" ]; then configs=configs; fi

# Two ranks can share a CPU, but not a GPU.
if [ "$(count_gpus)" = 1 ]; then NPROC="${NPROC:-1}"; fi
export NPROC="${NPROC:-2}"
[ -f runs/demo/shapes/metadata.json ] || python -m sdxl_trainer.data.demo --num-images 144 \
    --shapes heart moon circle square triangle star --out runs/demo/shapes
[ -f runs/demo/pretrained/vae/config.json ] || python -m sdxl_trainer.train.tiny --pretrained --out runs/demo/pretrained
bash "$ROOT/launch/cache.sh" --cfg "$configs/quickstart.yaml"
bash "$ROOT/launch/train.sh" --cfg "$configs/quickstart.yaml" "$@"

say "$(cat <<TEXT

Done. The model had never seen a heart or a moon. See it before and after:
  runs/quickstart/samples/before-after.png

In runs/quickstart/ you also find:
  samples/      images generated every 50 steps: step-*.png, strip.png
  models/       the model as one .safetensors file, for ComfyUI, diffusers, ...
  report/       report.html: charts and generated images on one page
  logs/         metrics.jsonl, tensorboard/, train.log
  checkpoints/  run the same command with a larger train.max_steps to continue
                from the newest one

For full-size SDXL copy a preset and change four lines:
  cp $configs/sdxl_full.yaml my.yaml
  (1) run.name         the name of the run's folder
  (2) model.path       your sd_xl_base_1.0.safetensors, a diffusers folder,
                       or stabilityai/stable-diffusion-xl-base-1.0
  (3) data.image_dirs  your folders, with a .txt caption beside each image;
                       or data.metadata
  (4) cache.dir        the folder of the latents,
                       0.26 MB for an image of 1024 px
Then run:
  bash launch/doctor.sh --cfg my.yaml
  bash launch/cache.sh --cfg my.yaml
  bash launch/train.sh --cfg my.yaml
TEXT
)" "$(cat <<TEXT

完成。模型此前从未见过心形和月牙。训练前后的对比见：
  runs/quickstart/samples/before-after.png

runs/quickstart/ 中还有：
  samples/      每 50 步的样图：step-*.png、strip.png
  models/       单个 .safetensors 文件的模型，供 ComfyUI、diffusers 等使用
  report/       report.html：图表和样图合为一页
  logs/         metrics.jsonl、tensorboard/、train.log
  checkpoints/  以更大的 train.max_steps 再次运行同一条命令，即从最新的检查点继续

要训练真实的 SDXL，请复制一个预设，并修改四行：
  cp $configs/sdxl_full.yaml my.yaml
  (1) run.name         运行文件夹的名称
  (2) model.path       你的 sd_xl_base_1.0.safetensors、diffusers 文件夹，
                       或 stabilityai/stable-diffusion-xl-base-1.0
  (3) data.image_dirs  你的图片文件夹，每张图片旁边有 .txt 标注；或 data.metadata
  (4) cache.dir        存放潜变量的文件夹，1024 px 的图片每张 0.26 MB
然后运行：
  bash launch/doctor.sh --cfg my.yaml
  bash launch/cache.sh --cfg my.yaml
  bash launch/train.sh --cfg my.yaml
TEXT
)"
