#!/usr/bin/env bash
# The CUDA backend on a machine that has a GPU but no Rust: right results, no stray accesses, times beside
# PyTorch's, of kernels and of whole runs; all in one Markdown record.
#
#     bash benches/gpu.sh build                  # where Rust is: programs and commit into target/gpu
#     bash benches/gpu.sh run [OUT [STEP...]]    # on the GPU machine, in this repository with that target/gpu: OUT/record.md
#
# STEP is a step's name or one of the groups tests, kernels, sanitizers and layers, each of which ends within 9 minutes;
# all of them if left out. A later run with the same OUT adds to its record. A step that fails or takes too long is
# recorded and the others go on.
#
# `run` needs an NVIDIA driver and NVRTC. compute-sanitizer is used where it is, and so is a Python (GRADLENS_PYTHON,
# else python3) with PyTorch and, for whole runs, transformers. With REHEARSAL=1 whole runs are of tiny models, their
# peer on the CPU: for trying out these steps on the stand-in driver.
set -euo pipefail
cd "$(dirname "$0")/.."
home=target/gpu

# Steps of `run` in order: group, name, most seconds, command. $out is the record's folder. A command that cannot
# run here prints `skipped: ` and why.
kernel_tests="linear::linear_matches_float64 linear::linear_of_any_width linear_fused::epilogues_match_float64
    linear_fused::epilogues_of_float32_match_float64 norm::forward norm::backward stats::moments
    stats::many_samples elementwise::gate rope::rotation loss::finish attention::buffers_may_be_views"
# Kernels as an engine launches them, in float32 and in bfloat16.
model_tests="engine::loss_reductions engine::models_give_the_same_bytes_under_all_schedules"
steps=(
    # Tests that plant faults, or emulate other devices, need a C++ compiler or the stand-in driver, and no GPU.
    "tests parity    240 tests --skip faults:: --skip static_checks:: --skip architectures:: --skip program:: --skip engine:: --skip ops::"
    "tests models    150 tests engine:: ops::"
    "tests wrappers   30 record_wrappers"
    "tests demo       60 demo"
    "kernels kernels 150 $home/gpu_bench >\$out/kernels.jsonl; wc -l <\$out/kernels.jsonl | sed 's/^ */lines: /'"
    "kernels peers   200 \$python benches/peers/gpu_table.py \$out/kernels.jsonl --save_peers \$out/peers.jsonl >\$out/kernels.md"
    "sanitizers memcheck         120 sanitizer memcheck tests $(echo $kernel_tests)"
    "sanitizers memcheck_models  140 sanitizer memcheck tests $model_tests"
    "sanitizers racecheck        120 sanitizer racecheck tests $(echo $kernel_tests)"
    "sanitizers racecheck_models 140 sanitizer racecheck tests $model_tests"
    "layers qwen2.5-0.5b 210 layers qwen2.5-0.5b 170 --tokens 262144"
    "layers llama-3-8b   320 layers llama-3-8b 265 --tokens 65536"
)

# What of a step's log goes into the record, beside counts of tests.
summary='^skipped: .*|(ERROR|RACECHECK) SUMMARY: .*|^lines: .*|^recorded: .*|^largest relative L2: .*|^measured: .*|^error: .*|^[A-Za-z]*Error: .*'

