#!/usr/bin/env python3
"""Times of the CUDA kernels beside PyTorch's for the same work on the same card, as Markdown.

    gpu_bench > kernels.jsonl
    python3 gpu_table.py kernels.jsonl [--save_peers peers.jsonl] > tables.md      # measures the peers
    python3 gpu_table.py kernels.jsonl --peers peers.jsonl > tables.md             # measured before

Peers are timed as `benches/gpu.rs` times: random inputs of the same distribution, as many copies of them to rotate
through, CUDA events around each of 30 repetitions that are queued behind copies, so that no launch is waited for.
Without PyTorch or a GPU their columns stay empty. Only PyTorch and the standard library are needed.
"""
import argparse, json, math, sys, time
from pathlib import Path

try:
    import torch
except Exception as error:  # not installed, or not for this machine
    torch, why_no_torch = None, type(error).__name__

REPETITIONS, WARM_UP = 30, 5
COPIES_AHEAD = 16  # Python needs longer than Rust to ask for 30 repetitions
EPS = 1e-6
# What bounds a family: name and key of its rate, and its roof.
RATES = {"linear": ("TFLOP/s", "tflops", "GEMM")}
OTHER_RATE = ("GB/s", "gb_per_s", "copy")


# ---- measuring

def norm_forward(x, delta, weight):
    h = x + delta
    return h, torch.nn.functional.rms_norm(h, weight.shape, weight, EPS).to(delta.dtype)


def norm_backward(x, dy, weight):
    """Written out, for the compiler to fuse."""
    r = torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS)
    g = dy.float() * weight
    return r * g - x * (r * r * r * (g * x).mean(-1, keepdim=True))


def moments(x):
    """Written out, for the compiler to fuse."""
    x = x.float()
    return x.sum(0), x.abs().sum(0), (x * x).sum(0), x.abs().amax(0)


def moments_by_norms(x):
    """The same quantities (the root of one) without an |x| or x² in memory."""
    norm = torch.linalg.vector_norm
    return x.sum(0, dtype=torch.float32), *(norm(x, p, 0, dtype=torch.float32) for p in (1, 2, math.inf))


