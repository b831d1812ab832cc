#!/usr/bin/env python3
"""The SAE peer: Hugging Face transformers, SAEs hooked onto `model.layers.i.mlp` in ONE pass, no padding, no weight gradients.

    python sae_one_pass.py --model_name FOLDER --sae 'FOLDER/mlp_out_layer_{layer}/trainer_0' --layers 11,23 --mode values|gradients

The SAEs are BatchTopK of dictionary_learning (`make_saes.py` writes such): f = relu(W_enc (x − b_dec) + b_enc), 0 where f ≤ threshold.
values      inference mode; blocks after the last wanted layer and the head do not run. Σf per feature; f ≥ 0, so Σ|f| is the same.
gradients   the same, and of dL/df = (dL/dx) W_dec for all features Σ and Σ|·|: the error-preserving splice, so the plain model's
            forward and one backward serve all layers. Weights frozen, the first wanted MLP output is the leaf, head and loss by
            slices as in hf_one_pass.py.
`--plain`: the SAE as it is written down, linear, relu, threshold, and g @ W_dec, with a new tensor for every step, as a hook in a
notebook does it. Otherwise
features are made for `--rows` tokens at a time, in place: [rows, F] is all that is in memory of [N, F]. `--rows 0`: of a batch at once.
Times compute only, after a warm-up. Letters: N tokens, D hidden size, F features.
"""
from pathlib import Path

import torch

from common import Anonymous, Moments, load_batches, load_model, options, timed
from hf_one_pass import chunked_loss


class BatchTopK:
    """As the library loads it: float32 tensors in memory. b_dec is folded into the encoder's bias."""

    def __init__(self, folder):
        state = torch.load(Path(folder) / "ae.pt", weights_only=True)
        self.W_enc = state["encoder.weight"].float().T  # [D, F]; contiguous as the library stores it
        self.W_dec = state["decoder.weight"].float()  # [D, F]
        self.bias = state["encoder.bias"].float() - state["b_dec"].float() @ self.W_enc
        self.threshold = state["threshold"].item()
        assert self.threshold >= 0, "an untrained SAE"
        self.features = self.W_enc.shape[1]

    def add_values(self, moments, layer, x, rows, scratch):
        x = x.reshape(-1, x.shape[-1])
        for part in x.split(rows or len(x)):
            f = torch.addmm(self.bias, part, self.W_enc, out=scratch.get(len(part), self.features))
            torch.nn.functional.threshold_(f, self.threshold, 0.0)  # relu and gate in one: the threshold is not negative
            moments.sum[layer] += f.sum(0)

    def add_gradients(self, moments, layer, g, rows, scratch):
        g = g.reshape(-1, g.shape[-1])
        moments.sum[layer] += g.sum(0) @ self.W_dec  # the signed sum needs no [N, F]
        for part in g.split(rows or len(g)):
            df = torch.mm(part, self.W_dec, out=scratch.get(len(part), self.features))
            moments.sum_abs[layer] += torch.linalg.vector_norm(df, ord=1, dim=0)


class Plain(BatchTopK):
    """The same, step by step."""

    def __init__(self, folder):
        super().__init__(folder)
        state = torch.load(Path(folder) / "ae.pt", weights_only=True)
        self.b_enc, self.b_dec = state["encoder.bias"].float(), state["b_dec"].float()

    def add_values(self, moments, layer, x, rows, scratch):
        x = x.reshape(-1, x.shape[-1])
        f = torch.relu(torch.nn.functional.linear(x - self.b_dec, self.W_enc.T, self.b_enc))
        f = f * (f > self.threshold)
        moments.sum[layer] += f.sum(0)

    def add_gradients(self, moments, layer, g, rows, scratch):
        df = g.reshape(-1, g.shape[-1]) @ self.W_dec
        moments.sum[layer] += df.sum(0)
        moments.sum_abs[layer] += df.abs().sum(0)


class Scratch:
    """One [rows, F] buffer for all products: no page faults after the first."""

    def __init__(self):
        self.buffer = torch.empty(0)

    def get(self, rows, features):
        if self.buffer.numel() < rows * features:
            self.buffer = torch.empty(rows * features)
        return self.buffer[:rows * features].view(rows, features)


def values(model, batches, saes, moments, rows, scratch):
    hooks = [model.model.layers[i].mlp.register_forward_hook(lambda m, a, out, i=i: saes[i].add_values(moments, i, out, rows, scratch)) for i in saes]
    try:
        with torch.inference_mode():
            for ids in batches:
                model.model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    moments.sum_abs.copy_(moments.sum)
    return {}


def gradients(model, batches, saes, value_moments, moments, rows, scratch, loss_rows):
    first = min(saes)

    def tap(i):
        def hook(module, inputs, out):
            saes[i].add_values(value_moments, i, out.detach(), rows, scratch)
            if i == first:
                out = out.detach().requires_grad_()
            out.register_hook(lambda g: saes[i].add_gradients(moments, i, g, rows, scratch))
            return out
        return hook

    hooks = [model.model.layers[i].mlp.register_forward_hook(tap(i)) for i in saes]
    losses = []
    try:
        for ids in batches:
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            loss, grad = chunked_loss(hidden.detach(), ids, model.lm_head.weight, loss_rows)
            hidden.backward(grad)
            losses.append(loss)
    finally:
        for hook in hooks:
            hook.remove()
    return dict(loss=[round(x, 6) for x in losses])


def main():
    p = options(__doc__)
    p.add_argument("--sae", required=True, help="folder of a layer's ae.pt, with {layer}")
    p.add_argument("--layers", required=True, help="comma list")
    p.add_argument("--rows", type=int, default=512, help="tokens whose features are in memory at a time; 0: a batch's")
    p.add_argument("--plain", action="store_true", help="step by step, whole batches, a new tensor for each step")
    p.add_argument("--loss_rows", type=int, default=128, help="head and loss by hand, this many tokens at a time")
    args = p.parse_args()
    watcher = Anonymous()
    batches = load_batches(args)
    if any(len(row) != len(rows[0]) for rows in batches for row in rows):
        p.error("texts of one batch differ in length and this peer does not pad: use --batch_size 1 or corpus.jsonl")
    batches = [torch.tensor(rows) for rows in batches]
    tokens = sum(b.numel() for b in batches)
    model = load_model(args).requires_grad_(False)
    kind = Plain if args.plain else BatchTopK
    saes = {int(i): kind(args.sae.replace("{layer}", i)) for i in args.layers.split(",")}
    count, features = model.config.num_hidden_layers, next(iter(saes.values())).features
    if args.mode == "values":
        model.model.layers = model.model.layers[:max(saes) + 1]
        for sae in saes.values():
            sae.W_dec = None
    scratch = Scratch()

    def run():
        moments, of_values = Moments(count, features), Moments(count, features)
        if args.mode == "values":
            return values(model, batches, saes, moments, args.rows, scratch), moments
        return gradients(model, batches, saes, of_values, moments, args.rows, scratch, args.loss_rows), moments

    extra = dict(peer="sae_one_pass", layers=list(saes), features=features, rows=args.rows, loss_rows=args.loss_rows, plain=args.plain)
    timed(run, args, tokens, extra, watcher)


if __name__ == "__main__":
    main()
