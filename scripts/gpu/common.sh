# Shared by the scripts of this folder, which run from the repository's root and write to runs/gpu. From the environment:
#   SPECDIFF_GPU_TINY=1       the same at a size that a CPU does in seconds: it proves the plumbing, nothing else
#   SPECDIFF_GPU_MINUTES=7    what a call may work, about a minute of loading not counted; the same call again goes on
#   SPECDIFF_GPU_MODEL=...    another target than smollm2-135m;  SPECDIFF_GPU_ROOT=... another folder than runs/gpu
#   OUT=FOLDER                leave the result there too, in pieces of at most 16 MiB (pieces.py)
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

train() { # RECIPE: a new run gets the number of steps that fits into the minutes
    local steps=$gpu/$1.steps run=("$python" -m specdiff train --target "$model" --data "$gpu/corpus" --out "$gpu/$1" --recipe "$1")
    for change in "${recipe[@]}" "held_out=$held_out"; do run+=(--set "$change"); done
    [[ -s $steps ]] || "${run[@]}" --dry-run --json | "$python" scripts/gpu/steps.py "$minutes" "$steps"
    "${run[@]}" --set "steps=$(<"$steps")" --max-minutes "$minutes"
}

hand_over() { # NAME, bytes of a piece: into $OUT, without what only resuming needs
    [[ -z ${OUT:-} ]] || "$python" scripts/gpu/pieces.py split "$gpu/$1" "$OUT/$1" --bytes "$2" --without checkpoints
}
