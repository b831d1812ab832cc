#!/usr/bin/env python3
"""Trains the demo's sparse autoencoders: for every layer of the demo model a BatchTopK SAE of 1,024 features on the output of `model.layers.i.mlp`.

    python assets/demo/make_saes.py                        # ten minutes of one core
    python assets/demo/make_saes.py --layers 2 --show 12   # one layer; where its strongest features fire

Files are those of the dictionary_learning library: `saes/mlp_out_layer_{i}/trainer_0/{ae.pt,config.json}`, class `BatchTopKSAE`,
in float16, and `saes/saes.json` with how good they are. Training text is what the model was trained on, evaluation the held-out
stories of corpus.jsonl. Every position counts, the first too: the model has no BOS and no sink at the first token. The median norm
of its output, layer by layer, is 22 8 9 9 12 25, and 17 6 5 7 12 27 over all tokens.

    f = relu(W_enc (x − b_dec) + b_enc), zero where it is not above the threshold        x̂ = W_dec f + b_dec

Letters: N tokens, D hidden size, F features.
"""
import argparse, json, platform, time
from pathlib import Path

import torch
import transformers

from make import HERE, SHAPE, load_model, load_tokenizer, story_splits, write_json

SEED = 20240612
F = 1024
TRAIN = dict(stories=6000, steps=2500, batch=1024, k=16, l1=0.05, lr=1e-3, warmup=100, decay=0.3, auxk_alpha=1 / 32, auxk=64, dead_after_tokens=100_000)
STORIES_PER_PASS = 64


# --- activations ---------------------------------------------------------------------------------------------------

def mlp_outputs(model, texts, layers):
    """→ {layer: float16 [N, D]} over all tokens of all texts in order of length, and the (text, position) of each token [N, 2]."""
    ids = [e.ids for e in load_tokenizer().encode_batch(texts)]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    kept, places, seen = {i: [] for i in layers}, [], {}
    hooks = [model.model.layers[i].mlp.register_forward_hook(lambda m, a, out, i=i: seen.__setitem__(i, out)) for i in layers]
    with torch.inference_mode():
        for at in range(0, len(order), STORIES_PER_PASS):
            group = order[at:at + STORIES_PER_PASS]
            width = max(len(ids[i]) for i in group)
            rows = torch.zeros(len(group), width, dtype=torch.long)  # padding on the right: no real token looks at it
            real = torch.zeros(len(group), width, dtype=torch.bool)
            for row, mask, i in zip(rows, real, group):
                row[:len(ids[i])] = torch.tensor(ids[i])
                mask[:len(ids[i])] = True
            model.model(input_ids=rows, use_cache=False)
            for i in layers:
                kept[i].append(seen[i][real].half())
            places += [(i, p) for i in group for p in range(len(ids[i]))]
    for hook in hooks:
        hook.remove()
    return {i: torch.cat(parts) for i, parts in kept.items()}, places, ids


# --- training ------------------------------------------------------------------------------------------------------

