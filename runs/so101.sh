#!/usr/bin/env bash
# Collect demonstrations, train a policy like checkpoints/so101-tiny, and measure it.
#
#     bash runs/so101.sh outputs/so101-run
#
# Needs the environment of docs/so101.md. After an interruption, run the same command again: finished steps are left out,
# and an interrupted collection or training continues. LOG.md says how the shipped policy was made differently.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?Name a folder for what is made: bash runs/so101.sh outputs/so101-run}
python=${PYTHON:-.venv-so101/bin/python}
mkdir -p "$out"
source runs/steps.sh
common=(--benchmark so101 --freeze_connector True --per_device_train_batch_size 128)

# A scripted expert plays each scene with all three instructions; then the vision tower learns where things are.
step data meta/info.json collect.py --benchmark so101 --scenes 10000
step vision vision.safetensors pretrain_vision.py --benchmark so101 --dataset_root "$out/data" --max_steps 3000

# The policy: the first frame of each demonstration, where the instruction alone decides, and then all frames.
train first "${common[@]}" --dataset_root "$out/data" --vision_weights "$out/vision/vision.safetensors" \
    --sample_every 1000 --max_steps 800 --warmup_steps 100 --save_steps 200
train all "${common[@]}" --dataset_root "$out/data" --init_from "$out/first" --sample_every 8 --max_steps 4000 \
    --warmup_steps 100 --save_steps 250

# The policy plays and the expert takes over; then all of it once more, with another order of the samples.
step corrections meta/info.json collect.py --benchmark so101 --scenes 2000 --policy "$out/all"
train corrected "${common[@]}" --dataset_root "$out/data" "$out/corrections" --init_from "$out/all" --sample_every 8 \
    --max_steps 2000 --warmup_steps 50 --text_learning_rate 6e-4 --save_steps 250 --seed 11 --data_seed 47
step policy model.safetensors export_checkpoint.py --checkpoint "$out/corrected"

# The figures: 200 scenes that nothing above has played, each with all three instructions.
step figures metrics.json evaluate.py --benchmark so101 --checkpoint "$out/policy" --episodes 200 --seed 20000 \
    --num_processes 2
