#!/usr/bin/env python3
"""The replaced scripts' algorithm: one model pass per layer and batch, padding to max_length, weights in float32.

    python scripts_algorithm.py --model_name FOLDER --mode values|gradients [--layers 0,11,23]

For each layer the whole model runs forward with a hook on that layer's MLP alone; for gradients the mean next-token
cross-entropy is then differentiated. Only `--layers` are timed; a straight line through them gives the time of the rest.
  --weights frozen   (default) the reading that is kindest to the scripts: no weight gradients, and the hooked output is
                     the leaf, so the backward stops at it
  --weights grad     `loss.backward()` on a model as `from_pretrained` returns it: every weight gets a gradient
Shares are printed for one quantity; the scripts repeat everything for another quantity.
"""
import json, time

import torch

from common import Anonymous, Moments, load_batches, load_model, options


def padded(rows, width):
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, :len(row)] = torch.tensor(row)
        mask[i, :len(row)] = 1
    return ids, mask


def one_layer(model, batches, layer, moments, mode, weights, summed=False):
    """`summed`: the loss is the sum over the texts' tokens, without pads; by default the scripts' own, a mean with pads."""
    seen = []

    def hook(module, inputs, out):
        if mode == "gradients" and weights == "frozen":
            out = out.detach().requires_grad_()
        if mode == "gradients":
            out.retain_grad()
        seen.append(out)
        return out

    handle, loss = model.model.layers[layer].mlp.register_forward_hook(hook), None
    try:
        for ids, mask in batches:
            seen.clear()
            if mode == "values":
                with torch.inference_mode():
                    model(input_ids=ids, attention_mask=mask, use_cache=False)
                moments.add(layer, seen[0], mask.reshape(-1).bool())
            else:
                if summed:
                    loss = dict(labels=ids.masked_fill(mask == 0, -100), num_items_in_batch=1)
                else:
                    loss = dict(labels=ids)  # pads are in the loss, as there
                loss = model(input_ids=ids, attention_mask=mask, use_cache=False, **loss).loss
                loss.backward()
                moments.add(layer, seen[0].grad, mask.reshape(-1).bool())
                model.zero_grad(set_to_none=True)
                loss = loss.item()
    finally:
        handle.remove()
    return loss


def line_total(measured, layers):
    """Σ over all layers of the least-squares line through the measured (layer, seconds)."""
    xs, ys = list(measured), list(measured.values())
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys)) / spread if spread else 0.0
    return sum(measured.get(i, mean_y + slope * (i - mean_x)) for i in range(layers))


def main():
    p = options(__doc__)
    p.add_argument("--layers", help="comma list of the layers to time; default: first, middle and last", default=None)
    p.add_argument("--weights", choices=["frozen", "grad"], default="frozen")
    args = p.parse_args()
    watcher = Anonymous()
    batches = [padded(rows, args.max_length) for rows in load_batches(args)]
    model = load_model(args).requires_grad_(args.weights == "grad")
    count = model.config.num_hidden_layers
    layers = [int(x) for x in args.layers.split(",")] if args.layers else sorted({0, count // 2, count - 1})
    tokens = int(sum(mask.sum() for _, mask in batches))
    moments = None
    for _ in range(args.warmup):
        one_layer(model, batches, layers[-1], Moments(count, model.config.hidden_size), args.mode, args.weights)
    for repeat in range(args.repeat):
        watcher.reset()
        moments, measured, loss = Moments(count, model.config.hidden_size), {}, None
        for layer in layers:
            begin = time.perf_counter()
            loss = one_layer(model, batches, layer, moments, args.mode, args.weights)
            measured[layer] = time.perf_counter() - begin
        watcher.sample()
        total = line_total(measured, count)
        print(json.dumps(dict(peer="scripts_algorithm", mode=args.mode, weights=args.weights, repeat=repeat, tokens=tokens,
                              measured_s={k: round(v, 4) for k, v in measured.items()}, layers=count,
                              extrapolated=len(measured) < count, seconds=round(total, 4), tokens_per_s=round(tokens / total, 3),
                              peak_rss_anon_bytes=watcher.peak_bytes, threads=args.threads, loss=loss)), flush=True)
    if args.save and moments is not None:
        moments.save(args.save, tokens)


if __name__ == "__main__":
    main()
