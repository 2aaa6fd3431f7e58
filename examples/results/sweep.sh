#!/usr/bin/env bash
# What moves the core's part of the result: one setting at a time, on the volumes and the pretrained
# UNETR of seed 0 of a recorded run. Usage:
# examples/results/sweep.sh runs/recorded/seed0/target/dataset.json runs/pretrained/NAME.safetensors runs/sweep
set -euo pipefail
data=$1 pretrained=$2 to=$3
while read -r name options; do
  # shellcheck disable=SC2086 # options are several words
  .venv/bin/python examples/unetr_segmentation.py --output "$to/$name" --methods tcurlora core \
    --data "$data" --pretrained "$pretrained" --spacing 2 2 4 --img-size 96 96 16 --num-heads 6 \
    $options 2>/dev/null |
    awk -v name="$name" '/^decoder-only|^tCURLoRA|^core/ { print name ":", $0 }'
done <<'SETTINGS'
defaults
core-lr-3e-4 --core-lr 3e-4
core-lr-1e-3 --core-lr 1e-3
core-lr-3e-3 --core-lr 3e-3
core-lr-3e-2 --core-lr 3e-2
core-lr-1e-1 --core-lr 1e-1
rank-2 --rank 2
rank-32 --rank 32
alpha-4 --alpha 4
uniform --selection uniform
decoder-lr-1e-3 --decoder-lr 1e-3 --methods decoder tcurlora core
steps-360 --steps 360 --methods decoder tcurlora core
SETTINGS
