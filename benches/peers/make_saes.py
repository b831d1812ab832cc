#!/usr/bin/env python3
"""Writes random BatchTopK SAEs of the dictionary_learning layout for a checkpoint of make_checkpoint.py.

    python make_saes.py FOLDER [--layers 11,23] [--features 65536] [--l0 80] [--dtype float32]

FOLDER/mlp_out_layer_{i}/trainer_0/{ae.pt,config.json}. Rows of W_dec are random of norm 1, W_enc is their transpose as in the library
before training, stored as the transposed view that it is there. b_dec is the mean of the checkpoint's own MLP outputs over a few
texts and the threshold such that `--l0` features fire on their tokens on average: so sparse is what a trained SAE gives.
Float32 with 65,536 features of 896: 470 MB a layer.
"""
import argparse, json
from pathlib import Path

import torch

from common import load_batches, load_model


def mlp_outputs(args, layers):
    """→ {layer: [N, D]} over the first texts of corpus.jsonl."""
    args.dataset, args.samples, args.max_length, args.batch_size = None, args.texts, 128, 4
    model, kept = load_model(args), {i: [] for i in layers}
    for i in layers:
        model.model.layers[i].mlp.register_forward_hook(lambda m, a, out, i=i: kept[i].append(out.reshape(-1, out.shape[-1]).clone()))
    with torch.inference_mode():
        for rows in load_batches(args):
            model.model(input_ids=torch.tensor(rows), use_cache=False)
    return {i: torch.cat(parts) for i, parts in kept.items()}


def random_sae(x, features, l0, generator):
    """x [N, D] → state of a BatchTopKSAE in float32, and the L0 that it has on x."""
    W_dec = torch.randn(x.shape[1], features, generator=generator)
    W_dec /= W_dec.norm(dim=0)
    b_dec = x.mean(0)
    bias = 0.1 * (x - b_dec).norm(dim=1).mean() / x.shape[1] ** 0.5 * torch.randn(features, generator=generator)
    state = {"b_dec": b_dec, "k": torch.tensor(l0, dtype=torch.int), "threshold": torch.tensor(-1.0), "decoder.weight": W_dec,
             "encoder.weight": W_dec.clone().T, "encoder.bias": bias}
    h = torch.addmm(bias, x - b_dec, W_dec)
    state["threshold"] = h.flatten().topk(l0 * len(x) + 1).values[-2:].mean()  # between two values, on none
    assert state["threshold"] > 0
    return state, (h > state["threshold"]).sum().item() / len(x)


def write(folder, layer, state, dtype):
    folder = folder / f"mlp_out_layer_{layer}" / "trainer_0"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}, folder / "ae.pt")
    width, features = state["decoder.weight"].shape
    (folder / "config.json").write_text(json.dumps(dict(
        trainer=dict(trainer_class="BatchTopKTrainer", dict_class="BatchTopKSAE", activation_dim=width, dict_size=features, k=state["k"].item(),
                     device="cpu", layer=layer, lm_name=str(folder.parent.parent.name), submodule_name=f"mlp_out_layer_{layer}"),
        buffer=dict(d_submodule=width, io="out", ctx_len=128)), indent=4) + "\n")
    return folder


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="checkpoint folder; the SAEs go into it")
    p.add_argument("--layers", default="11,23")
    p.add_argument("--features", type=int, default=65536)
    p.add_argument("--l0", type=int, default=80)
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    p.add_argument("--texts", type=int, default=4, help="texts whose activations set b_dec and the threshold")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    args.model_name = args.folder
    layers = [int(i) for i in args.layers.split(",")]
    generator = torch.Generator().manual_seed(args.seed)
    for layer, x in mlp_outputs(args, layers).items():
        state, l0 = random_sae(x, args.features, args.l0, generator)
        folder = write(args.folder, layer, state, getattr(torch, args.dtype))
        print(f"{folder}: {args.features} features, threshold {state['threshold']:.4f}, L0 {l0:.1f} on {len(x)} tokens", flush=True)


if __name__ == "__main__":
    main()
