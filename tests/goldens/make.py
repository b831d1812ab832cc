"""Rebuild every golden in this folder: `python tests/goldens/make.py`.

Each golden is a tiny seeded model written as a hub checkpoint folder, and the numbers that Hugging Face
transformers (eager attention, float64) gives for it. README.md beside this file has the layout. The models are in
llamas.py and newer.py, their texts and tokenizers in texts.py, what is watched in sites.py, wrong readings in flips.py.

    python tests/goldens/make.py                            everything
    python tests/goldens/make.py --only qwen2 yi            some goldens
    python tests/goldens/make.py --transformers_4 PYTHON    also the token ids of transformers 4 (an interpreter that
                                                            has it; without the flag the stored ones are kept)

Letters: N tokens, T tokens of one sample, D hidden size, V vocabulary, L layers. Losses in nats.
"""

import argparse
import copy
import json
import math
import platform
import subprocess
import sys
from pathlib import Path

import safetensors
import safetensors.torch
import tokenizers
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import llamas
import newer
from flips import OnModel
from sites import SITES, watch_sites
from texts import (
    INNER_SPECIAL,
    LEADING_SPACE,
    PREPEND_REPLACE,
    TEXTS,
    llama3_tokenizer,
    llama_tokenizer_config,
    sentencepiece,
)

HERE = Path(__file__).resolve().parent
GOLDENS = llamas.GOLDENS | newer.GOLDENS
BATCH_SIZE = 4
MOVES = 1e-2  # a flipped config value must move some number by more than this, relative
CONTROL = 1e-5  # float32 must agree with float64 to this, or a tolerance of 1e-4 in Rust would mean nothing
MARGIN = 1e-3  # the least of a token's experts must be this much likelier than the first that it does not get
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# ------------------------------------------------------------------------------------------- weights


