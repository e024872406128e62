# What the scripts of this folder share: steps that are left out once they are finished. Sourced, with out and python.

step() { # FOLDER FILE SCRIPT OPTION...: run a script that ends with $out/FOLDER/FILE, unless that is there
    local folder=$out/$1 file=$2 script=$3
    shift 3
    if [ -e "$folder/$file" ]; then
        echo "$folder is finished."
    else
        echo "$folder:"
        "$python" "examples/$script" "$@" --output_dir "$folder"
    fi
}

train() { # FOLDER OPTION...: train a policy, vision tower frozen, without evaluation; training_args.bin is its last file
    local folder=$1 resume=()
    shift
    if [ -n "$(ls -A "$out/$folder" 2>/dev/null)" ]; then
        resume=(--resume_from_checkpoint last)
    fi
    step "$folder" training_args.bin train.py --freeze_vision_tower True \
        --eval_strategy no --load_best_model_at_end False "${resume[@]}" "$@"
}
