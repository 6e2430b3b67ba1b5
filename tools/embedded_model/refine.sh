#!/usr/bin/env bash
# Stage 4 of the embedded model: go on from the weights in the package, with drills of reversed questions.
#
#     tools/embedded_model/refine.sh OUT MINUTES [further arguments of train.py]
#
# On two GPUs both arms at once, on one GPU the first alone. OUT gets per arm a folder, its log, its measures
# (seed 7 to choose by; seeds 0, 2 and 5 to report) and results.tgz and ARM.tar.00, .01 ... of at most 15 MB each.
# DEVICE=cpu tries the path. No step stops another; each has a time limit.
set -u
out=$1 minutes=$2
shift 2
device=${DEVICE:-cuda}
export TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
mkdir -p "$out"
gpus=$(python3 -c "import torch; print(min(2, max(1, torch.cuda.device_count())))") || exit 1
workers=$(($(nproc) / gpus - 2))
[ "$workers" -gt 0 ] || workers=1

train() { # NAME, then arguments of train.py
    local name=$1
    shift
    timeout -k 5 $((${minutes%.*} * 60 + 210)) python3 -m tools.embedded_model.train --device "$device" \
        --init superinfer/embedded --out "$out/$name" --minutes "$minutes" --workers "$workers" --seed 4 --focus 0.4 \
        --warmup 100 --log 100 --eval 0 "$@" >"$out/$name.log" 2>&1
}

measure() { # NAME SPLIT SEED
    timeout -k 5 150 python3 -m tools.embedded_model.evaluate "$out/$1" --device "$device" --count "${COUNT:-500}" \
        --splits "$2" --seed "$3" --out "$out/$1-$2-$3.json" >"$out/$1-$2-$3.txt" 2>&1
}

arm() { # NAME GPU, then arguments of train.py
    local name=$1
    [ "$device" != cuda ] || export CUDA_VISIBLE_DEVICES=$2
    shift 2
    train "$name" "$@"
    local code=$?
    if [ $code != 0 ] && [ "$SECONDS" -lt 90 ]; then # failed at its start: the same without the carry head
        mv "$out/$name.log" "$out/$name-failed.log"
        train "$name" "$@" --carry 0
        code=$?
    fi
    echo "$name: training ended with $code after $SECONDS s"
    for run in heldout/7 heldout/0 unseen/0 heldout/2 heldout/5; do
        measure "$name" "${run%/*}" "${run#*/}" &
    done
    wait
    tar -C "$out" -cf - "$name" | split -b 15000000 -d - "$out/$name.tar."
    echo "$name: measured after $SECONDS s"
    tail -n 3 "$out/$name.log"
    grep -H context_qa "$out/$name"-*.txt
}

arm carry 0 --carry 0.2 --lr 0.012 --lr-embed 0.002 "$@" &
[ "$gpus" -lt 2 ] || arm plain 1 --carry 0 --lr 0.02 --lr-embed 0.003 "$@" &
wait
(cd "$out" && tar -czf results.tgz -- *.log *.txt *.json && cat ./*-heldout-7.txt)