def train_sae(x, seed, log):
    """x: float16 [N, D] → the state of a BatchTopKSAE in float32, threshold not yet set."""
    D, k, batch, steps = x.shape[1], TRAIN["k"], TRAIN["batch"], TRAIN["steps"]
    gen = torch.Generator().manual_seed(seed)
    centre = x.float().mean(0)
    size = x.float().square().sum(1).mean().sqrt().item()  # trained on x/size, so that one learning rate serves all layers
    # Some tokens' outputs are ten times longer than most. Weights keep them from having most features to themselves, and the
    # small price on Σf, relative to the token's length, from being shared by dozens of features that mean something else.
    spread = (x.float() - centre).square().sum(1)
    weight = 2 / (1 + spread / spread.mean())
    share = size / (spread + 0.1 * spread.mean()).sqrt()
    W_dec = torch.nn.functional.normalize(torch.randn(D, F, generator=gen), dim=0)
    b_dec, W_enc, b_enc = centre / size, W_dec.clone(), torch.zeros(F)  # both matrices are [D, F] here
    parameters = [p.requires_grad_() for p in (W_enc, b_enc, W_dec, b_dec)]
    optimizer = torch.optim.Adam(parameters, lr=TRAIN["lr"], betas=(0.9, 0.999))
    silent = torch.zeros(F, dtype=torch.long)  # tokens since the feature fired
    begin, order = time.time(), torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(x), generator=gen)
        rows, order = order[:batch], order[batch:]
        target = x[rows].float() / size
        h = torch.relu((target - b_dec) @ W_enc + b_enc)
        least = torch.topk(h.detach().flatten(), k * batch, sorted=False).values.min()  # BatchTopK: k features a token, on average
        f = h * (h >= least)
        error = target - f @ W_dec.T - b_dec
        loss = (error.square().sum(1) * weight[rows]).mean() + TRAIN["l1"] * (f.sum(1) * share[rows]).mean()
        fired = (f.detach() > 0).any(0)
        silent = torch.where(fired, 0, silent + batch)
        dead = silent > TRAIN["dead_after_tokens"]
        if dead.any():  # silent features are trained to predict what the others leave over
            among = h[:, dead]
            value, index = among.topk(min(TRAIN["auxk"], among.shape[1]), sorted=False)
            guess = torch.zeros_like(among).scatter(1, index, value) @ W_dec.T[dead]
            rest = error.detach()
            loss = loss + TRAIN["auxk_alpha"] * (rest - guess).square().sum(1).mean() / (rest - rest.mean(0)).square().sum(1).mean()
        for group in optimizer.param_groups:
            group["lr"] = TRAIN["lr"] * min(1.0, (step + 1) / TRAIN["warmup"], (steps - step) / (TRAIN["decay"] * steps))
        loss.backward()
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(0) * W_dec  # along the unit sphere
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            W_dec /= W_dec.norm(dim=0)
        if (step + 1) % 500 == 0:
            log(f"  step {step + 1}: loss {loss.item():.4f}, dead {int(dead.sum())}, {(step + 1) * batch / (time.time() - begin):.0f} tokens/s", flush=True)
    W_enc, b_enc, W_dec, b_dec = (p.detach() for p in parameters)
    # Keys, shapes and their order as the library has them; the encoder is a transposed view there too.
    return {"b_dec": b_dec * size, "k": torch.tensor(k, dtype=torch.int), "threshold": torch.tensor(-1.0), "decoder.weight": W_dec,
            "encoder.weight": W_enc.T, "encoder.bias": b_enc * size}


def pre_activations(state, x):
    """relu(W_enc (x − b_dec) + b_enc) in float32 from whatever the state is stored in. [N, F]"""
    return torch.relu((x.float() - state["b_dec"].float()) @ state["encoder.weight"].float().T + state["encoder.bias"].float())


def set_threshold(state, x):
    """The threshold above which k features fire on a token of x, on average. The library keeps a running mean of each batch's
    least value instead; this is what that converges to, for the weights as they are stored."""
    h = pre_activations(state, x)
    state["threshold"] = torch.topk(h.flatten(), TRAIN["k"] * len(x), sorted=False).values.min().to(state["threshold"].dtype)


def evaluate(state, x):
    """→ FVU, L0, dead features, and each feature's rate and largest place, over x [N, D]."""
    W_dec, b_dec, threshold = (state[key].float() for key in ("decoder.weight", "b_dec", "threshold"))
    rest, fired, top, at = 0.0, torch.zeros(F), torch.zeros(F), torch.zeros(F, dtype=torch.long)
    for start in range(0, len(x), 4096):
        part = x[start:start + 4096].float()
        f = pre_activations(state, part)
        f = f * (f > threshold)
        rest += (part - f @ W_dec.T - b_dec).square().sum().item()
        fired += (f > 0).sum(0)
        value, index = f.max(0)
        at = torch.where(value > top, index + start, at)
        top = torch.maximum(top, value)
    variance = (x.float() - x.float().mean(0)).square().sum().item()
    return dict(fvu=round(rest / variance, 4), l0=round(fired.sum().item() / len(x), 2), dead=int((fired == 0).sum())), fired / len(x), top, at


