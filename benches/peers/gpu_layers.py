#!/usr/bin/env python3
"""All layers' statistics of a corpus, gradlens beside Hugging Face transformers on one GPU.

    python3 gpu_layers.py measure --gradlens FILE --shape llama-3-8b --save llama.json    # makes the model, takes a few minutes
    python3 gpu_layers.py table qwen.json llama.json > layers.md                          # Markdown
    python3 gpu_layers.py compare FOLDER FOLDER --bound 2e-2                              # two results of `gradlens layer`

`measure` writes a random checkpoint of that shape and two corpora (`fixed`: every text 128 tokens; `ragged`: 16 to
512), and has gradlens and the peer take turns on each, for values and for gradients. The peer stays loaded and gradlens
is a new process each time; while one works the other does nothing.
  one pass     the strong peer: bfloat16, every layer hooked in one pass, weights frozen, the first layer's MLP output is
               the leaf; sums on the device; texts sorted by length; head and loss in slices. Its attention and batch
               are the fastest of some (sdpa; FlashAttention without padding where its package is installed).
  per layer    the replaced scripts' algorithm: the model once per layer and batch of 4, padded to max_length. Three
               layers are timed on a part of the corpus and a line through them gives the rest; in bfloat16 too, frozen.
Their losses are the sum over all tokens, as gradlens is asked for by `--loss_reduction token`. No ratio is printed where
the mean |v| of both differ by more than `--bound` in relative L2 distance.
`--device cpu --shape tiny-qwen` tries all of it out without a GPU.
"""
import argparse, gc, importlib.util, json, os, platform, shlex, shutil, statistics, subprocess, sys, tempfile, threading, time
from pathlib import Path
from typing import NamedTuple

try:
    import numpy as np
except ImportError:  # tables are printed without it
    np = None

MODES = ["gradients", "values"]
CORPORA = {"fixed": ("corpus.jsonl", 128), "ragged": ("ragged.jsonl", 512)}  # file, max_length
SCRIPTS_BATCH = 4
TUNING_TOKENS = 32768  # of the corpus, to find the peer's best setting
BOUND = 2e-2


class Failure(Exception):
    """What ends a case; the others go on."""


# ---- the peer

class Setting(NamedTuple):
    attention: str
    batch_tokens: int

    def __str__(self):
        return f"{self.attention}, {self.batch_tokens:,} tokens"


class Batch:
    """Rows of ids as the model takes them: padded on the right, or, for FlashAttention, one after the other.

    Pads need no mask: they come after every token of their text, so causal attention never sees them; their rows
    enter no sum, and nothing that counts depends on them, so their gradients are 0.
    """

    def __init__(self, rows, packed, device):
        lengths = torch.tensor([len(row) for row in rows])
        width = int(lengths.max())
        starts = lengths.cumsum(0) - lengths if packed else torch.arange(len(rows)) * width
        ids = torch.zeros(int(lengths.sum()) if packed else len(rows) * width, dtype=torch.long)
        for start, row in zip(starts.tolist(), rows):
            ids[start:start + len(row)] = torch.tensor(row)
        self.inputs = dict(input_ids=ids.view(1 if packed else len(rows), -1).to(device))
        if packed:
            bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
            positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
            self.inputs.update(position_ids=positions[None].to(device), cu_seq_lens_q=bounds, cu_seq_lens_k=bounds,
                               max_length_q=width, max_length_k=width)
        reach = lambda end: torch.cat([torch.arange(s, s + n - end) for s, n in zip(starts.tolist(), lengths.tolist())]).to(device)
        self.rows = None if int(lengths.sum()) == len(ids) else reach(0)  # without the pads
        self.predicting = reach(1)
        self.targets = torch.cat([torch.tensor(row[1:]) for row in rows]).to(device)