def random_weights(config, seed, shape_more=None):
    """Weights large enough that every config value matters: small embeddings (so eps bites in the first norm),
    sharp attention, norms and biases away from 1 and 0. `shape_more(name, w)` has the last word on each."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in AutoModelForCausalLM.from_config(config).state_dict().items():
        shape = tuple(shape.shape)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # not stored, as on the hub
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name == "model.embed_tokens.weight":
            w = noise * 0.01
        elif name == "model.norm.weight" and config.tie_word_embeddings:
            w = 30.0 * (1 + 0.3 * noise)  # small tied embeddings need a loud final norm
        elif "norm" in name:
            w = 1 + 0.3 * noise
        elif name.endswith("bias"):
            w = 0.4 * noise
        elif "q_proj" in name or "k_proj" in name:
            w = noise * 1.6 / math.sqrt(shape[1])
        elif "lm_head" in name:
            w = noise * 2.0 / math.sqrt(shape[1])
        else:
            w = noise * 1.2 / math.sqrt(shape[1])
        if shape_more:
            w = shape_more(name, w)
        weights[name] = w.to(DTYPES[config_dtype(config)])
    return weights


def config_dtype(config):
    return str(config.dtype).removeprefix("torch.")


# ----------------------------------------------------------------------------------------- the expected numbers


def build(config_json, weights, dtype, edit=None):
    config = AutoConfig.for_model(**copy.deepcopy(config_json))
    weights = {n: w.to(dtype) for n, w in weights.items()}
    if edit and not isinstance(edit, OnModel):
        edit(weights, config)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **eager(config_json)).to(dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    assert not unexpected and missing in ([], tied), (missing, unexpected)
    if isinstance(edit, OnModel):
        edit.edit(model)
    return model.eval()


def eager(config_json):
    """The plain implementations of what transformers has several of."""
    experts = {"experts_implementation": "eager"} if "num_local_experts" in config_json else {}
    return {"attn_implementation": "eager"} | experts


def load(folder, dtype):
    config_json = json.loads((folder / "config.json").read_text())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **eager(config_json)).eval()


def expected_numbers(model, samples):
    """samples: list of id tensors → name → float64 tensor, as README.md lists them."""
    layers = model.config.num_hidden_layers
    values = [[] for _ in range(layers)]
    gradients = {r: [[] for _ in range(layers)] for r in ("sample", "batch", "token")}
    elsewhere = [{} for _ in range(layers)]  # site → (its values, its gradients by reduction `sample`)
    sample_nats = []
    for s, ids in enumerate(samples):
        group = samples[s // BATCH_SIZE * BATCH_SIZE :][:BATCH_SIZE]
        targets_of_batch = sum(max(len(g) - 1, 0) for g in group)
        seen, nats = watch_sites(model, ids)
        sample_nats.append(nats.sum())
        for i, sites in enumerate(seen):
            x, g = sites.pop("mlp")
            values[i].append(x)
            for site, (at, its_gradient) in sites.items():
                both = elsewhere[i].setdefault(site, ([], []))
                both[0].append(at)
                if len(ids) >= 2:
                    both[1].append(its_gradient / (len(ids) - 1))
            if len(ids) >= 2:
                gradients["token"][i].append(g)
                gradients["sample"][i].append(g / (len(ids) - 1))
                gradients["batch"][i].append(g / targets_of_batch)
    out = {}
    for i in range(layers):
        x = torch.cat(values[i])
        out[f"layer_{i}.values.mean"] = x.mean(0)
        out[f"layer_{i}.values.mean_abs"] = x.abs().mean(0)
        out[f"layer_{i}.values.sum_sq"] = x.square().sum(0)
        out[f"layer_{i}.values.max_abs"] = x.abs().amax(0)
        for reduction, per_layer in gradients.items():
            g = torch.cat(per_layer[i])
            out[f"layer_{i}.gradients_{reduction}.mean"] = g.mean(0)
            out[f"layer_{i}.gradients_{reduction}.mean_abs"] = g.abs().mean(0)
            out[f"layer_{i}.gradients_{reduction}.max_abs"] = g.abs().amax(0)
        for site in [site for site in SITES if site in elsewhere[i]]:
            for key, parts in zip(("values", "gradients_sample"), elsewhere[i][site], strict=True):
                x = torch.cat(parts)
                out[f"layer_{i}.{site}.{key}.mean"] = x.mean(0)
                out[f"layer_{i}.{site}.{key}.mean_abs"] = x.abs().mean(0)
                out[f"layer_{i}.{site}.{key}.max_abs"] = x.abs().amax(0)
    out["sample_nats"] = torch.stack(sample_nats)
    out["loss_nats"] = torch.tensor([float(out["sample_nats"].sum()), sum(len(s) - 1 for s in samples)]).double()
    return out


def distance(found, expected):
    """Largest |found − expected| over the largest |expected|, per tensor; a signed mean is measured against mean_abs,
    since its own size is what cancellation left of it. → (worst, its name)"""
    worst = (0.0, "")
    for name, want in expected.items():
        scale = expected.get(name + "_abs", want).abs().max()
        worst = max(worst, (float((found[name] - want).abs().max() / scale), name))
    return worst


def check_flips(golden, weights, samples, expected):
    assert distance(expected_numbers(build(golden["config"], weights, torch.float64), samples), expected)[0] == 0.0
    moved = {}
    for name, flip in golden["flips"].items():
        config, edit = (golden["config"] | flip, None) if isinstance(flip, dict) else (golden["config"], flip)
        found = expected_numbers(build(config, weights, torch.float64, edit), samples)
        moved[name] = distance(found, expected)[0]
        print(f"    {name:<26} moves {moved[name]:.3f}")
        assert moved[name] > MOVES, f"{name} moves the golden by {moved[name]:.2e} only"
    return moved


# --------------------------------------------------------------------------------------------------- routing


def routes(model, samples):
    """[(probabilities [N, E], experts of each token, sorted [N, k])] per layer."""
    logits = [[] for _ in model.model.layers]
    handles = [
        layer.mlp.gate.register_forward_hook(lambda _module, _inputs, out, i=i: logits[i].append(out[0]))
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for ids in samples:
            model(input_ids=ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    k = model.config.num_experts_per_tok
    out = [torch.cat(rows).float().softmax(-1) for rows in logits]
    return [(p, p.topk(k).indices.sort().values) for p in out]


def check_routing(golden, folder, weights, samples):
    """Experts unevenly loaded, one of one layer without a token, and no choice so close that float32 may go elsewhere."""
    exact = routes(load(folder, torch.float64), samples)
    single = routes(build(golden["config"], weights, torch.float32), samples)
    half = routes(load(folder, torch.bfloat16), samples)
    experts, k = golden["config"]["num_local_experts"], golden["config"]["num_experts_per_tok"]
    loads = [experts_of.flatten().bincount(minlength=experts).tolist() for _, experts_of in exact]
    ordered = [p.sort(descending=True).values for p, _ in exact]
    margin = min(float((p[:, k - 1] - p[:, k]).min()) for p in ordered)
    elsewhere = [int((a != b).any(1).sum()) for (_, a), (_, b) in zip(exact, half, strict=True)]
    print(f"    tokens of each expert {loads}, least margin {margin:.1e}, other experts in bfloat16 {elsewhere}")
    layer, expert = golden["moe"]["empty"]
    assert loads[layer][expert] == 0 and sum(n == 0 for per_layer in loads for n in per_layer) == 1, loads
    assert all(max(n) > 1.5 * min(m for m in n if m) for n in loads), loads
    assert margin > MARGIN, margin
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(exact, single, strict=True))
    return {
        "tokens_of_experts": loads, "least_margin": float(f"{margin:.2g}"), "tokens_with_others_in_bfloat16": elsewhere,
    }  # fmt: skip


# -------------------------------------------------------------------------------- how far off bfloat16 is elsewhere


def make_bfloat16(name):
    """Relative L2 error of each array when transformers computes the golden in bfloat16: the measure of other engines."""
    folder = HERE / name
    expected = safetensors.torch.load_file(folder / "expected.safetensors")
    ids, ends = expected["ids"], expected["cu_seqlens"].tolist()
    samples = [ids[start:end] for start, end in zip(ends, ends[1:], strict=False)]
    found = expected_numbers(load(folder, torch.bfloat16), samples)
    errors = {k: float((v - expected[k]).norm() / expected[k].norm()) for k, v in found.items() if k.startswith("layer_")}
    write_json(folder / "bfloat16.json", {k: float(f"{v:.4g}") for k, v in errors.items()})
    print(f"{name}: bfloat16 against float64: {min(errors.values()):.1e} to {max(errors.values()):.1e}")


# ---------------------------------------------------------------------------------------- the scripts' algorithm


def scripts_numbers(folder, texts, max_length):
    """What the two Python scripts do: float32, one forward and backward per layer and batch, mean over batch means."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = [tokenizer(t, truncation=True, max_length=max_length)["input_ids"] for t in texts]
    assert len(ids) % BATCH_SIZE == 0 and all(len(s) == max_length for s in ids), [len(s) for s in ids]
    batches = torch.tensor(ids).split(BATCH_SIZE)
    out = {}
    for i, layer in enumerate(model.model.layers):
        means = {(what, agg): [] for what in ("values", "gradients") for agg in ("mean", "mean_abs")}
        for batch in batches:
            leaf = []

            def replace(_module, _inputs, output):
                leaf.append(output.detach().clone().requires_grad_(True))
                return leaf[0]

            handle = layer.mlp.register_forward_hook(replace)
            model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss.backward()
            handle.remove()
            model.zero_grad(set_to_none=True)
            for what, x in (("values", leaf[0].detach()), ("gradients", leaf[0].grad)):
                rows = x.flatten(0, 1)  # [N, D]; every position is valid
                means[what, "mean"].append(rows.mean(0))
                means[what, "mean_abs"].append(rows.abs().mean(0))
        for (what, agg), per_batch in means.items():
            v = torch.stack(per_batch).mean(0)
            out[f"layer_{i}.{what}.{agg}"] = v
            out[f"layer_{i}.{what}.{agg}.norm_sum_abs"] = v * len(v) / v.abs().sum()
    return out, [torch.tensor(s) for s in ids]


