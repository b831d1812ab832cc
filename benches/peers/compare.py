#!/usr/bin/env python3
"""Times gradlens against a peer, taking turns, and prints a Markdown table of medians.

    python compare.py --model_name FOLDER [--gradlens target/release/gradlens] [--rounds 5] [--peer hf_one_pass.py]
    python compare.py --model_name FOLDER --peer sae_one_pass.py --layers 11,23    # `gradlens sae`; make_saes.py first

Each round starts, for values and then gradients, the peer and our program as fresh processes; every other round
the order of the two is turned. Compute only: the peer's own clock after a warm-up repeat, and `overall.compute` of our
timing_stats.json, which has no warm-up. Ratios are time(ours) / time(peer): below 1 we are faster.
"""
import argparse, json, os, platform, shutil, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np

from common import rss_anon_bytes

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent


def run_peer(args, mode, save):
    command = [args.python, str(HERE / args.peer), "--model_name", args.model_name, "--dataset", args.dataset, "--mode", mode,
               "--samples", str(args.samples), "--max_length", str(args.max_length), "--batch_size", str(args.batch_size),
               "--threads", str(args.threads), "--repeat", "1", "--warmup", "1", "--save", str(save), *sae_flags(args), *args.peer_args.split()]
    # Transparent huge pages and no return of freed heap: without them the peer spends its time in page faults.
    env = dict(os.environ, OMP_NUM_THREADS=str(args.threads), TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    if args.peer_malloc == "tuned":
        env.update(GLIBC_TUNABLES="glibc.malloc.hugetlb=1", MALLOC_TRIM_THRESHOLD_="17179869184", MALLOC_MMAP_THRESHOLD_="1073741824")
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"the peer failed ({done.returncode}): {' '.join(command)}")
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def sae_flags(args):
    return ["--sae", args.sae, "--layers", args.layers] if args.sae else []


def run_ours(args, mode, folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    command = [args.gradlens, "sae" if args.sae else "layer", *sae_flags(args), "--model_name", args.model_name, "--dataset", args.dataset, "--num_samples", str(args.samples),
               "--max_length", str(args.max_length), "--min_chars", "0", "--aggregate_by", mode, "--aggregation_mode", "both",
               "--normalize_gradients", "none", "--save_outputs", "--output_dir", str(folder), "--threads", str(args.threads),
               "--dtype", args.dtype, "--device", args.device]
    if mode == "gradients":  # the peer's loss is the mean over its batch's positions
        command += ["--loss_reduction", "batch", "--batch_size", str(args.batch_size)]
    command += args.gradlens_args.split()
    log = folder.with_suffix(".log")
    peak, begin = 0, time.perf_counter()
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            try:
                peak = max(peak, rss_anon_bytes(process.pid))
            except OSError:  # it ended between the two looks
                pass
            time.sleep(0.02)
    wall = time.perf_counter() - begin
    if process.returncode:
        sys.exit(f"gradlens failed ({process.returncode}): {' '.join(command)}\n{log.read_text()[-3000:]}")
    [stats] = folder.rglob("timing_stats.json")
    return dict(seconds=json.loads(stats.read_text())["overall"]["compute"], peak_rss_anon_bytes=peak, wall_s=wall), stats.parent


def agreement(save, output):
    """Per quantity: the largest relative L2 distance over the peer's layers, and the layer it occurs at."""
    worst = {}
    with np.load(save) as peer:
        for name in peer.files:
            reference = peer[name]
            if not reference.any():  # a layer the peer did not measure
                continue
            layer, quantity = name.split("_", 2)[1:]
            ours = np.load(output / f"{name}_gradients.npy").astype(np.float64)
            distance = float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))
            worst[quantity] = max(worst.get(quantity, (-1.0, -1)), (distance, int(layer)))
    return worst


