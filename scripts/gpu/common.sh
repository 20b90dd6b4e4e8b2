# Shared by the scripts in this folder, which run from the root of the repository and write to
# runs/gpu. Environment variables:
#   SPECDIFF_GPU_TINY=1       a size that takes a CPU seconds: a test of the scripts only
#   SPECDIFF_GPU_MINUTES=7    time limit of a call, loading (about a minute) not included;
#                             repeat the call to resume
#   SPECDIFF_GPU_MODEL=...    target; default smollm2-135m
#   SPECDIFF_GPU_ROOT=...     folder; default runs/gpu
#   OUT=FOLDER                copy the result there, in pieces of at most 16 MiB (pieces.py)
gpu=${SPECDIFF_GPU_ROOT:-runs/gpu} model=${SPECDIFF_GPU_MODEL:-smollm2-135m} minutes=${SPECDIFF_GPU_MINUTES:-7}
python=$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)
export PYTHONPATH="$gpu/site:src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

data=(--tokens 50000000 --rows 2048 --dtype bfloat16) held_out=0.01 measure=(--prompts 64 --timed 8 --tokens 128)
recipe=(blocks=3 draft_vocab=16384 rows=64 warmup=200 log_every=50 save_every=500 eval_every=1000 eval_prompts=32 eval_tokens=64)
if [[ ${SPECDIFF_GPU_TINY:-} ]]; then
    data=(--tokens 1500 --rows 8 --max-tokens 24 --max-model-len 128 --shard-tokens 500)
    held_out=0.1 measure=(--prompts 2 --timed 1 --tokens 8)
    recipe=(blocks=1 draft_vocab=64 context_window=16 rows=2 canvas_tokens=16 warmup=1 eval_every=1000000 eval_prompts=2 eval_tokens=8)
fi

train() { # RECIPE: a new run gets the number of steps that fits the time limit
    local steps=$gpu/$1.steps run=("$python" -m specdiff train --target "$model" --data "$gpu/corpus" --out "$gpu/$1" --recipe "$1")
    for change in "${recipe[@]}" "held_out=$held_out"; do run+=(--set "$change"); done
    [[ -s $steps ]] || "${run[@]}" --dry-run --json | "$python" scripts/gpu/steps.py "$minutes" "$steps"
    "${run[@]}" --set "steps=$(<"$steps")" --max-minutes "$minutes"
}

hand_over() { # NAME, bytes of a piece: copy to $OUT, without checkpoints
    [[ -z ${OUT:-} ]] || "$python" scripts/gpu/pieces.py split "$gpu/$1" "$OUT/$1" --bytes "$2" --without checkpoints
}
