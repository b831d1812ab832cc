"""The sites of a decoder layer: what transformers computes there, and the gradient of the loss there.

`mlp` is the output of the module of that name and `mlp_out` what is added to the residual stream; the two differ where a
norm stands between (Gemma). Likewise `attn_out`. `mlp_hidden` is the input of down_proj, and of no mixture of experts.
"""

import torch

SITES = ("mlp_out", "mlp_hidden", "attn_out", "resid_pre", "resid_mid", "resid_post")  # besides `mlp`


def watch_sites(model, ids):
    """One sample of T tokens, no padding → ([site → (value [T, D or I], gradient of the summed nats)] per layer, nats [T−1])."""
    seen = [{} for _ in model.model.layers]
    handles = []

    def keep(site, layer):
        def hook(tensor):
            tensor.retain_grad()
            seen[layer][site] = tensor

        return hook

    def read_by(module, hook):
        handles.append(module.register_forward_pre_hook(lambda _module, inputs: hook(inputs[0])))

    def made_by(module, hook):
        handles.append(module.register_forward_hook(
            lambda _module, _inputs, out: hook(out[0] if isinstance(out, tuple) else out)
        ))  # fmt: skip

    for i, layer in enumerate(model.model.layers):
        post_norms = hasattr(layer, "post_feedforward_layernorm")
        read_by(layer, keep("resid_pre", i))
        made_by(layer.post_attention_layernorm if post_norms else layer.self_attn, keep("attn_out", i))
        # The layer adds this very tensor to the MLP's output, so its gradient is that of both branches.
        read_by(layer.pre_feedforward_layernorm if post_norms else layer.post_attention_layernorm, keep("resid_mid", i))
        if hasattr(layer.mlp, "down_proj"):
            read_by(layer.mlp.down_proj, keep("mlp_hidden", i))
        made_by(layer.mlp, keep("mlp", i))
        made_by(layer.post_feedforward_layernorm if post_norms else layer.mlp, keep("mlp_out", i))
        made_by(layer, keep("resid_post", i))
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    if logits.dtype == torch.bfloat16:
        logits = logits.float()  # as transformers does before its loss
    for handle in handles:
        handle.remove()
    nats = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
    if len(nats):
        nats.sum().backward()
    model.zero_grad(set_to_none=True)
    for sites in seen:
        check_sums(sites)
    pairs = [{s: (x.detach()[0].double(), None if x.grad is None else x.grad[0].double()) for s, x in sites.items()}
             for sites in seen]  # fmt: skip
    return pairs, nats.detach().double()


def check_sums(sites):
    """x + y hands its gradient to x and to y, so a sum and its new term have the same one: bit for bit, or a hook has
    caught a tensor that one branch alone reads."""
    for before, term, after in (("resid_pre", "attn_out", "resid_mid"), ("resid_mid", "mlp_out", "resid_post")):
        assert torch.equal(sites[before] + sites[term], sites[after]), (before, term, after)
        if sites[after].grad is not None:
            assert torch.equal(sites[term].grad, sites[after].grad), (term, after)
            assert not torch.equal(sites[before].grad, sites[after].grad), (before, after)


def watch(model, ids):
    """The same of `mlp` alone: [(value [T, D], gradient)] per layer, nats."""
    pairs, nats = watch_sites(model, ids)
    return [sites["mlp"] for sites in pairs], nats