def batches(rows, setting, device):
    """Longest first, so that what memory it takes shows at once."""
    packed, groups = setting.attention != "sdpa", []
    for row in sorted(rows, key=len, reverse=True):
        group = groups[-1] if groups else []
        tokens = sum(map(len, group)) + len(row) if packed else (len(group) + 1) * len(group[0] if group else row)
        if not group or tokens > setting.batch_tokens:
            groups.append([])
        groups[-1].append(row)
    return [Batch(group, packed, device) for group in groups]


def loss_and_gradient(hidden, batch, weight, slice_tokens):
    """Σ over predicted tokens of the cross-entropy, and its gradient at `hidden`; logits of `slice_tokens` at a time."""
    flat = hidden.detach().flatten(0, 1)
    gradient, loss = torch.zeros_like(flat), torch.zeros((), device=flat.device)
    for at in range(0, len(batch.targets), slice_tokens):
        rows = batch.predicting[at:at + slice_tokens]
        part = flat[rows].requires_grad_()
        logarithms = torch.nn.functional.log_softmax(part @ weight.T, -1, dtype=torch.float32)
        nats = torch.nn.functional.nll_loss(logarithms, batch.targets[at:at + slice_tokens], reduction="sum")
        [gradient[rows]] = torch.autograd.grad(nats, part)
        loss += nats.detach()
    return loss, gradient.view_as(hidden)


class OnePass:
    """The strong peer."""

    def __init__(self, model, device, slice_tokens):
        self.model, self.device, self.slice_tokens = model, device, slice_tokens

    def run(self, work, mode):
        """Moments and the loss in nats over these batches."""
        body, config = self.model.model, self.model.config
        moments = Moments(config.num_hidden_layers, config.hidden_size, self.device)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        batch = None

        def tap(i):
            def values(module, inputs, out):
                moments.add(i, out, batch.rows)

            def gradients(module, inputs, out):
                if i == 0:
                    out = out.detach().requires_grad_()
                out.register_hook(lambda gradient: moments.add(i, gradient))
                return out
            return values if mode == "values" else gradients

        hooks = [layer.mlp.register_forward_hook(tap(i)) for i, layer in enumerate(body.layers)]
        try:
            with torch.inference_mode(mode == "values"):
                for batch in work:
                    hidden = body(**batch.inputs, use_cache=False).last_hidden_state
                    if mode == "gradients":
                        nats, gradient = loss_and_gradient(hidden, batch, self.model.lm_head.weight, self.slice_tokens)
                        hidden.backward(gradient)
                        loss += nats
        finally:
            for hook in hooks:
                hook.remove()
        return moments, loss.item() if mode == "gradients" else None

    def time(self, rows, setting, mode):
        """Seconds for these rows, peak memory and what came out; the largest batch goes through once before."""
        if self.device != "cpu":
            self.model.set_attn_implementation(setting.attention)
        work = batches(rows, setting, self.device)
        self.run(work[:1], mode)
        synchronize(self.device)
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        moments, loss = self.run(work, mode)
        synchronize(self.device)
        seconds = time.perf_counter() - begin
        return dict(seconds=seconds, peak_bytes=torch.cuda.max_memory_reserved() if self.device != "cpu" else None), moments, loss

    def best_setting(self, rows, settings, mode):
        """The fastest setting on a part of the corpus, and what was found of each."""
        rows, found = first_tokens(rows, TUNING_TOKENS), []
        for setting in settings:
            try:
                times, *_ = self.time(rows, setting, mode)
                found.append(dict(setting=str(setting), tokens_per_s=tokens_of(rows) / times["seconds"]))
            except Exception as error:  # out of memory, an attention that does not take this
                found.append(dict(setting=str(setting), error=f"{type(error).__name__}: {str(error)[:200]}"))
            release(self.device)
        rates = [f.get("tokens_per_s", 0) for f in found]
        if not any(rates):
            raise Failure(f"the peer fails in every setting: {found[0]['error']}")
        return settings[rates.index(max(rates))], found


