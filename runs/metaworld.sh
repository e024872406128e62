#!/usr/bin/env bash
# From nothing to the weights of checkpoints/metaworld-tiny, and their figures.
#
#     bash runs/metaworld.sh outputs/metaworld-run
#
# Needs `pip install -e '.[examples,metaworld]'` and, without a screen, Debian's libosmesa6. Stopped at any moment, the
# same command goes on: finished steps are left out, an interrupted one continues. The CPU hours are those of two cores
# of AMD EPYCs, some without AVX-512. Other processors and releases round differently, so weights come out similar.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?Name a folder for what is made: bash runs/metaworld.sh outputs/metaworld-run}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"
source runs/steps.sh
common=(--benchmark metaworld --reword_probability 0.3)
again=(--max_shift 3 --sample_every 4 --oversample hard very_hard --batch_by_length --per_device_train_batch_size 64 \
    --gradient_accumulation_steps 2)

# Scripted experts, two of three demonstrations shoved aside on the way: 1,000, with an image at every step. 1.2 hours.
step data meta/info.json collect.py --benchmark metaworld --episodes 20

# The vision tower learns where things are; then the policy. 1.2 and 1 hours.
step vision vision.safetensors pretrain_vision.py --benchmark metaworld --dataset_root "$out/data" --num_scenes 200 \
    --max_steps 6000
train first "${common[@]}" --dataset_root "$out/data" --vision_weights "$out/vision/vision.safetensors" \
    --per_device_train_batch_size 96 --save_steps 500 --max_steps 2150

# More demonstrations, an image at every fourth step; hard tasks twice as often. 0.8 and 2.1 hours.
step data2 meta/info.json collect.py --benchmark metaworld --episodes 30 --draw_every 4
train second "${common[@]}" "${again[@]}" --dataset_root "$out/data2" --init_from "$out/first" --max_steps 900 \
    --warmup_steps 60 --text_learning_rate 6e-4

# The policy plays and the expert takes over; more demonstrations; twice from there, with other orders of the samples.
# 1, 0.5, 0.9 and 1.6 hours.
step corrections meta/info.json collect.py --benchmark metaworld --episodes 5 --draw_every 4 --policy "$out/second"
step data3 meta/info.json collect.py --benchmark metaworld --episodes 50 --draw_every 4
gentle=(--dataset_root "$out/data3" "$out/corrections" --warmup_steps 20 --text_learning_rate 3e-4 \
    --connector_learning_rate 1.2e-4)
train third "${common[@]}" "${again[@]}" "${gentle[@]}" --init_from "$out/second" --max_steps 420 --seed 11 \
    --data_seed 47
train fourth "${common[@]}" "${again[@]}" "${gentle[@]}" --init_from "$out/third" --max_steps 750 --seed 12 \
    --data_seed 48
step policy model.safetensors export_checkpoint.py --checkpoint "$out/fourth"

# The figures: ten episodes of each task that nothing above has played.
step figures metrics.json evaluate.py --benchmark metaworld --checkpoint "$out/policy" --episodes 10 --seed 1040
