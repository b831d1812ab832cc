"""Edits that read a model wrongly on purpose: each must move its golden, or the golden does not pin what it says.

An edit is `edit(weights, config)` on the weights that transformers loads, or `OnModel(edit(model))` on the built model
where no weights and no config value have that effect.
"""

from unittest import mock

import torch


def zero(*endings):
    def edit(weights, config):
        for name in [n for n in weights if n.endswith(endings)]:
            weights[name] = torch.zeros_like(weights[name])

    return edit


def tie(weights, config):
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]


def untie(weights, config):
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].roll(1, 0)
    config.tie_word_embeddings = False


def head_dim(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def regroup(weights, config):
    """Query head h reads key/value head h mod K where it should read h div (H / K)."""
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    order = sorted(range(heads), key=lambda h: (h % kv, h))
    rows = torch.tensor([h * head_dim(config) + d for h in order for d in range(head_dim(config))])
    for name in list(weights):
        if "q_proj" in name:
            weights[name] = weights[name][rows]
        elif "o_proj.weight" in name:
            weights[name] = weights[name][:, rows]


def interleave(weights, config):
    """Rotates neighbours (2d, 2d + 1) where it should rotate (d, d + Hd / 2)."""
    hd = head_dim(config)
    order = [2 * d for d in range(hd // 2)] + [2 * d + 1 for d in range(hd // 2)]
    for name in list(weights):
        if "q_proj" in name or "k_proj" in name:
            heads = weights[name].shape[0] // hd
            weights[name] = weights[name][torch.tensor([h * hd + d for h in range(heads) for d in order])]



def rolled(part):
    """Expert e computes with what is expert e + 1's, for the weights whose name has `part`."""

    def edit(weights, config):
        for name in [n for n in weights if part in n]:
            weights[name] = weights[name].roll(-1, 0)

    return edit


def gate_is_up(weights, config):
    """The two halves of the experts' [E, 2I, D] exchanged: w1 read as w3."""
    for name in [n for n in weights if n.endswith("gate_up_proj")]:
        weights[name] = weights[name].roll(weights[name].shape[1] // 2, 1)


def exchanged(one, other):
    """The weights of two modules of each layer, exchanged."""

    def edit(weights, config):
        for name in [n for n in weights if f".{one}." in n]:
            twin = name.replace(f".{one}.", f".{other}.")
            weights[name], weights[twin] = weights[twin], weights[name]

    return edit


def bare(*parts):
    """Norms (1 + w)·x̂ computed as w·x̂."""

    def edit(weights, config):
        for name in [n for n in weights if any(p in n for p in parts)]:
            weights[name] = weights[name] - 1

    return edit


class OnModel:
    def __init__(self, edit):
        self.edit = edit


def on_layers(edit):
    return OnModel(lambda model: [edit(layer) for layer in model.model.layers])


def router(change):
    """change(logits [N, E], weights [N, k], experts [N, k]) → the weights that the experts' outputs get."""

    def hook(_module, _inputs, out):
        return out[0], change(*out), out[2]

    return on_layers(lambda layer: layer.mlp.gate.register_forward_hook(hook))


def not_renormalised():
    return router(lambda logits, _weights, experts: logits.float().softmax(-1).gather(1, experts))


def no_router_gradient():
    return router(lambda _logits, weights, _experts: weights.detach())


def no_scale():
    return OnModel(lambda model: model.model.embed_tokens.embed_scale.fill_(1.0))


def no_norm(*names):
    """Without the norms over head_dim of queries or keys."""
    return on_layers(lambda layer: [setattr(layer.self_attn, name, torch.nn.Identity()) for name in names])


class OverAllHeads(torch.nn.Module):
    """A norm of [..., H, Hd] over all heads at once where it should be of each head."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        mean_square = x.square().mean(-1)  # of each head; what `norm` divides by and should not have
        return self.norm(x) * ((mean_square + 1e-6) / (mean_square.mean(-1, keepdim=True) + 1e-6)).sqrt()[..., None]


def norm_over_all_heads():
    return on_layers(lambda layer: setattr(layer.self_attn, "q_norm", OverAllHeads(layer.self_attn.q_norm)))


class StraightTanh(torch.autograd.Function):
    """tanh with the derivative 1."""

    @staticmethod
    def forward(ctx, x):
        return x.tanh()

    @staticmethod
    def backward(ctx, grad):
        return grad


def no_derivative_of_cap(dimensions):
    """Soft-caps c·tanh(x / c) of tensors with that many dimensions, differentiated as x: 4 are the scores, 3 the logits."""

    def edit(model):
        forward, tanh = model.forward, torch.tanh
        straight = lambda x: StraightTanh.apply(x) if x.dim() == dimensions else tanh(x)

        def run(*args, **kwargs):
            with mock.patch.object(torch, "tanh", straight):
                return forward(*args, **kwargs)

        model.forward = run

    return OnModel(edit)