def write_scripts_golden(folder, golden, weights):
    texts, max_length = [t for t in TEXTS if len(t) > 80][:8], 24
    assert len(texts) == 8
    out, samples = scripts_numbers(folder, texts, max_length)
    # The program's way (one pass for all layers, `--loss_reduction batch`) must give the same numbers.
    ours = expected_numbers(build(golden["config"], weights, torch.float64), samples)
    wanted, found = {}, {}
    for i in range(golden["config"]["num_hidden_layers"]):
        for what, key in (("values", "values"), ("gradients", "gradients_batch")):
            for agg in ("mean", "mean_abs"):
                wanted[f"layer_{i}.{what}.{agg}"] = ours[f"layer_{i}.{key}.{agg}"]
                found[f"layer_{i}.{what}.{agg}"] = out[f"layer_{i}.{what}.{agg}"].double()
    worst = distance(found, wanted)
    print(f"    scripts' algorithm against one float64 pass: {worst[0]:.1e} ({worst[1]})")
    assert worst[0] < CONTROL, worst
    write_jsonl(folder / "full.jsonl", texts)
    out |= {"ids": torch.stack(samples)}
    write_tensors(folder / "expected_scripts.safetensors", out)
    return {"corpus": "full.jsonl", "max_length": max_length, "num_samples": len(texts), "batch_size": BATCH_SIZE}