class Peers:
    """Times PyTorch; `lines` is what was found, one dict per measurement, the machine first."""

    def __init__(self, seconds, compile):
        self.end = time.monotonic() + seconds
        self.large = [self.random(1 << 28), self.random(1 << 28)]
        self.compiled = {f: torch.compile(f, dynamic=False) for f in (norm_forward, norm_backward, moments)} if compile else {}
        self.lines = [dict(torch=torch.__version__, cuda=torch.version.cuda, device=torch.cuda.get_device_name())]

    def random(self, *shape, dtype="f32"):
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
        return (torch.rand(shape, device="cuda") - 0.5).to(dtype)

    def time(self, work):
        """Median, least and most µs of `work(repetition)`."""
        event = lambda: torch.cuda.Event(enable_timing=True)
        for i in range(WARM_UP):
            work(i)
        marks = [(event(), event()) for _ in range(REPETITIONS)]
        for _ in range(COPIES_AHEAD):
            self.large[1].copy_(self.large[0])
        for i, (start, end) in enumerate(marks):
            start.record()
            work(WARM_UP + i)
            end.record()
        torch.cuda.synchronize()
        us = sorted(start.elapsed_time(end) * 1e3 for start, end in marks)
        return dict(median_us=us[len(us) // 2], min_us=us[0], max_us=us[-1])

    def measure(self, case, peer, work, **extra):
        """A peer that fails, or for which no time is left, is noted and the others go on."""
        key = {k: case.get(k) for k in ("family", "case", "dtype")}
        try:
            with torch.no_grad():
                times = self.time(work)
        except Exception as error:  # out of memory, no compiler for torch.compile, an operator of a newer PyTorch
            print(f"{key['case']}, {peer}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
            self.lines.append(dict(key, peer=peer, error=type(error).__name__))
            return
        self.lines.append(dict(key, peer=peer, **times, **{k: v / times["median_us"] for k, v in extra.items()}))

    def measure_compiled(self, case, function, arguments):
        """`arguments(i)`: of repetition i."""
        if function not in self.compiled:
            return
        if time.monotonic() > self.end:
            print(f"{case.get('case')}: no time left to compile its peer", file=sys.stderr)
            return
        compiled = self.compiled[function]
        self.measure(case, "torch.compile", lambda i: compiled(*arguments(i)))

    def gemm_roof(self):
        a, b, c = (self.random(8192, 8192, dtype="bf16") for _ in range(3))
        self.measure(dict(family="linear", case="8192x8192x8192", dtype="bf16"), "torch.mm",
                     lambda i: torch.mm(a, b, out=c), tflops=2 * 8192**3 / 1e6)

    def run(self, cases):
        self.measure(dict(family="copy", case="device to device"), "copy_",
                     lambda i: self.large[1].copy_(self.large[0]), gb_per_s=8 * self.large[0].numel() / 1e3)
        self.gemm_roof()
        for case in cases:
            family = {"linear": self.linear, "norm": self.norm, "stats": self.stats}.get(case.get("family"))
            if family is None or not case.get("chosen", True):
                continue
            try:
                family(case)
            except Exception as error:  # its inputs do not fit, or its line lacks something
                print(f"{case.get('case')}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)

    def linear(self, case):
        """torch.mm into memory that is there: cuBLASLt, which F.linear calls too."""
        n = case["copies"]
        forward = case["op"] == "forward"
        width, to = (case["in"], case["out"]) if forward else (case["out"], case["in"])
        weight = self.random(case["out"], case["in"], dtype="bf16")
        x = [self.random(case["rows"], width, dtype="bf16") for _ in range(n)]
        y = [self.random(case["rows"], to, dtype="bf16") for _ in range(n)]
        right = weight.t() if forward else weight
        flops = 2 * case["rows"] * case["in"] * case["out"]
        self.measure(case, "torch.mm", lambda i: torch.mm(x[i % n], right, out=y[i % n]), tflops=flops / 1e6)

    def norm(self, case):
        n, width = case["copies"], case["width"]
        weight = self.random(width)
        x = [self.random(case["rows"], width) for _ in range(n)]
        other = [self.random(case["rows"], width, dtype=case["dtype"]) for _ in range(n)]
        arguments = lambda i: (x[i % n], other[i % n], weight)
        if case["op"] == "add+norm":
            self.measure(case, "rms_norm", lambda i: norm_forward(*arguments(i)))
            return self.measure_compiled(case, norm_forward, arguments)
        leaves = [x.requires_grad_() for x in x]
        y = [torch.nn.functional.rms_norm(x, weight.shape, weight, EPS).to(other[0].dtype) for x in leaves]
        self.measure(case, "rms_norm's autograd",
                     lambda i: torch.autograd.grad(y[i % n], leaves[i % n], other[i % n], retain_graph=True))
        x = [x.detach() for x in x]
        self.measure_compiled(case, norm_backward, lambda i: (x[i % n], other[i % n], weight))

    def stats(self, case):
        n = case["copies"]
        x = [self.random(case["rows"], case["width"], dtype=case["dtype"]) for _ in range(n)]
        self.measure(case, "sum, abs, amax", lambda i: moments(x[i % n]))
        self.measure(case, "vector_norm", lambda i: moments_by_norms(x[i % n]))
        self.measure_compiled(case, moments, lambda i: (x[i % n],))


def measure(cases, args):
    """Lines of the peers, or why there are none."""
    if torch is None:
        return [], f"PyTorch is not there ({why_no_torch})"
    try:
        if not torch.cuda.is_available():
            return [], f"PyTorch {torch.__version__} sees no GPU"
        peers = Peers(args.seconds, not args.no_compile)
        peers.run(cases)
        return peers.lines, None
    except Exception as error:
        return [], f"PyTorch failed: {type(error).__name__}: {str(error)[:300]}"


# ---- printing

def number(x, digits=3):
    """Three significant digits, whole numbers in full."""
    if x is None or not math.isfinite(x):
        return "–"
    if abs(x) >= 10 ** (digits - 1):
        return f"{x:,.0f}"
    return f"{x:.{max(0, digits - 1 - math.floor(math.log10(abs(x))))}f}" if x else "0"


def spread(line):
    if not line or line.get("median_us") is None:
        return "–"
    return f"{number(line['median_us'])} ({number(line.get('min_us'))}–{number(line.get('max_us'))})"


def quotient(a, b):
    return a / b if a is not None and b else None


def geomean(values):
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def by_case(lines):
    """The fastest peer of each case: (family, case, dtype) → line."""
    best = {}
    for line in lines:
        key = tuple(line.get(k) for k in ("family", "case", "dtype"))
        if line.get("median_us") and (key not in best or line["median_us"] < best[key]["median_us"]):
            best[key] = line
    return best


def roofs(cases, peers):
    best = lambda lines, key: max((line[key] for line in lines if line.get(key)), default=None)
    return {"GEMM": best([p for p in peers if p.get("family") == "linear"], "tflops"),
            "copy": best([line for line in cases + peers if line.get("family") == "copy"], "gb_per_s")}


def shape(case):
    if "in" in case:
        return f"{case.get('rows')}×{case['in']}→{case.get('out')}"
    return f"{case.get('rows')}×{case['width']}" if "width" in case else "–"


def row(cells):
    return "| " + " | ".join(cells) + " |"


def family_table(family, cases, best, roof_values):
    unit, key, roof = RATES.get(family, OTHER_RATE)
    kernels = any("kernel" in case for case in cases)
    head = ["case", "shape", "type"] + ["kernel"] * kernels
    head += ["µs", unit, f"% of {roof} roof", "fastest peer", "peer, µs", "peer / ours"]
    yield f"### {family}\n"
    yield row(head)
    yield row(["---"] * len(head))
    ratios = {}
    for case in cases:
        peer = best.get((family, case.get("case"), case.get("dtype")))
        ratio = quotient(peer and peer["median_us"], case.get("median_us"))
        if ratio:
            name = "as chosen" if case.get("chosen", True) else f"by {case.get('kernel')}"
            ratios.setdefault(name, []).append(ratio)
        percent = quotient(case.get(key), roof_values.get(roof))
        cells = [str(case.get("case", "–")), shape(case), str(case.get("dtype", "–"))]
        cells += [str(case.get("kernel", "–"))] * kernels
        cells += [spread(case), number(case.get(key)), number(percent and 100 * percent),
                  peer["peer"] if peer else "–", spread(peer), number(ratio)]
        yield row(cells)
    yield ""
    for name, values in ratios.items():
        yield f"Peer / ours, {name}: geometric mean **{number(geomean(values))}** of {len(values)}, least {number(min(values))}.\n"
    if not ratios:
        yield "Peer / ours: –\n"


def report(machine, cases, peers, why_none):
    about, lines = (peers[0], peers[1:]) if peers and "peer" not in peers[0] else ({}, peers)
    get = lambda key: machine.get(key, "–")
    memory = f"{machine['total_bytes'] / 1e9:.0f} GB" if "total_bytes" in machine else "–"
    yield "## Kernels\n"
    if machine.get("quick"):
        yield "**A run with `--test`: the shapes are small, once each; the times say nothing.**\n"
    yield (f"Device: {get('device')}, compute capability {get('compute_capability')}, {get('multiprocessors')} multiprocessors, "
           f"{memory}. Kernels: gradlens {get('gradlens')}, compiled by NVRTC {get('nvrtc')}.")
    if about:
        yield f"Peers: PyTorch {about.get('torch')} with CUDA {about.get('cuda')} on {about.get('device')}, in the same run.\n"
    else:
        yield f"Peers: none; {why_none or 'their file is empty'}.\n"
    yield ("Medians of 30 (least–most) between CUDA events; random inputs that rotate through more than three times the L2 cache; warm-up and "
           "launch times left out. Peer / ours above 1: ours is faster.\n")
    found = roofs(cases, lines)
    yield f"Measured roofs: GEMM {number(found['GEMM'])} TFLOP/s (best torch.mm), copy {number(found['copy'])} GB/s (read + written).\n"
    best = by_case(lines)
    families = list(dict.fromkeys(case["family"] for case in cases if case.get("family")))
    for family in families:
        yield from family_table(family, [case for case in cases if case.get("family") == family], best, found)
    others = [line for line in lines if line.get("median_us") and line.get("family") not in ("linear", "copy")]
    if others:
        yield "### every peer\n"
        yield row(["case", "type", "peer", "µs"])
        yield row(["---"] * 4)
        for line in others:
            yield row([str(line["case"]), str(line["dtype"]), line["peer"], spread(line)])
        yield ""
    failed = [f"{line['case']} {line['dtype']}, {line['peer']}: {line['error']}" for line in lines if line.get("error")]
    if failed:
        yield "Peers that failed: " + "; ".join(failed) + ".\n"


def read(path):
    """The JSON objects of a file; what a run that broke off left of a line is skipped, and said so."""
    objects = []
    for count, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            objects.append(value)
        elif line.strip():
            print(f"{path}:{count}: not a JSON object, skipped", file=sys.stderr)
    return objects


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("kernels", help="what gpu_bench printed")
    p.add_argument("--peers", help="take the peers from this file instead of measuring them")
    p.add_argument("--save_peers", help="write every peer's times to this file")
    p.add_argument("--no_compile", action="store_true", help="leave out torch.compile, which takes a while")
    p.add_argument("--seconds", type=float, default=90, help="start no compilation after this time")
    args = p.parse_args()
    lines = read(args.kernels)
    machine = next((line for line in lines if "family" not in line), {})
    cases = [line for line in lines if "family" in line]
    peers, why_none = (read(args.peers), None) if args.peers else measure(cases, args)
    if args.save_peers and peers:
        Path(args.save_peers).write_text("".join(json.dumps(line) + "\n" for line in peers))
    print("\n".join(report(machine, cases, peers, why_none)))


if __name__ == "__main__":
    main()