def per_layer(one_pass, rows, max_length, mode):
    """The scripts' algorithm on these rows; how far its results are from the strong peer's on the same."""
    from scripts_algorithm import line_total, one_layer, padded
    model, device = one_pass.model, one_pass.device
    if device != "cpu":
        model.set_attn_implementation("sdpa")
    count, width = model.config.num_hidden_layers, model.config.hidden_size
    work = [padded(rows[i:i + SCRIPTS_BATCH], max_length) for i in range(0, len(rows), SCRIPTS_BATCH)]
    work = [(ids.to(device), mask.to(device)) for ids, mask in work]
    moments, measured = Moments(count, width, device), {}
    one_layer(model, work[:1], count - 1, Moments(count, width, device), mode, "frozen", summed=True)
    for layer in sorted({0, count // 2, count - 1}):
        synchronize(device)
        begin = time.perf_counter()
        one_layer(model, work, layer, moments, mode, "frozen", summed=True)
        synchronize(device)
        measured[layer] = time.perf_counter() - begin
    wanted, _ = one_pass.run(batches(rows, Setting("sdpa", max_length * SCRIPTS_BATCH), device), mode)
    distances = [distance(moments.sum_abs[i].cpu().numpy(), wanted.sum_abs[i].cpu().numpy()) for i in measured]
    seconds = line_total(measured, count)
    return dict(tokens=tokens_of(rows), measured_s=measured, layers=count, extrapolated=len(measured) < count, seconds=seconds,
                tokens_per_s=tokens_of(rows) / seconds, distances=distances)


def attentions(device):
    names = {"flash_attn": "flash_attention_2", "flash_attn_interface": "flash_attention_3"} if device != "cpu" else {}
    return ["sdpa"] + [name for package, name in names.items() if importlib.util.find_spec(package)]


def synchronize(device):
    if device != "cpu":
        torch.cuda.synchronize()


def release(device):
    """Gives back what the peer does not need between its turns."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


# ---- gradlens

class DeviceMemory:
    """Most memory in use on the whole device beyond what was in use before, looked at every 20 ms."""

    def __init__(self, device):
        self.peak_bytes, self.stop = None, threading.Event()
        if device == "cpu":
            return
        self.used = lambda: torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]
        self.before, self.peak_bytes = self.used(), 0
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        while not self.stop.wait(0.02):
            self.peak_bytes = max(self.peak_bytes, self.used() - self.before)


def run_gradlens(args, model, corpus, samples, max_length, mode, output):
    """One run: what its files say, and the mean |v| of each layer."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    command = [args.gradlens, "layer", "--model_name", str(model), "--dataset", str(corpus), "--num_samples", str(samples),
               "--max_length", str(max_length), "--min_chars", "0", "--aggregate_by", mode, "--normalize_gradients", "none",
               "--loss_reduction", "token", "--device", args.gradlens_device or args.device, "--save_outputs", "--output_dir",
               str(output), "--quiet", *shlex.split(args.gradlens_args)]
    memory = DeviceMemory(args.device)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    memory.stop.set()
    if done.returncode:
        raise Failure(f"gradlens failed ({done.returncode}): {done.stderr.strip()[-1500:] or 'without a word'}\n{shlex.join(command)}")
    [folder] = [path for path in output.iterdir() if path.is_dir()]
    overall = json.loads((folder / "timing_stats.json").read_text())["overall"]
    about = json.loads((folder / "metadata.json").read_text())["run_info"]
    # The device computes while texts are read, and `compute` leaves out the waiting for them: with it added nothing
    # that the device did is missing.
    seconds = overall["compute"] + overall["dataset_preparation"]
    return dict(seconds=seconds, overall=overall, tokens=about["tokens"], targets=about["targets"], dtype=about["dtype"],
                loss_nats_per_token=about.get("loss_nats_per_token"), peak_bytes=memory.peak_bytes), mean_abs(folder, mode)


def mean_abs(folder, mode):
    """Mean |v| of every layer, from statistics.npz."""
    with np.load(folder / "statistics.npz") as file:
        layers = sorted({int(name.split(".")[0].removeprefix("layer_")) for name in file.files if f".mlp.{mode}." in name})
        return {i: file[f"layer_{i}.mlp.{mode}.sum_abs"] / file[f"layer_{i}.mlp.{mode}.count"] for i in layers}


def distance(found, wanted):
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def largest(distances):
    """Not a number is infinitely far."""
    return max((d if d == d else float("inf") for d in distances), default=float("inf"))


def doctor(args):
    """What gradlens says of the device and the compiler."""
    command = [args.gradlens, "doctor", "--device", args.gradlens_device or args.device]
    lines = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout.splitlines()
    return [" ".join(line.split(" from ")[0].split()) for line in lines if line.startswith(("cuda:", "NVRTC", "gradlens "))]


# ---- measuring

def necessary_flops(shape, lengths, mode):
    """Multiplications and additions of matrix products and attention that no exact method leaves out.

    Values: every block forward. Gradients: also the head, its gradient, and backward through the inputs alone of every
    block but the first, with attention's four products; probabilities that are computed twice count once.
    """
    D, I, L, H, K, Hd, V = (shape[letter] for letter in ("D", "I", "L", "H", "K", "Hd", "V"))
    linear = sum(lengths) * 2 * (D * (H + 2 * K) * Hd + H * Hd * D + 3 * D * I)
    attention = sum(4 * H * Hd * n * (n + 1) / 2 for n in lengths)
    forward = L * (linear + attention)
    if mode == "values":
        return forward
    return forward + (L - 1) * (linear + 2 * attention) + 4 * D * V * sum(n - 1 for n in lengths)


def tokens_of(rows):
    return sum(map(len, rows))


def first_tokens(rows, tokens):
    """The first rows that have so many tokens, or all."""
    taken, total = [], 0
    for row in rows:
        if total >= tokens:
            break
        taken.append(row)
        total += len(row)
    return taken


def read_rows(folder, corpus, max_length):
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [json.loads(line)["text"] for line in (folder / corpus).read_text().splitlines()]
    return [encoding.ids[:max_length] for encoding in tokenizer.encode_batch(texts)]


def gemm_roof():
    """TFLOP/s of torch.mm, 8192³ in bfloat16, which is cuBLAS's."""
    from gpu_table import Peers
    peers = Peers(0, compile=False)
    peers.gemm_roof()
    return peers.lines[-1].get("tflops")


def measure(args):
    deadline = time.monotonic() + args.seconds
    shape = make_checkpoint.SHAPES[args.shape]
    folder = args.work / args.shape
    ragged_length = (make_checkpoint.LEAST + make_checkpoint.MOST) // 2
    begin = time.perf_counter()
    parameters = make_checkpoint.make(folder, shape, args.tokens // 128, args.tokens // ragged_length, 128, args.seed, args.device)
    release(args.device)
    note(f"{args.shape}: {parameters:,} parameters written in {time.perf_counter() - begin:.0f} s")
    on_gpu = args.device != "cpu"
    record = dict(shape=args.shape, parameters=parameters, bound=args.bound, torch=torch.__version__, transformers=transformers.__version__,
                  cuda=torch.version.cuda, device=torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU",
                  gradlens=doctor(args), gradlens_device=args.gradlens_device or args.device,
                  on_gpu=on_gpu, roof_tflops=gemm_roof() if on_gpu else None, results=[], not_measured=[])
    release(args.device)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    peer = OnePass(model.to(args.device).eval().requires_grad_(False), args.device, args.loss_slice)
    settings = [Setting(attention, int(tokens)) for attention in attentions(args.device) for tokens in args.batch_tokens.split(",")]
    note("the peer is loaded")
    # Kernels are compiled and the checkpoint is in memory before the first timed run.
    run_gradlens(args, folder, folder / "corpus.jsonl", 8, 128, "gradients", args.work / "warm_up")
    for mode in MODES:
        for corpus in CORPORA:
            try:
                if time.monotonic() > deadline:
                    raise Failure("no time left")
                record["results"].append(one_case(args, peer, settings, folder, mode, corpus, deadline))
            except Failure as failure:
                record["not_measured"].append(f"{corpus}, {mode}: {failure}")
                note(record["not_measured"][-1])
            args.save.write_text(json.dumps(record, indent=1) + "\n")
    results, missing = record["results"], record["not_measured"]
    distances = ", ".join(f"{largest(result['distances']):.1e}" for result in results)
    print(f"measured: {len(results)} of {len(results) + len(missing)} cases, distances {distances or '–'}")
    if not all(agree(result, args.bound) for result in results):
        sys.exit("error: the results of gradlens and the peer differ by more than the bound")
    if missing:
        sys.exit(f"error: not measured: {'; '.join(line.splitlines()[0] for line in missing)}")


def one_case(args, peer, settings, folder, mode, corpus, deadline):
    """Turns of both on one corpus, who goes first alternating."""
    file, max_length = CORPORA[corpus]
    rows = read_rows(folder, file, max_length)
    lengths = [len(row) for row in rows]
    release(peer.device)
    setting, tried = peer.best_setting(rows, settings, mode)
    ours, theirs, distances, losses = [], [], [], []
    for turn in range(args.rounds):
        if turn and time.monotonic() > deadline:
            break
        for who in ("peer", "ours") if turn % 2 == 0 else ("ours", "peer"):
            release(peer.device)
            if who == "peer":
                times, moments, loss = peer.time(rows, setting, mode)
                theirs.append(times)
                wanted = (moments.sum_abs / sum(lengths)).cpu().numpy()
                moments.save(args.work / f"peer_{corpus}_{mode}.npz", sum(lengths))
            else:
                figures, means = run_gradlens(args, folder, folder / file, len(rows), max_length, mode, args.work / f"ours_{corpus}_{mode}")
                if figures["tokens"] != sum(lengths):
                    raise Failure(f"gradlens counts {figures['tokens']} tokens, the peer {sum(lengths)}")
                ours.append(figures)
        distances = [distance(means[i], wanted[i]) for i in range(len(wanted))]
        losses = [ours[-1]["loss_nats_per_token"], loss and loss / sum(n - 1 for n in lengths)]
        note(f"{corpus}, {mode}, turn {turn + 1}: gradlens {ours[-1]['seconds']:.3f} s, peer {theirs[-1]['seconds']:.3f} s ({setting}), "
             f"distance {largest(distances):.2e}")
    release(peer.device)
    result = dict(mode=mode, corpus=corpus, samples=len(rows), tokens=sum(lengths), flops=necessary_flops(make_checkpoint.SHAPES[args.shape], lengths, mode),
                  gradlens=ours, peer=theirs, setting=str(setting), tried=tried, distances=distances, loss_nats_per_token=losses)
    try:
        result["scripts"] = per_layer(peer, rows[:args.scripts_samples], max_length, mode)
    except Exception as error:  # out of memory
        result["scripts"] = dict(error=f"{type(error).__name__}: {str(error)[:200]}")
    return result


def note(text):
    print(text, file=sys.stderr, flush=True)


# ---- printing

def agree(result, bound):
    """Whether both computed the same thing."""
    return largest(result["distances"]) <= bound


def rates(result, who):
    return [result["tokens"] / run["seconds"] for run in result[who]]


def spread(values):
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}–{max(values):,.0f})"