build() {
    mkdir -p "$home"
    cp "$(program test --release --test cuda)" "$home/cuda_tests"
    cp "$(program bench --bench gpu)" "$home/gpu_bench" # benches are always built in release
    cp "$(program build --release --bin gradlens)" "$home/gradlens"
    strip "$home"/{cuda_tests,gpu_bench,gradlens}
    {
        git describe --always --abbrev=40 --dirty
        rustc --version
    } >"$home/commit"
    du -h "$home"/*
}

# Builds one program by `cargo` with these arguments, the last of which is its name, and prints where it is.
program() {
    local no_run=(--no-run)
    [[ $1 != build ]] || no_run=()
    cargo "$@" "${no_run[@]}" --message-format json-render-diagnostics | python3 -c '
import json, sys
built = [json.loads(line) for line in sys.stdin]
print(*[b["executable"] for b in built if b.get("executable") and b["target"]["name"] == sys.argv[1]])' "${@: -1}"
}

# The prebuilt tests, those that are named or all.
tests() {
    $under "$home/cuda_tests" --test-threads 1 "$@"
}

# A command under compute-sanitizer's tool $1.
sanitizer() {
    command -v compute-sanitizer >/dev/null || { echo "skipped: there is no compute-sanitizer"; return; }
    under="compute-sanitizer --tool $1 --error-exitcode 9 --print-limit 20" "${@:2}"
}

# What the hardware gives for each wrapper of an instruction, as later tests without a GPU want it, into the folder
# where they look for it.
record_wrappers() {
    local files=tests/cuda/wrappers
    rm -rf "$out/$files"
    mkdir -p "$out/$files"
    [[ -z ${REHEARSAL-} ]] || { echo "skipped: only hardware is recorded"; return; }
    CARGO_MANIFEST_DIR=$out GRADLENS_TEST_RECORD=1 tests wrappers::of_
    echo "recorded: $(find "$out/$files" -name '*.bin.gz' | wc -l)"
}

# The model inside the program, on the device and on the CPU.
demo() {
    local runs=$scratch/demo samples=64
    [[ -z ${REHEARSAL-} ]] || samples=2
    "$home/gradlens" demo --quiet --num_samples $samples --output_dir "$runs/cpu" --device cpu
    "$home/gradlens" demo --quiet --num_samples $samples --output_dir "$runs/float32" --device cuda --dtype float32
    "$home/gradlens" demo --quiet --num_samples $samples --output_dir "$runs/bfloat16" --device cuda
    $python benches/peers/gpu_layers.py compare "$runs/float32" "$runs/cpu" --bound 1e-5
    $python benches/peers/gpu_layers.py compare "$runs/bfloat16" "$runs/cpu" --bound 2e-2
}

# Whole runs at the shape $1, with no turn begun after $2 seconds.
layers() {
    local shape=$1 rehearsal=()
    # qwen2.5-0.5b becomes tiny-qwen.
    [[ -z ${REHEARSAL-} ]] || rehearsal=(--shape "tiny-${shape%%[-0-9]*}" --tokens 1024 --batch_tokens 256,512 --scripts_samples 4
        --rounds 1 --device cpu --gradlens_device cuda)
    $python benches/peers/gpu_layers.py measure --gradlens "$home/gradlens" --shape "$shape" --seconds "$2" --work "$scratch/$shape" \
        --save "$out/$shape.json" "${@:3}" "${rehearsal[@]}"
}

# Passed and failed tests of a log by module, and the names of those that failed or did not end.
counts() {
    awk '/^test [^ ]+ .*\.\.\./ {
            split($2, path, "::")
            module = path[1]
            if (!all[module]++) modules[++n] = module
            if ($NF == "ok") { passed[module]++; ok++ } else bad = bad " " $2
            total++
        }
        END {
            if (!total) exit
            printf "%d of %d tests passed (", ok, total
            for (i = 1; i <= n; i++) printf "%s%s %d/%d", (i > 1 ? ", " : ""), modules[i], passed[modules[i]], all[modules[i]]
            print ")"
            if (bad) print "not passed:" bad
        }' "$1"
}

# The machine, as far as it can be told.
machine() {
    echo "| | |"
    echo "|---|---|"
    echo "| date | $(date -u '+%Y-%m-%d %H:%M') UTC |"
    echo "| commit | $(paste -sd ' ' "$home/commit" 2>/dev/null || echo –) |"
    nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm --format=csv,noheader 2>/dev/null |
        sed 's/^/| GPU, driver, memory, power limit, most clock | /; s/$/ |/' || true
    "$home/gradlens" doctor 2>/dev/null | sed -n 's/ from .*//; s/^NVRTC  */| NVRTC | /p' | sed 's/$/ |/' || true
    echo "| system | $(uname -sr), $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1) |"
}

# Runs one step, and keeps its line of the record.
step() {
    local name=$1 limit=$2 command=$3 start=$SECONDS status=0 verdict
    rm -f "$out/$name".{log,json,row}
    # In a group of its own, which `timeout` ends as a whole.
    timeout -k 5 "$limit" bash -c "set -e; $command" >"$out/$name.log" 2>&1 || status=$?
    case $status in
        0) if grep -q '^skipped: ' "$out/$name.log"; then verdict=skipped; else verdict=passed; fi ;;
        124 | 137) verdict="**not finished in $limit s**" ;;
        *) verdict="**failed** ($status)" ;;
    esac
    printf '| %s | %s | %d | %s |\n' "$name" "$verdict" $((SECONDS - start)) \
        "$({ counts "$out/$name.log"; grep -ohE "$summary" "$out/$name.log" | tail -n 4; } | tr '|' '/' | sed '$!s/$/; /' | tr -d '\n')" |
        tee "$out/$name.row"
    return "$status"
}

run() {
    export out=${1:-target/gpu-record} home under="" python=${GRADLENS_PYTHON:-python3}
    export GRADLENS_TEST_GPU=1 GRADLENS_REQUIRE_CUDA=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
    export -f tests sanitizer record_wrappers demo layers
    local wanted=("${@:2}") failed=0 entry group name limit command records=()
    mkdir -p "$out"
    # Tests look here for their files, wherever they were built.
    export CARGO_MANIFEST_DIR=$PWD
    # Checkpoints of many GB are not part of the record. Kernels are compiled once for all steps.
    scratch=$(mktemp -d)
    export scratch GRADLENS_CACHE=$scratch/cache
    trap 'rm -rf "$scratch"' EXIT
    for entry in "${steps[@]}"; do
        read -r group name limit command <<<"$entry"
        [[ ${#wanted[@]} == 0 || " ${wanted[*]} " == *" $group "* || " ${wanted[*]} " == *" $name "* ]] || continue
        step "$name" "$limit" "$command" || failed=1
        # The next one needs the room.
        [[ $group != layers ]] || rm -rf "${scratch:?}/$name"
    done
    {
        printf '# The CUDA backend, measured\n\n'
        machine
        printf '\n## Steps\n\n| step | result | s | says |\n|---|---|---|---|\n'
        for entry in "${steps[@]}"; do
            read -r group name limit command <<<"$entry"
            [[ ! -e $out/$name.row ]] || cat "$out/$name.row"
            [[ $group != layers || ! -e $out/$name.json ]] || records+=("$out/$name.json")
        done
        echo
        [[ ${#records[@]} == 0 ]] || $python benches/peers/gpu_layers.py table "${records[@]}" || echo "The table of whole runs failed."
        echo
        cat "$out/kernels.md" 2>/dev/null || true
    } >"$out/record.md"
    echo "$out/record.md, after $SECONDS s"
    return "$failed"
}

case ${1-} in
    build) build ;;
    run) run "${@:2}" ;;
    *) sed -n '2,15s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
