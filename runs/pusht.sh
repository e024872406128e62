#!/usr/bin/env bash
# From PushT's demonstrations to the weights of checkpoints/pusht-tiny, and their figures.
#
#     bash runs/pusht.sh path/to/pusht outputs/pusht-run
#
# path/to/pusht is a download of lerobot/pusht from the Hub. Stopped at any moment, the same command goes on: finished
# steps are left out, an interrupted training continues from its last checkpoint. The CPU hours are those of one core of
# an Intel Xeon with AMX. Other processors and releases round differently, so weights come out similar, not equal.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?Name the folder of the demonstrations: bash runs/pusht.sh path/to/pusht outputs/pusht-run}
out=${2:?Name a folder for what is trained: bash runs/pusht.sh path/to/pusht outputs/pusht-run}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"
source runs/steps.sh
demonstrations=(--preset tiny --dataset_root "$data")

# The vision tower learns where things are, on rendered scenes; then again with the T near its target more often.
# 0.55 and 0.53 hours.
step vision vision.safetensors pretrain_vision.py
step vision2 vision.safetensors pretrain_vision.py --vision_weights "$out/vision/vision.safetensors" \
    --near_target 0.6 --num_scenes 60000 --learning_rate 7e-4 --seed 10

# The policy, on all frames, and then without the last eight of each demonstration, where it learns to stand still.
# 1.3 and 0.13 hours.
train tiny "${demonstrations[@]}" --vision_weights "$out/vision2/vision.safetensors" --reword_probability 0 \
    --drop_n_last_frames 0
train tuned "${demonstrations[@]}" --init_from "$out/tiny" --reword_probability 0 --max_steps 600 --save_steps 600 \
    --warmup_steps 20 --text_learning_rate 3e-4 --connector_learning_rate 1e-4

# Other words for the task, twice, each time averaged with the weights before. 0.7 and 0.2 hours.
train words "${demonstrations[@]}" --init_from "$out/tuned" --max_steps 2000 --save_steps 500 --save_total_limit 5 \
    --warmup_steps 20 --text_learning_rate 3e-4 --connector_learning_rate 1e-4
step mean model.safetensors export_checkpoint.py --checkpoint "$out/words/checkpoint-1500" "$out/tuned"
train words2 "${demonstrations[@]}" --init_from "$out/mean" --max_steps 600 --save_steps 300 --warmup_steps 20 \
    --text_learning_rate 2e-4 --connector_learning_rate 1e-4
step slow model.safetensors export_checkpoint.py --checkpoint "$out/words2" "$out/words/checkpoint-1500"

# Twice the speed: chunks of eight actions, one of every second frame, which span the same time. 0.7 hours.
train fast "${demonstrations[@]}" --init_from "$out/slow" --frame_stride 2 --chunk_size 8 --n_action_steps 7 \
    --max_steps 1500 --save_steps 250 --seed 11 --data_seed 47 --warmup_steps 20 --text_learning_rate 3e-4 \
    --connector_learning_rate 1e-4
step policy model.safetensors export_checkpoint.py --checkpoint "$out/fast"

# The figures: 500 episodes that nothing above has played.
step figures metrics.json evaluate.py --checkpoint "$out/policy" --episodes 500 --seed 20000