def gigabytes(runs):
    peaks = [run["peak_bytes"] for run in runs if run["peak_bytes"] is not None]
    return f"{max(peaks) / 1e9:.1f}" if peaks else "–"


def row(cells):
    return "| " + " | ".join(cells) + " |"


def table_row(shape, result, bound, roof_tflops):
    ours, theirs = rates(result, "gradlens"), rates(result, "peer")
    cells = [shape, result["corpus"], result["mode"], spread(ours), spread(theirs), result["setting"]]
    scripts, same = result["scripts"], agree(result, bound)
    if same:
        ratios = [a / b for a, b in zip(ours, theirs)]
        cells.append(f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f}–{max(ratios):.2f})")
    else:
        cells.append("**results disagree**")
    if "error" in scripts:
        cells.append(scripts["error"].split(":")[0])
    elif same and agree(scripts, bound):
        cells.append(f"{statistics.median(ours) / scripts['tokens_per_s']:.1f}")
    else:
        cells.append("results disagree")
    share = same and roof_tflops and result["flops"] / result["tokens"] * statistics.median(ours) / (roof_tflops * 1e12)
    cells += [f"{100 * share:.0f}" if share else "–", gigabytes(result["gradlens"]), gigabytes(result["peer"]), f"{largest(result['distances']):.1e}"]
    return row(cells)