def cpu_name():
    try:
        return next(line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def spread(values):
    return f"{statistics.median(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model_name", required=True)
    p.add_argument("--dataset", help="default: corpus.jsonl in the checkpoint folder")
    p.add_argument("--gradlens", default=str(REPOSITORY / "target" / "release" / "gradlens"))
    p.add_argument("--peer", default="hf_one_pass.py", choices=["hf_one_pass.py", "scripts_algorithm.py", "sae_one_pass.py"])
    p.add_argument("--sae", help="folder of a layer's SAE, with {layer}; default with sae_one_pass.py: as make_saes.py lays them out")
    p.add_argument("--layers", default="11,23", help="layers with SAEs")
    p.add_argument("--peer_args", default="", help='passed on to the peer, e.g. "--loss_rows 128"')
    p.add_argument("--peer_malloc", choices=["tuned", "plain"], default="tuned")
    p.add_argument("--gradlens_args", default="", help="passed on to gradlens")
    p.add_argument("--python", default=sys.executable)
    p.add_argument("--modes", default="values,gradients")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--samples", type=int, default=8)
    p.add_argument("--max_length", type=int, default=128)
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--device", default="cpu")
    p.add_argument("--work", type=Path, help="keep outputs and raw figures in this folder")
    args = p.parse_args()
    args.dataset = args.dataset or str(Path(args.model_name) / "corpus.jsonl")
    if args.peer == "sae_one_pass.py":
        args.sae = args.sae or f"{args.model_name}/mlp_out_layer_{{layer}}/trainer_0"
    elif args.sae:
        p.error("--sae is for --peer sae_one_pass.py")
    if not Path(args.gradlens).is_file():
        sys.exit(f"no program at {args.gradlens}: build it (cargo build --release) or name it with --gradlens")
    work = args.work or Path(tempfile.mkdtemp(prefix="gradlens_peers_"))
    work.mkdir(parents=True, exist_ok=True)
    modes = args.modes.split(",")
    rows, close = {m: ([], []) for m in modes}, {}
    for round_number in range(args.rounds):
        for mode in modes:
            save, output = work / f"peer_{mode}.npz", None
            for who in ("peer", "ours") if round_number % 2 == 0 else ("ours", "peer"):
                if who == "peer":
                    rows[mode][1].append(run_peer(args, mode, save))
                else:
                    ours, output = run_ours(args, mode, work / f"ours_{mode}")
                    rows[mode][0].append(ours)
            close[mode] = agreement(save, output)
            ours, peer = rows[mode][0][-1], rows[mode][1][-1]
            print(f"round {round_number + 1} {mode}: ours {ours['seconds']:.3f} s, peer {peer['seconds']:.3f} s", file=sys.stderr, flush=True)

    subject = f"{args.peer} {args.peer_args}".strip() + (f", SAEs on layers {args.layers}" if args.sae else "")
    print(f"{subject}; {cpu_name()}, {args.threads} threads, {args.dtype}, "
          f"{args.samples} × ≤{args.max_length} tokens, {args.rounds} rounds; median (min–max)\n")
    print("| mode | ours, s | peer, s | ratio ours/peer | ours, tokens/s | peer, tokens/s | ours, RssAnon GB | peer, RssAnon GB |")
    print("|---|---|---|---|---|---|---|---|")
    for mode, (ours, peer) in rows.items():
        a, b = [r["seconds"] for r in ours], [r["seconds"] for r in peer]
        tokens = peer[0]["tokens"]
        memory = [max(r["peak_rss_anon_bytes"] for r in side) / 1e9 for side in (ours, peer)]
        print(f"| {mode} | {spread(a)} | {spread(b)} | {spread([x / y for x, y in zip(a, b)])} | {tokens / statistics.median(a):.1f} | "
              f"{tokens / statistics.median(b):.1f} | {memory[0]:.2f} | {memory[1]:.2f} |")
    print("\nAgreement (largest relative L2 distance over layers): " + "; ".join(
        f"{mode} {quantity} {distance:.2e} at layer {layer}" for mode, found in close.items() for quantity, (distance, layer) in sorted(found.items())))
    (work / "compare.json").write_text(json.dumps(dict(
        arguments={k: str(v) for k, v in vars(args).items()}, cpu=cpu_name(),
        rounds={m: dict(ours=o, peer=q) for m, (o, q) in rows.items()}, agreement=close), indent=2) + "\n")
    print(f"\nraw figures: {work / 'compare.json'}", file=sys.stderr)


if __name__ == "__main__":
    main()
