"""What the peers share: options, corpus, the model in float32, and a thread that watches anonymous memory."""
import argparse, json, threading, time
from pathlib import Path


def options(doc):
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model_name", required=True, help="checkpoint folder")
    p.add_argument("--dataset", help='.jsonl of {"text": ...}; default: corpus.jsonl in the checkpoint folder')
    p.add_argument("--mode", choices=["values", "gradients"], default="values")
    p.add_argument("--samples", type=int, default=8)
    p.add_argument("--max_length", type=int, default=128)
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--warmup", type=int, default=1, help="untimed repeats first")
    p.add_argument("--save", help=".npz for the per-layer means")
    return p


class Anonymous:
    """Peak of RssAnon of this process, sampled every 20 ms: VmHWM would also count pages of the mapped checkpoint."""

    def __init__(self, interval_s=0.02):
        self.peak_bytes, self.interval_s, self.stop = 0, interval_s, threading.Event()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        while not self.stop.wait(self.interval_s):
            self.sample()

    def sample(self):
        now = rss_anon_bytes()
        self.peak_bytes = max(self.peak_bytes, now)
        return now

    def reset(self):
        self.peak_bytes = 0
        return self.sample()


def rss_anon_bytes(pid="self"):
    with open(f"/proc/{pid}/status") as f:
        for line in f:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def load_batches(args):
    """Consecutive batches of id rows, truncated on the right, in corpus order."""
    from tokenizers import Tokenizer
    path = Path(args.dataset or Path(args.model_name) / "corpus.jsonl")
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()[:args.samples]]
    assert len(texts) == args.samples, f"{path} has {len(texts)} texts, {args.samples} are needed"
    tok = Tokenizer.from_file(str(Path(args.model_name) / "tokenizer.json"))
    rows = [e.ids[:args.max_length] for e in tok.encode_batch(texts)]
    return [rows[i:i + args.batch_size] for i in range(0, len(rows), args.batch_size)]


def load_model(args):
    """Float32 weights from the mapped bf16 checkpoint, eval mode, SDPA attention."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    return AutoModelForCausalLM.from_pretrained(args.model_name, dtype=torch.float32, attn_implementation="sdpa").eval()


class Moments:
    """Per layer Σv and Σ|v| over tokens: float32 inside a batch, float64 over batches."""

    def __init__(self, layers, width, device="cpu"):
        import torch
        self.torch = torch
        self.sum = torch.zeros(layers, width, dtype=torch.float64, device=device)
        self.sum_abs = torch.zeros(layers, width, dtype=torch.float64, device=device)

    def add(self, layer, v, rows=None):
        """`rows`: mask or indices of the tokens that count; None: all."""
        v = v.detach().reshape(-1, v.shape[-1])
        if rows is not None:
            v = v[rows]
        float32 = self.torch.float32
        self.sum[layer] += v.sum(0, dtype=float32)
        self.sum_abs[layer] += self.torch.linalg.vector_norm(v, ord=1, dim=0, dtype=float32)  # no |v| in memory

    def save(self, path, tokens):
        import numpy as np
        arrays = {}
        for i in range(len(self.sum)):
            arrays[f"layer_{i}_mean"] = (self.sum[i] / tokens).cpu().numpy()
            arrays[f"layer_{i}_mean_abs"] = (self.sum_abs[i] / tokens).cpu().numpy()
        np.savez(path, **arrays)

    def check(self, tokens):
        last = len(self.sum) - 1
        return {f"layer_{i}": dict(mean=[float(f"{x:.6g}") for x in self.sum[i, :3] / tokens],
                                   mean_abs=[float(f"{x:.6g}") for x in self.sum_abs[i, :3] / tokens]) for i in (0, last)}


def timed(run, args, tokens, extra, watcher):
    """Warm-ups, then one JSON line per repeat. `run()` returns (checks, moments)."""
    for _ in range(args.warmup):
        run()
    moments = None
    for repeat in range(args.repeat):
        before = watcher.reset()
        begin, cpu = time.perf_counter(), time.process_time()
        checks, moments = run()
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        watcher.sample()
        print(json.dumps(dict(extra, mode=args.mode, repeat=repeat, seconds=round(seconds, 4), cpu_s=round(cpu, 4), tokens=tokens,
                              tokens_per_s=round(tokens / seconds, 2), peak_rss_anon_bytes=watcher.peak_bytes,
                              rss_anon_before_bytes=before, threads=args.threads, **checks, **moments.check(tokens))), flush=True)
    if args.save and moments is not None:
        moments.save(args.save, tokens)
