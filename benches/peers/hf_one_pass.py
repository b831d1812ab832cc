#!/usr/bin/env python3
"""The strong peer: Hugging Face transformers, every layer hooked in ONE pass, no padding, no weight gradients.

    python hf_one_pass.py --model_name FOLDER --mode values|gradients [--samples 8 --max_length 128 --batch_size 8]

values      inference mode, the body without the head, a forward hook on every `model.layers.i.mlp`.
gradients   weights frozen, so autograd keeps no linear's input and computes no weight gradient. The first layer's MLP
            output is made the leaf: nothing before it is recorded and the backward stops there. Each output gets a tensor
            hook that reduces the gradient as it passes; nothing is retained. The head and its loss run over 128 tokens
            at a time, so the [tokens, V] logits never exist (`--loss_rows 0`: Hugging Face's own loss, slower here).
Times compute only, after a warm-up. See README.md for what was tried to make it faster.
"""
import json

import torch

from common import Anonymous, Moments, load_batches, load_model, options, timed


def values(model, batches, moments):
    hooks = [layer.mlp.register_forward_hook(lambda m, a, out, i=i: moments.add(i, out)) for i, layer in enumerate(model.model.layers)]
    try:
        with torch.inference_mode():
            for ids in batches:
                last = model.model(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return dict(last_hidden=[float(f"{x:.6g}") for x in last[0, -1, :3]])


def chunked_loss(hidden, ids, weight, rows):
    """The mean next-token cross-entropy and its gradient at `hidden`, the logits of only `rows` tokens in memory at a time."""
    flat, targets = hidden[:, :-1].reshape(-1, hidden.shape[-1]), ids[:, 1:].reshape(-1)
    grad, loss, n = torch.empty_like(flat), 0.0, len(targets)
    for at in range(0, n, rows):
        logits = flat[at:at + rows] @ weight.T
        chosen = targets[at:at + rows, None]
        top = logits.amax(-1, keepdim=True)
        picked = logits.gather(-1, chosen).sub_(top)
        total = logits.sub_(top).exp_().sum(-1, keepdim=True)
        loss += (total.log() - picked).sum().item()
        logits.div_(total * n).scatter_add_(-1, chosen, torch.full_like(picked, -1.0 / n))
        torch.mm(logits, weight, out=grad[at:at + rows])
    full = torch.zeros_like(hidden)
    full[:, :-1] = grad.view(hidden.shape[0], -1, hidden.shape[-1])
    return loss / n, full


def gradients(model, batches, moments, loss_rows):
    def tap(i):
        def hook(module, inputs, out):
            if i == 0:
                out = out.detach().requires_grad_()
            out.register_hook(lambda g: moments.add(i, g))
            return out
        return hook

    hooks = [layer.mlp.register_forward_hook(tap(i)) for i, layer in enumerate(model.model.layers)]
    losses = []
    try:
        for ids in batches:
            if loss_rows:
                hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
                loss, grad = chunked_loss(hidden.detach(), ids, model.lm_head.weight, loss_rows)
                hidden.backward(grad)
                losses.append(loss)
            else:
                out = model(input_ids=ids, labels=ids, use_cache=False)
                loss = out.loss
                del out
                loss.backward()
                losses.append(loss.item())
    finally:
        for hook in hooks:
            hook.remove()
    return dict(loss=[round(x, 6) for x in losses])


def main():
    p = options(__doc__)
    p.add_argument("--loss_rows", type=int, default=128, help="head and loss by hand, this many tokens at a time; 0: Hugging Face's own loss")
    p.add_argument("--compile", action="store_true", help="torch.compile every MLP and norm (needs a C++ compiler)")
    args = p.parse_args()
    watcher = Anonymous()
    batches = load_batches(args)
    if any(len(row) != len(rows[0]) for rows in batches for row in rows):
        p.error("texts of one batch differ in length and this peer does not pad: use --batch_size 1 or corpus.jsonl")
    batches = [torch.tensor(rows) for rows in batches]
    model = load_model(args).requires_grad_(False)
    if args.compile:
        for layer in model.model.layers:
            for part in layer.mlp, layer.input_layernorm, layer.post_attention_layernorm:
                part.forward = torch.compile(part.forward)
    tokens = sum(b.numel() for b in batches)

    def run():
        moments = Moments(model.config.num_hidden_layers, model.config.hidden_size)
        checks = values(model, batches, moments) if args.mode == "values" else gradients(model, batches, moments, args.loss_rows)
        return checks, moments

    timed(run, args, tokens, dict(peer="hf_one_pass", loss_rows=args.loss_rows, compile=args.compile), watcher)


if __name__ == "__main__":
    main()