def table(args):
    records = [json.loads(path.read_text()) for path in args.records if path.exists()]
    print("## Layers: whole runs on random checkpoints\n")
    if not records:
        print("Nothing was measured.")
        return
    first = records[0]
    print(f"Device: {first['device']}. Peer: PyTorch {first['torch']} (CUDA {first['cuda']}), transformers {first['transformers']}, in the same run. "
          f"gradlens: {'; '.join(first['gradlens'])}.\n")
    if not first["on_gpu"]:
        print("**Without a GPU: the times say nothing.**\n")
    roofs = ", ".join(f"{record['roof_tflops']:.0f} ({record['shape']})" for record in records if record["roof_tflops"])
    print(f"Tokens/s of whole corpora, pads not counted, medians (least–most) of turns; tokens/s of gradlens by those of the others, above 1: gradlens "
          f"is faster. Roof: torch.mm in bfloat16, 8192³, TFLOP/s: {roofs or '–'}; its share is of the necessary operations. Memory: gradlens all "
          f"that its process takes of the device, the peer what PyTorch reserves. Distance: relative L2 of mean |v|, the largest of all layers; up to "
          f"{first['bound']:g} counts as the same result.\n")
    head = ["model", "corpus", "job", "gradlens, tokens/s", "one pass, tokens/s", "its best setting", "gradlens / one pass", "gradlens / per layer",
            "% of roof", "gradlens, GB", "one pass, GB", "distance"]
    print(row(head))
    print(row(["---"] * len(head)))
    for record in records:
        for result in record["results"]:
            print(table_row(record["shape"], result, record["bound"], record["roof_tflops"]))
    print("\nPer layer: the scripts' algorithm, first, middle and last layer timed on a part of the corpus, the rest on a line through them; in bfloat16.\n")
    for record in records:
        for result in record["results"]:
            print(details(record, result))
        for missing in record["not_measured"]:
            print(f"- {record['shape']}, {missing.splitlines()[0]} (**not measured**)")