# --- files ---------------------------------------------------------------------------------------------------------

def config(layer):
    """config.json with the keys of the library's trainer that a reader looks at."""
    return dict(
        trainer=dict(trainer_class="BatchTopKTrainer", dict_class="BatchTopKSAE", lr=TRAIN["lr"], steps=TRAIN["steps"], auxk_alpha=TRAIN["auxk_alpha"],
                     warmup_steps=TRAIN["warmup"], seed=SEED, activation_dim=SHAPE["hidden_size"], dict_size=F, k=TRAIN["k"], device="cpu", layer=layer,
                     lm_name="gradlens demo", wandb_name="BatchTopKSAE", submodule_name=f"mlp_out_layer_{layer}"),
        buffer=dict(d_submodule=SHAPE["hidden_size"], io="out", ctx_len=SHAPE["max_position_embeddings"], out_batch_size=TRAIN["batch"], device="cpu"))


def show(state, x, places, ids, count):
    """Prints a few features with the five places where they are largest, the token in brackets."""
    tok = load_tokenizer()
    h = pre_activations(state, x)
    f = h * (h > state["threshold"].float())
    rate = (f > 0).float().mean(0)
    for j in (f.square().mean(0) * (rate < 0.05)).topk(count).indices.tolist():
        print(f"  feature {j}, fires on {rate[j]:.2%}")
        shown = set()
        for n in f[:, j].topk(200).indices.tolist():
            text, p = places[n]
            if text in shown or len(shown) == 5:
                continue
            shown.add(text)
            words = ids[text]
            piece = lambda part: tok.decode(part)
            print(f"    {f[n, j]:6.2f}  …{piece(words[max(p - 10, 0):p])}[{piece(words[p:p + 1])}]{piece(words[p + 1:p + 4])}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "saes")
    parser.add_argument("--layers", type=int, nargs="+", default=list(range(SHAPE["num_hidden_layers"])))
    parser.add_argument("--show", type=int, default=0, help="print so many features of each layer and where they fire")
    args = parser.parse_args()
    torch.set_num_threads(1)

    model = load_model()
    train_texts, _ = story_splits(json.loads((HERE / "training.json").read_text())["seed"])
    held_texts = [json.loads(line)["text"] for line in (HERE / "corpus.jsonl").read_text().splitlines()]
    begin = time.time()
    train, _, _ = mlp_outputs(model, train_texts[:TRAIN["stories"]], args.layers)
    held, places, ids = mlp_outputs(model, held_texts, args.layers)
    tokens = len(train[args.layers[0]])
    print(f"{tokens} training and {len(places)} held-out tokens, {time.time() - begin:.0f} s", flush=True)
    record = {}
    for layer in args.layers:
        print(f"layer {layer}", flush=True)
        state = train_sae(train[layer], SEED + layer, print)
        state = {key: v.half() if v.is_floating_point() else v for key, v in state.items()}
        set_threshold(state, train[layer][::max(tokens // 32768, 1)])
        folder = args.out / f"mlp_out_layer_{layer}" / "trainer_0"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, folder / "ae.pt")
        write_json(folder / "config.json", config(layer))
        record[layer], *_ = evaluate(state, held[layer])
        record[layer]["threshold"] = round(state["threshold"].item(), 4)
        print(f"  {record[layer]}", flush=True)
        if args.show:
            show(state, held[layer], places, ids, args.show)
    if set(args.layers) == set(range(SHAPE["num_hidden_layers"])):
        write_json(args.out / "saes.json", dict(
            held_out=record, held_out_tokens=len(places), features=F, seed=SEED, dtype="float16", training=dict(TRAIN, tokens=TRAIN["steps"] * TRAIN["batch"],
            distinct_tokens=tokens, threads=1, cpu_seconds=round(time.process_time())),
            versions=dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__)))


if __name__ == "__main__":
    main()
