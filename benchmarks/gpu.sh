#!/usr/bin/env bash
# Everything that a card is needed for, most important first, in at most nine minutes.
#
#   bash benchmarks/gpu.sh              on a machine with an NVIDIA GPU
#   bash benchmarks/gpu.sh --dry-run    on any other: compiles for sm_90 what would be timed, walks through every step
#
# Results go to $OUT, or benchmarks/results; every step leaves what it has even if it is cut off. Needs PyTorch, Triton,
# transformers and pytest (with xdist and hypothesis); uses the python of $PYTHON, or python3.
set -uo pipefail
cd "$(dirname "$0")/.."

DRY=0
[ "${1:-}" = "--dry-run" ] && DRY=1 && shift
[ $# -eq 0 ] || { echo "usage: bash benchmarks/gpu.sh [--dry-run]" >&2; exit 2; }
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-530}
mkdir -p "$OUT/logs"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
STATUS=$OUT/status.txt
: > "$STATUS"
failed=0

# step NAME LIMIT COMMAND...: run a command for at most LIMIT seconds, and no longer than is left
step() {
    local name=$1 limit=$2 left=$((SECONDS_IN_ALL - SECONDS)) begin=$SECONDS code=0
    shift 2
    if [ "$left" -lt 10 ]; then
        echo "$name: no time left" | tee -a "$STATUS"
        failed=1
        return
    fi
    [ "$limit" -gt "$left" ] && limit=$left
    echo "== $name (at most $limit s): $*"
    timeout --kill-after=5 "$limit" "$@" > >(tee "$OUT/logs/$name.txt") 2>&1 || code=$?
    [ "$code" -ne 0 ] && failed=1
    [ "$code" -eq 124 ] && code="cut off at $limit s"
    echo "$name: exit $code after $((SECONDS - begin)) s" | tee -a "$STATUS"
}

bench() { step "$1" "$2" "$PYTHON" -m benchmarks.run --out "$OUT" "${@:3}"; }

if [ "$DRY" = 1 ]; then
    SECONDS_IN_ALL=${DRY_SECONDS:-1200}
    # a tile table that is tuned elsewhere must not decide what is compiled here
    unset TRITON_INTERPRET CUMO_TUNED_TILES
    step about 60 "$PYTHON" -c 'import torch, triton, transformers; print(torch.__version__, triton.__version__, transformers.__version__)'
    step compile 900 "$PYTHON" -m benchmarks.compile --arch sm_90
    step tests 120 "$PYTHON" -m pytest -q --collect-only tests/cumo_kernels
    bench layer 120 --device cpu --quick --op layer --shape "mixtral, 1 token"
    step tune 120 "$PYTHON" -m cumo_kernels.tune --dry-run --budget 3 --layers "connector, 4 images"
    step end-to-end 180 "$PYTHON" -m benchmarks.end_to_end --size tiny --device cpu --budget 0 --cases vision generate --out "$OUT"
    step profile 60 "$PYTHON" -m benchmarks.profile --device cpu
else
    step about 30 bash -c "nvidia-smi; $PYTHON -c 'import torch, triton, transformers; print(torch.__version__, triton.__version__, transformers.__version__)'"
    step tests 150 "$PYTHON" -m pytest -q -n 8 -m "not slow" tests/cumo_kernels tests/nn -p no:cacheprovider
    bench clip 60 --op layer --shape "both scales, 4 images" --budget 0.3
    bench mixtral 60 --op layer --shape "mixtral, 4096" --budget 0.3
    bench connector 30 --op layer --shape "connector, 4" --budget 0.3
    step profile 30 "$PYTHON" -m benchmarks.profile
    step tune 120 "$PYTHON" -m cumo_kernels.tune --budget 30 --out "$OUT/tuned_tiles.json" \
        --layers "CLIP-MoE, both scales, 4 images" "connector, 4 images" "Mixtral, 4096 tokens"
    export CUMO_TUNED_TILES=$OUT/tuned_tiles.json
    [ -s "$CUMO_TUNED_TILES" ] || unset CUMO_TUNED_TILES
    for shape in "both scales, 4 images" "mixtral, 4096" "connector, 4"; do
        step "tuned-${shape//[^a-z0-9]/-}" 30 "$PYTHON" -m benchmarks.run --out "$OUT/tuned" --op layer \
            --baseline bmm_bound grouped_mm --shape "$shape" --budget 0.3
    done
    step end-to-end 90 "$PYTHON" -m benchmarks.end_to_end --size vit-l --images 4 --cases vision vision-train --budget 1 --out "$OUT"
    bench parts 60 --op routing permute combine grouped_gemm --shape "both scales, 4 images" --budget 0.2
    bench decode 60 --op layer --shape "mixtral, 8 t" --budget 0.2
    step end-to-end-7b 120 "$PYTHON" -m benchmarks.end_to_end --size 7b --cases train generate --budget 1 --out "$OUT"
    bench everything 300 --budget 0.1
fi

echo
cat "$STATUS"
echo "results: $OUT"
exit "$failed"