# ----------------------------------------------------------------------------------------------------- files


def write_tensors(path, tensors):
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    path.chmod(0o644)  # the library leaves 0600


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def write_jsonl(path, texts):
    lines = [json.dumps({"text": t}, ensure_ascii=False) for t in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_tokenizer(folder, tokenizer, tokenizer_config):
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", tokenizer_config)


def write_weights(folder, weights, shards):
    if shards == 1:
        write_tensors(folder / "model.safetensors", weights)
        return
    size = {n: w.numel() * w.element_size() for n, w in weights.items()}
    total, filled, files = sum(size.values()), 0, [{} for _ in range(shards)]
    for name, w in weights.items():
        files[min(filled * shards // total, shards - 1)][name] = w
        filled += size[name]
    weight_map = {}
    for k, part in enumerate(files, start=1):
        file = f"model-{k:05}-of-{shards:05}.safetensors"
        write_tensors(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def tokenize(folder, texts, max_length):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(t, truncation=True, max_length=max_length)["input_ids"] for t in texts], tokenizer


def make_golden(name):
    print(name)
    golden, folder = GOLDENS[name](), HERE / name
    config = AutoConfig.for_model(**copy.deepcopy(golden["config"]))
    weights = random_weights(config, golden["seed"], golden.get("shape"))
    write_tokenizer(folder, golden["tokenizer"], golden["tokenizer_config"])
    write_json(folder / "config.json", golden["config"])
    write_weights(folder, golden.get("store", dict)(weights), golden["shards"])
    write_jsonl(folder / "corpus.jsonl", golden["texts"])

    max_length = golden["max_length"]
    ids, tokenizer = tokenize(folder, golden["texts"], max_length)
    whole = tokenize(folder, golden["texts"], 10**6)[0]
    lengths = [len(s) for s in ids]
    one_token = [s for s, n in enumerate(lengths) if n == 1]
    truncated = [s for s, (a, b) in enumerate(zip(ids, whole, strict=True)) if len(a) < len(b)]
    window = golden["config"].get("sliding_window") or 0
    print(f"    {type(tokenizer).__name__}, lengths {lengths}")
    assert len(one_token) == 1 and truncated and min(n for n in lengths if n > 1) > window
    assert len(set(lengths)) > 3, "lengths should be ragged"
    assert max(max(s) for s in ids) < golden["config"]["vocab_size"]

    samples = [torch.tensor(s) for s in ids]
    model = load(folder, torch.float64)
    expected = expected_numbers(model, samples)
    single = expected_numbers(build(golden["config"], weights, torch.float32), samples)
    control = distance(single, expected)
    print(f"    float32 against float64: {control[0]:.1e} ({control[1]})")
    assert control[0] < CONTROL, control
    moved = check_flips(golden, weights, samples, expected)

    tensors = expected | {
        "ids": torch.cat(samples),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
    }
    write_tensors(folder / "expected.safetensors", tensors)
    about = {
        "max_length": max_length, "batch_size": BATCH_SIZE, "num_samples": len(ids), "lengths": lengths,
        "one_token_samples": one_token, "truncated_samples": truncated, "values_count": sum(lengths),
        "gradients_count": sum(n for n in lengths if n > 1), "tokenizer_class_used": type(tokenizer).__name__,
        "float32_against_float64": float(f"{control[0]:.1e}"), "flips_move": {k: round(v, 3) for k, v in moved.items()},
    }  # fmt: skip
    if "moe" in golden:
        about["routing"] = check_routing(golden, folder, weights, samples)
    if name == "qwen2":
        about["scripts"] = write_scripts_golden(folder, golden, weights)
    write_json(folder / "expected.json", about)
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"    {size / 1024:.0f} KiB")
    assert size < 370 * 1024


# ----------------------------------------------------------------------- tokenizer cases: where versions differ


def tokenizer_cases():
    """name → (model_type, tokenizer.json, tokenizer_config.json, max_length). README.md tells what each is for."""
    sp = sentencepiece(410)
    no_prefix = copy.deepcopy(sp) | {"normalizer": PREPEND_REPLACE["normalizers"][1]}
    stored_left = copy.deepcopy(sp)
    stored_left["truncation"] = {"direction": "Left", "max_length": 19, "strategy": "LongestFirst", "stride": 0}
    llama = llama_tokenizer_config
    fast = llama(sp, tokenizer_class="PreTrainedTokenizerFast")
    bytes_bos = llama3_tokenizer()
    bos, eos = (t["content"] for t in bytes_bos["added_tokens"][:2])
    bytes_config = {
        "bos_token": bos, "eos_token": eos, "tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True,
        "add_eos_token": False, "unk_token": None, "legacy": True,
    }  # fmt: skip
    return {
        "llama_bos_on": ("llama", sp, llama(sp, add_bos_token=True, add_eos_token=False, legacy=False), 24),
        "llama_bos_off": ("llama", sp, llama(sp, add_bos_token=False, add_eos_token=False), 24),
        "llama_eos_on": ("llama", sp, llama(sp, add_bos_token=True, add_eos_token=True), 24),
        "llama_no_post": ("llama", sp | {"post_processor": None}, llama(sp), 24),
        "llama_legacy": ("llama", sp, llama(sp, add_bos_token=True, legacy=True), 24),
        "llama_no_prefix": ("llama", no_prefix, llama(sp, add_bos_token=False), 24),
        "llama_byte_level": ("llama", bytes_bos, bytes_config, 24),
        "fast_bos_off": ("llama", sp, fast | {"add_bos_token": False}, 24),
        "mistral_bos_off": ("mistral", sp, llama(sp, add_bos_token=False), 24),
        "mistral_left": ("mistral", sp, llama(sp, add_bos_token=True, truncation_side="left"), 24),
        "mistral_stored_left": ("mistral", stored_left, llama(sp, add_bos_token=True), 24),
        "qwen2_llama_class": ("qwen2", bytes_bos, bytes_config, 24),
    }


def make_tokenizer_cases():
    for name, (model_type, tokenizer, tokenizer_config, max_length) in tokenizer_cases().items():
        folder = HERE / "tokenizers" / name
        write_tokenizer(folder, tokenizer, tokenizer_config)
        write_json(folder / "config.json", {"model_type": model_type})
        bos, eos = tokenizer_config["bos_token"], tokenizer_config["eos_token"]
        inner = INNER_SPECIAL.format(bos=bos, eos=eos)
        texts = [TEXTS[0][:40], LEADING_SPACE, inner, TEXTS[1][:50], TEXTS[4], "", " ", "  two"]
        ids, used = tokenize(folder, texts, max_length)
        old = json.loads((folder / "ids.json").read_text()) if (folder / "ids.json").exists() else {}
        about = {"max_length": max_length, "texts": texts, "class_used": type(used).__name__, "transformers_5": ids}
        unchanged = all(old.get(k) == about[k] for k in ("texts", "max_length", "transformers_5"))
        about["transformers_4"] = old.get("transformers_4") if unchanged else None  # stale ids are worse than none
        write_json_flat(folder / "ids.json", about)


def write_json_flat(path, value):
    """One line per key: lists of ids stay readable."""
    lines = [f" {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in value.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


OLD_IDS = """
import json, sys
from transformers import AutoTokenizer, __version__
out = {"version": __version__, "ids": []}
for folder, texts, max_length in json.load(sys.stdin):
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        out["ids"].append([tokenizer(t, truncation=True, max_length=max_length)["input_ids"] for t in texts])
    except Exception as e:
        print(folder.split("/")[-1], type(e).__name__, str(e)[:200], file=sys.stderr)
        out["ids"].append(None)
print(json.dumps(out))
"""


def ask_transformers_4(python):
    """Fills ids.json of the tokenizer cases, and compares the goldens: the two versions must agree on those."""
    cases = []
    for folder in sorted((HERE / "tokenizers").iterdir()):
        about = json.loads((folder / "ids.json").read_text())
        cases.append((folder, about["texts"], about["max_length"], about))
    for name in GOLDENS:
        about = json.loads((HERE / name / "expected.json").read_text())
        cases.append((HERE / name, GOLDENS[name]()["texts"], about["max_length"], about))
    asked = json.dumps([(str(f), t, m) for f, t, m, _ in cases])
    answer = subprocess.run([python, "-c", OLD_IDS], input=asked, capture_output=True, text=True, check=True)
    print(answer.stderr)
    old = json.loads(answer.stdout)
    for (folder, texts, max_length, about), ids in zip(cases, old["ids"], strict=True):
        if folder.parent.name == "tokenizers":
            about["transformers_4"] = ids
            write_json_flat(folder / "ids.json", about)
            same = [a == b for a, b in zip(ids or [], about["transformers_5"], strict=False)]
            print(f"{folder.name:<22} texts on which 4 and 5 agree: {same}")
        elif ids is not None:  # 4.x cannot load a tokenizer_class of 5.x
            assert ids == tokenize(folder, texts, max_length)[0], f"{folder.name}: {old['version']} gives other ids"
    return old["version"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*GOLDENS, "tokenizers"], default=[*GOLDENS, "tokenizers"])
    parser.add_argument("--transformers_4", metavar="PYTHON")
    parser.add_argument("--bfloat16", action="store_true", help="make bfloat16.json of the goldens that are there, and stop")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.bfloat16:
        for name in GOLDENS:
            make_bfloat16(name)
        return
    path = HERE / "versions.json"
    versions = json.loads(path.read_text()) if path.exists() else {}
    versions |= {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__, "safetensors": safetensors.__version__,
    }  # fmt: skip
    for name in args.only:
        if name != "tokenizers":
            make_golden(name)
            make_bfloat16(name)
    if "tokenizers" in args.only:
        make_tokenizer_cases()
    if args.transformers_4:
        versions["transformers_4"] = ask_transformers_4(args.transformers_4)
    write_json(path, versions)
    print(json.dumps(versions, indent=1))


if __name__ == "__main__":
    sys.exit(main())