def details(record, result):
    compute = statistics.median(result["tokens"] / run["overall"]["compute"] for run in result["gradlens"])
    tried = [f"{t['setting']}: {t['tokens_per_s']:,.0f}" if "tokens_per_s" in t else f"{t['setting']}: {t['error'][:80]}" for t in result["tried"]]
    text = (f"- {record['shape']}, {result['corpus']}, {result['mode']}: {result['samples']:,} texts, {result['tokens']:,} tokens, "
            f"{result['flops'] / result['tokens'] / 1e9:.3g} GFLOP a token; gradlens in {result['gradlens'][0]['dtype']}, without what it waited for "
            f"texts {compute:,.0f} tokens/s; the peer on a part of them, tokens/s: {'; '.join(tried)}.")
    if result["mode"] == "gradients":
        text += " Loss, nats per token: {:.4f}, of the peer {:.4f}.".format(*result["loss_nats_per_token"])
    peaks = [run["peak_bytes"] for run in result["gradlens"] if run["peak_bytes"] is not None]
    if peaks and max(peaks) < 2 * record["parameters"]:
        text += " **Beside the peer the card had too little memory: the weights came layer by layer.**"
    return text


def compare(args):
    """Exit code 1 where two results folders, or the one folder in each, differ."""
    if np is None:
        return print("skipped: this needs NumPy")

    def results(folder):
        found = [folder] if (folder / "statistics.npz").exists() else [path.parent for path in folder.glob("*/statistics.npz")]
        if len(found) != 1:
            sys.exit(f"error: {folder}: expected one folder with a statistics.npz, found {len(found)}")
        return found[0]

    worst = []
    for mode in ["values", "gradients"]:
        found, wanted = (mean_abs(results(folder), mode) for folder in (args.found, args.wanted))
        if found.keys() != wanted.keys():
            sys.exit(f"error: {mode} of layers {list(found)} and {list(wanted)}")
        distances = {i: distance(found[i], wanted[i]) for i in wanted}
        for i, d in distances.items():
            print(f"layer {i:3} {mode:<9} relative L2 {d:.2e}")
        worst.append(largest(distances.values()))
    print(f"largest relative L2: {max(worst):.2e} (up to {args.bound:g})")
    if max(worst) > args.bound:
        sys.exit("error: the results differ by more than the bound")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = p.add_subparsers(dest="job", required=True)
    m = jobs.add_parser("measure")
    m.add_argument("--gradlens", required=True, help="the program, built in release")
    m.add_argument("--shape", required=True, help="of make_checkpoint.py")
    m.add_argument("--save", type=Path, required=True, help=".json for all figures, written after each case")
    m.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    m.add_argument("--gradlens_device", help="where that is another one")
    m.add_argument("--gradlens_args", default="", help="passed on to gradlens")
    m.add_argument("--tokens", type=int, default=262144, help="of each corpus, about")
    m.add_argument("--batch_tokens", default="4096,8192,16384,32768", help="of the peer, to choose from")
    m.add_argument("--loss_slice", type=int, default=4096, help="tokens whose logits the peer has at a time")
    m.add_argument("--scripts_samples", type=int, default=32)
    m.add_argument("--rounds", type=int, default=3)
    m.add_argument("--seconds", type=float, default=1e9, help="begin no turn after this time")
    m.add_argument("--bound", type=float, default=BOUND)
    m.add_argument("--seed", type=int, default=0)
    m.add_argument("--work", type=Path, help="keep checkpoint and results in this folder; default: a temporary one")
    t = jobs.add_parser("table")
    t.add_argument("records", type=Path, nargs="+")
    c = jobs.add_parser("compare")
    c.add_argument("found", type=Path)
    c.add_argument("wanted", type=Path)
    c.add_argument("--bound", type=float, default=BOUND)
    args = p.parse_args()
    if args.job != "measure":
        return {"table": table, "compare": compare}[args.job](args)
    try:
        import_peer()
    except ImportError as error:
        return print(f"skipped: this needs PyTorch, transformers and NumPy ({error})")
    if args.shape not in make_checkpoint.SHAPES:
        m.error(f"--shape: one of {', '.join(make_checkpoint.SHAPES)}, not {args.shape}")
    if not Path(args.gradlens).is_file():
        m.error(f"--gradlens: there is no {args.gradlens}")
    if args.device == "cuda" and not torch.cuda.is_available():
        return print(f"skipped: PyTorch {torch.__version__} sees no GPU")
    args.gradlens, args.save = str(Path(args.gradlens).resolve()), args.save.resolve()
    with tempfile.TemporaryDirectory(prefix="gradlens_layers_") as work:
        args.work = args.work or Path(work)
        try:
            measure(args)
        except Failure as failure:
            sys.exit(f"error: {failure}")


def import_peer():
    """What only `measure` needs: tables are printed where there is no PyTorch."""
    global Moments, make_checkpoint, torch, transformers
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="true")
    import numpy, torch, transformers
    import make_checkpoint
    from common import Moments
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    main()
