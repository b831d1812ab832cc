#!/usr/bin/env bash
# The CUDA kernels on a machine that has a GPU but no Rust: right results, no stray accesses, times beside
# PyTorch's; all in one Markdown record.
#
#     bash benches/gpu.sh build        # where Rust is: programs and commit into target/gpu
#     bash benches/gpu.sh run [OUT]    # on the GPU machine, in this repository with that target/gpu: OUT/record.md
#
# `run` needs an NVIDIA driver and NVRTC; compute-sanitizer and a Python with PyTorch are used where they are.
# It ends within 9 minutes. A step that fails or takes too long is recorded and the others go on.
set -euo pipefail
cd "$(dirname "$0")/.."
home=target/gpu

# Steps of `run` in order: name, most seconds, command. $out is the record's folder. A command that cannot run
# here prints `skipped: ` and why.
kernel_tests="linear::linear_matches_float64 linear::linear_of_any_width linear_fused::epilogues_match_float64 linear_fused::epilogues_of_float32_match_float64 norm::forward norm::backward stats::moments stats::many_samples"
steps=(
    # Tests that plant faults or read machine code need a C++ compiler and a disassembler, and no GPU.
    "parity   120  $home/cuda_tests --test-threads 1 --skip faults:: --skip static_checks::"
    "kernels  110  $home/gpu_bench >\$out/kernels.jsonl; wc -l <\$out/kernels.jsonl | sed 's/^ */lines: /'"
    "peers    150  python3 benches/peers/gpu_table.py \$out/kernels.jsonl --save_peers \$out/peers.jsonl >\$out/tables.md"
    "memcheck  75  sanitizer memcheck $home/cuda_tests --test-threads 1 $kernel_tests"
    "racecheck 75  sanitizer racecheck $home/cuda_tests --test-threads 1 $kernel_tests"
)
budget=520

# What of a step's log goes into the record.
summary='^skipped: .*|^test result: .*|(ERROR|RACECHECK) SUMMARY: .*|^lines: .*|^error: .*|^[A-Za-z]*Error: .*'

build() {
    mkdir -p "$home"
    cp "$(program test cuda)" "$home/cuda_tests"
    cp "$(program bench gpu)" "$home/gpu_bench"
    strip "$home"/{cuda_tests,gpu_bench}
    {
        git describe --always --abbrev=40 --dirty
        rustc --version
    } >"$home/commit"
    du -h "$home"/*
}

# Builds a test or bench in release, and prints where its program is.
program() {
    local profile=()
    [[ $1 == bench ]] || profile=(--release) # benches are always built so
    cargo "$1" "${profile[@]}" --no-run "--$1" "$2" --message-format json-render-diagnostics | python3 -c '
import json, sys
built = [json.loads(line) for line in sys.stdin]
print(*[b["executable"] for b in built if b.get("executable") and b["target"]["name"] == sys.argv[1]])' "$2"
}

# compute-sanitizer's tool $1 over the rest.
sanitizer() {
    command -v compute-sanitizer >/dev/null || { echo "skipped: there is no compute-sanitizer"; return; }
    compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 20 "${@:2}"
}

# The machine, as far as it can be told.
machine() {
    echo "| | |"
    echo "|---|---|"
    echo "| date | $(date -u '+%Y-%m-%d %H:%M') UTC |"
    echo "| commit | $(paste -sd ' ' "$home/commit" 2>/dev/null || echo –) |"
    nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm --format=csv,noheader 2>/dev/null |
        sed 's/^/| GPU, driver, memory, power limit, most clock | /; s/$/ |/' || true
    echo "| system | $(uname -sr), $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1) |"
}

run() {
    export out=${1:-target/gpu-record} home GRADLENS_TEST_GPU=1 GRADLENS_REQUIRE_CUDA=1 PYTHONUNBUFFERED=1
    export -f sanitizer
    mkdir -p "$out"
    # Kernels are compiled once for all steps.
    export GRADLENS_CACHE=$out/cache
    rm -rf "$out"/{record,tables}.md "$out"/*.{jsonl,log} "$out/cache"
    local failed=0 step name limit command left start status verdict
    printf '## Steps\n\n| step | result | s | says |\n|---|---|---|---|\n' >"$out/steps.md"
    for step in "${steps[@]}"; do
        read -r name limit command <<<"$step"
        left=$((budget - SECONDS)) start=$SECONDS status=0
        ((limit <= left)) || limit=$left
        if ((limit > 0)); then
            # In a group of its own, which `timeout` ends as a whole.
            timeout -k 5 "$limit" bash -c "set -e; $command" >"$out/$name.log" 2>&1 || status=$?
        else
            echo "error: no time left" >"$out/$name.log"
            status=124 limit=0
        fi
        case $status in
            0) if grep -q '^skipped: ' "$out/$name.log"; then verdict=skipped; else verdict=passed; fi ;;
            124 | 137) verdict="**not finished in $limit s**" ;;
            *) verdict="**failed** ($status)" ;;
        esac
        ((status == 0)) || failed=1
        printf '| %s | %s | %d | %s |\n' "$name" "$verdict" $((SECONDS - start)) \
            "$(grep -ohE "$summary" "$out/$name.log" | tail -n 4 | tr '|' '/' | sed '$!s/$/; /' | tr -d '\n')" |
            tee -a "$out/steps.md"
    done
    {
        printf '# CUDA kernels, measured\n\n'
        machine
        echo
        cat "$out/steps.md"
        echo
        cat "$out/tables.md" 2>/dev/null || echo "No kernel was measured."
    } >"$out/record.md"
    rm -rf "$out"/{steps,tables}.md "$out/cache"
    echo "$out/record.md, after $SECONDS s"
    return "$failed"
}

case ${1-} in
    build) build ;;
    run) run "${2-}" ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
