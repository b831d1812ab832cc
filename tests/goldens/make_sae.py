"""Rebuild the goldens of sparse autoencoders: `python tests/goldens/make_sae.py`.

Each case is a tiny SAE for two layers of the golden `qwen2`, saved by its library's own code, and the numbers that the
library gives for it in float64 on that golden's samples. README.md beside this file has the layout.

    python tests/goldens/make_sae.py                     everything
    python tests/goldens/make_sae.py --only dl_gated     some cases

Needs what make.py needs and dictionary-learning, eai-sparsify, sae-lens.
Letters: N tokens, T tokens of one sample, D hidden size, F features. x is the MLP output, f = encode(x), x̂ = decode(f).
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import shutil
import sys
import warnings
import zlib

import numpy as np
import safetensors.torch
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its sparse decoder runs on a GPU only
from make import BATCH_SIZE, CONTROL, HERE, MOVES, distance, write_json, write_tensors  # noqa: E402
from sites import watch  # noqa: E402

ROOT = HERE / "sae"
MODEL = "qwen2"
LAYERS = (1, 3)
MARGIN = 1e-5  # of the largest |h|: no decision of an encoder is closer than this
FIRES = (0.05, 0.30)  # share of (token, feature) pairs
STRIDE = 3  # of the case that has `stride_3`
SCRIPTS_STRIDE = 4


# ------------------------------------------------------------------------------------------------- random SAEs


def random_sae(x, features, seed, shift=0.0):
    """Weights that make sense for inputs x [N, D]: z = (x − b_dec) W_encᵀ of size 1, decoder rows near the encoder's but
    of norms between 0.5 and 2, no bias near zero. `shift` moves all encoder biases, so how many features fire."""
    gen = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)  # noqa: E731
    size, width = x.std(), x.shape[1]
    W_enc = normal(features, width)
    near = W_enc / W_enc.norm(dim=1, keepdim=True) + 0.4 * normal(features, width) / width**0.5
    threshold = 0.8 + 0.6 * torch.rand(features, generator=gen, dtype=torch.float64)
    threshold[::10] = -0.3  # such a feature is a plain ReLU: f is never negative
    norms = 0.5 + 1.5 * torch.rand(features, 1, generator=gen, dtype=torch.float64)
    return {
        "W_enc": W_enc / (width**0.5 * size),
        "b_enc": 0.4 * normal(features) + shift,
        "W_dec": 0.4 * size * norms * near,
        "b_dec": x.mean(0) + 0.4 * size * normal(width),
        "threshold": threshold,
        "r_mag": 0.4 * normal(features),
        "gate": 0.4 * normal(features) - 1.0,
    }  # fmt: skip


def fill(module, values):
    """Sets parameters and buffers in place: a transposed view stays one."""
    state = module.state_dict()
    with torch.no_grad():
        for name, value in values.items():
            assert state[name].shape == value.shape, (name, state[name].shape, value.shape)
            state[name].copy_(value)


# -------------------------------------------------------------------------- one interface over the libraries


class Coder:
    """A library's module. h(x) is what its decisions are made on, as the library's own code has it."""

    def __init__(self, module, h, gap, encode=None, decode=None):
        self.module, self.h, self.gap = module, h, gap
        self.encode = encode or module.encode
        self.decode_features = decode or module.decode

    def decode(self, x, f):
        """The normalising SAEs of SAELens keep the token's norm from encode to decode, once."""
        with torch.no_grad():
            self.encode(x)
        return self.decode_features(f)


# How far each decision is from going the other way: h [N, F] → any shape.


def gap_relu(h):
    return h.abs()


def gap_threshold(theta):
    return lambda h: (h - theta.clamp(min=0)).abs()


def gap_gated(r_mag, mag_bias, gate_bias):
    """h is the magnitude's; both it and the gate's must be positive."""
    return lambda h: torch.minimum(h, (h - mag_bias) / r_mag.exp() + gate_bias).abs()


def gap_topk(k):
    """Where at least k are positive, the k-th against the next; else every h against 0."""

    def gap(h):
        top = h.topk(k + 1, dim=-1).values
        full = top[:, k - 1] > 0
        return torch.where(full, top[:, k - 1] - top[:, k], h.abs().amin(-1))

    return gap


def gap_groupmax(k):
    def gap(h):
        top = h.unflatten(-1, (k, -1)).topk(2, dim=-1).values
        return torch.where(top[..., 0] > 0, torch.minimum(top[..., 0] - top[..., 1], top[..., 0]), -top[..., 0])

    return gap


def dense(module):
    """sparsify's (values, indices) as f [N, F], and the decoder of such an f: it is asked for all features in order."""
    features = module.num_latents

    def encode(x):
        values, indices, _ = module.encode(x)
        return torch.zeros(len(x), features, dtype=x.dtype).scatter(1, indices, values)

    def decode(f):
        return module.decode(f, torch.arange(features).expand(len(f), features))

    return encode, decode


# ----------------------------------------------------------------------------------------------------- numbers


class Subject:
    """The golden's model in one precision with its samples, and x and dL/dx of the plain model at each layer, the loss of
    a sample being the mean over its own targets."""

    def __init__(self, dtype):
        folder = HERE / MODEL
        expected = safetensors.torch.load_file(folder / "expected.safetensors")
        ids, ends = expected["ids"], expected["cu_seqlens"].tolist()
        self.dtype = dtype
        self.samples = [ids[a:b] for a, b in zip(ends, ends[1:], strict=False)]
        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").to(dtype).eval()
        seen = [watch(self.model, s)[0] for s in self.samples]
        self.x = {i: [layers[i][0].to(dtype) for layers in seen] for i in LAYERS}
        self.g = {
            i: [layers[i][1].to(dtype) / (len(s) - 1) if len(s) > 1 else None for layers, s in zip(seen, self.samples, strict=True)]
            for i in LAYERS
        }

    def all(self, layer):
        return torch.cat(self.x[layer])


def feature_gradient(coder, x, f, upstream):
    leaf = f.detach().requires_grad_()
    coder.decode(x, leaf).backward(upstream)
    return leaf.grad


def spliced(subject, coder, layer, ids, stride):
    """x̂ in place of the layer's MLP output at every stride-th position → (f, dL/df there, nats of the sample)."""
    leaf = []

    def hook(_module, _inputs, out):
        x = out.detach()[0]
        rows = x[::stride]
        with torch.no_grad():
            f = coder.encode(rows)
        leaf.append(f.detach().requires_grad_())
        new = x.clone()
        new[::stride] = coder.decode(rows, leaf[0])
        return new[None]

    handle = subject.model.model.layers[layer].mlp.register_forward_hook(hook)
    logits = subject.model(input_ids=ids[None], use_cache=False).logits[0]
    handle.remove()
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:])
    loss.backward()
    subject.model.zero_grad(set_to_none=True)
    return leaf[0].detach(), leaf[0].grad, loss.item() * (len(ids) - 1)


def means(out, name, v):
    out[f"{name}.mean"], out[f"{name}.mean_abs"] = v.mean(0), v.abs().mean(0)


def pass_through(out, key, subject, coder, layer, stride=1):
    """Values over all tokens; gradients and attribution over samples of at least two."""
    values, alls, actives, attributions = [], [], [], []
    for x, g in zip(subject.x[layer], subject.g[layer], strict=True):
        x = x[::stride]
        with torch.no_grad():
            f = coder.encode(x)
        values.append(f)
        if g is not None:
            df = feature_gradient(coder, x, f, g[::stride])
            alls.append(df)
            actives.append(df * (f > 0))
            attributions.append(f * df)
    f = torch.cat(values)
    assert (f >= 0).all()
    out[f"{key}.values.mean"] = f.mean(0)
    out[f"{key}.values.sum_sq"] = f.square().sum(0)
    out[f"{key}.values.fired"] = (f > 0).sum(0)
    out[f"{key}.values.max"] = f.amax(0)
    out[f"{key}.values.max_at"] = places(f, [len(v) for v in values], stride)
    means(out, f"{key}.gradients", torch.cat(alls))
    means(out, f"{key}.gradients_active", torch.cat(actives))
    means(out, f"{key}.attribution", torch.cat(attributions))
    return f


def places(f, lengths, stride):
    """(sample, position) of each feature's maximum [F, 2]; (−1, −1): it never fires; (−2, −2): two tokens are within rounding,
    as the first tokens of two texts that begin alike."""
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.cat([torch.arange(n) * stride for n in lengths])
    top, rows = f.topk(2, dim=0)
    at = torch.stack([sample[rows[0]], position[rows[0]]], dim=1)
    at[top[1] > top[0] * (1 - 1e-4)] = -2
    at[top[0] == 0] = -1
    return at


def replaced(out, key, subject, coder, layer, stride=1):
    gradients, attributions, nats = [], [], 0.0
    for ids in subject.samples:
        if len(ids) > 1:
            f, df, sample_nats = spliced(subject, coder, layer, ids, stride)
            gradients.append(df)
            attributions.append(f * df)
            nats += sample_nats
    means(out, f"{key}.replace.gradients", torch.cat(gradients))
    means(out, f"{key}.replace.attribution", torch.cat(attributions))
    return nats


def fit(subject, coder, layer):
    """FVU and L0 without each sample's first token."""
    x = torch.cat([x[1:] for x in subject.x[layer]])
    with torch.no_grad():
        f = coder.encode(x)
        rest = x - coder.decode(x, f)
    return (rest.square().sum() / (x - x.mean(0)).square().sum()).item(), (f > 0).sum().item() / len(x)


def layer_numbers(subject, coder, layer, strided):
    out, about = {}, {}
    f = pass_through(out, f"layer_{layer}", subject, coder, layer)
    about["fired_share"] = (f > 0).double().mean().item()
    about["fvu"], about["l0"] = fit(subject, coder, layer)
    about["replace_nats"] = replaced(out, f"layer_{layer}", subject, coder, layer)
    if strided:
        pass_through(out, f"layer_{layer}.stride_{STRIDE}", subject, coder, layer, STRIDE)
        replaced(out, f"layer_{layer}.stride_{STRIDE}", subject, coder, layer, STRIDE)
    return out, about


def sensitive(subject, coder, layer):
    """What a forgotten part is looked for in: all of pass-through, and how good x̂ is for what only x̂ depends on."""
    out = {}
    pass_through(out, f"layer_{layer}", subject, coder, layer)
    return floats(out) | {"fvu": torch.tensor([fit(subject, coder, layer)[0]])}


def floats(numbers):
    return {k: v.double() for k, v in numbers.items() if v.is_floating_point()}


# ---------------------------------------------------------------------------------- what forgetting would do


def flips(coder, ignored):
    """Each vector of the SAE forgotten, the decoder's norms taken for 1, the encoder read in the other order, and the case's
    own: name → a function that changes the module and returns one that changes it back."""

    def zero(p):
        old = p.detach().clone()
        p.data.zero_()
        return lambda: p.data.copy_(old)

    def replace(p, new):
        old = p.detach().clone()
        p.data.copy_(new)
        return lambda: p.data.copy_(old)

    out = {}
    for name, p in coder.module.state_dict(keep_vars=True).items():
        if name in ignored or not p.is_floating_point():
            continue
        if p.dim() < 2:
            out[f"no {name}"] = lambda p=p: zero(p)
        elif "enc" in name:
            out[f"{name} transposed"] = lambda p=p: replace(p, p.detach().T.clone(memory_format=torch.contiguous_format).reshape(p.shape))
        else:
            dim = int(p.shape[0] > p.shape[1])  # a feature's row is the shorter side
            out[f"{name} normalised"] = lambda p=p, dim=dim: replace(p, p.detach() / p.detach().norm(dim=dim, keepdim=True))
    return out


def set_attribute(target, name, value):
    def flip():
        old = getattr(target, name)
        setattr(target, name, value)
        return lambda: setattr(target, name, old)

    return flip


# ------------------------------------------------------------------------------------- dictionary_learning

from dictionary_learning import dictionary, utils  # noqa: E402
from dictionary_learning.trainers import batch_top_k, gdm, jumprelu, matryoshka_batch_top_k, standard, top_k  # noqa: E402
from dictionary_learning.training import trainSAE  # noqa: E402

DL_F, K = 100, 10


class DictionaryLearning:
    """A class, the trainer that has it, and what its parameters are called."""

    library, site, arguments = "dictionary-learning", "mlp", []

    def __init__(self, dict_class, trainer, names, shift=0.0, dtype=None, rows_first=False, ignored=(), **more):
        self.dict_class, self.trainer, self.names, self.more = dict_class, trainer, names, more
        self.shift, self.dtype, self.rows_first, self.ignored = shift, dtype, rows_first, ignored
        self.features, self.about = DL_F, dict_class.__name__ + (f", {str(dtype).removeprefix('torch.')}" if dtype else "")

    def path(self, layer):
        return f"mlp_out_layer_{layer}/trainer_0"

    def save(self, folder, layer, x, seed):
        """trainSAE with no step: it makes the trainer, then saves what the trainer has."""
        weights = random_sae(x, self.features, seed, self.shift)
        if self.dict_class is not jumprelu.JumpReluAutoEncoder:
            weights["threshold"] = weights["threshold"].max()

        def make(**config):
            trainer = self.trainer(**config)
            values = {}
            for name, (key, transposed) in self.names.items():
                values[name] = weights[key].T if transposed else weights[key]
            fill(trainer.ae, values)
            if self.rows_first:
                trainer.ae.encoder.weight.data = trainer.ae.encoder.weight.data.contiguous()
            if self.dtype:
                trainer.ae.to(self.dtype)
            return trainer

        config = dict(trainer=make, steps=5000, activation_dim=x.shape[1], dict_size=self.features, layer=layer, lm_name=MODEL,
                      device="cpu", submodule_name=f"mlp_out_layer_{layer}", dict_class=self.dict_class, **self.more)  # fmt: skip
        above = folder / f"mlp_out_layer_{layer}"
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainSAE([x], [config], steps=0, save_dir=str(above), device="cpu")
        # The library writes `checkpoints` and logs elsewhere only; of config.json it takes dict_class from a constant.
        path = above / "trainer_0" / "config.json"
        saved = json.loads(path.read_text())
        saved["trainer"]["dict_class"] = self.dict_class.__name__
        saved["buffer"] = {"d_submodule": x.shape[1], "io": "out", "ctx_len": 64}
        write_json(path, saved)

    def load(self, folder, layer, dtype):
        with contextlib.redirect_stdout(io.StringIO()):
            module, _ = utils.load_dictionary(str(folder / self.path(layer)), "cpu")
        return self.coder(module.to(dtype))

    def coder(self, m):
        name = self.dict_class.__name__
        if name == "AutoEncoder":
            return Coder(m, lambda x: m.encoder(x - m.bias), gap_relu)
        if name == "AutoEncoderNew":
            return Coder(m, m.encoder, gap_relu)
        if name == "AutoEncoderTopK":
            return Coder(m, lambda x: m.encoder(x - m.b_dec), gap_topk(K))
        if name == "BatchTopKSAE":
            return Coder(m, lambda x: m.encoder(x - m.b_dec), gap_threshold(m.threshold))
        if name == "MatryoshkaBatchTopKSAE":
            return Coder(m, lambda x: (x - m.b_dec) @ m.W_enc + m.b_enc, gap_threshold(m.threshold))
        if name == "JumpReluAutoEncoder":
            return Coder(m, lambda x: x @ m.W_enc + m.b_enc, gap_threshold(m.threshold))
        magnitude = lambda x: m.r_mag.exp() * m.encoder(x - m.decoder_bias) + m.mag_bias  # noqa: E731
        return Coder(m, magnitude, gap_gated(m.r_mag, m.mag_bias, m.gate_bias))

    def flips(self, coder):
        out = flips(coder, self.ignored)
        if self.dict_class is top_k.AutoEncoderTopK:
            out["k − 1"] = lambda: _buffer(coder.module.k, K - 1)
        if self.dict_class is dictionary.AutoEncoder:  # the loader has normalised: see `load`
            out.pop("decoder.weight normalised")
        return out


def _buffer(p, value):
    old = p.clone()
    p.fill_(value)
    return lambda: p.copy_(old)


def dictionary_learning_cases():
    topk = {"b_dec": ("b_dec", False), "threshold": ("threshold", False), "encoder.weight": ("W_enc", False),
            "encoder.bias": ("b_enc", False), "decoder.weight": ("W_dec", True)}  # fmt: skip
    direct = {"b_dec": ("b_dec", False), "threshold": ("threshold", False), "W_enc": ("W_enc", True), "b_enc": ("b_enc", False),
              "W_dec": ("W_dec", False)}  # fmt: skip
    linear = {"encoder.weight": ("W_enc", False), "encoder.bias": ("b_enc", False), "decoder.weight": ("W_dec", True)}
    gated = {"decoder_bias": ("b_dec", False), "encoder.weight": ("W_enc", False), "r_mag": ("r_mag", False), "gate_bias": ("gate", False),
             "mag_bias": ("b_enc", False), "decoder.weight": ("W_dec", True)}  # fmt: skip
    april = standard.StandardTrainerAprilUpdate
    return {
        "dl_standard": DictionaryLearning(dictionary.AutoEncoder, april, linear | {"bias": ("b_dec", False)}, shift=-1.0),
        "dl_new": DictionaryLearning(dictionary.AutoEncoderNew, april, linear | {"decoder.bias": ("b_dec", False)}, shift=-1.0),
        "dl_topk": DictionaryLearning(top_k.AutoEncoderTopK, top_k.TopKTrainer, topk, k=K, ignored=("threshold",)),
        "dl_batchtopk": DictionaryLearning(batch_top_k.BatchTopKSAE, batch_top_k.BatchTopKTrainer, topk, k=K),
        "dl_batchtopk_bfloat16": DictionaryLearning(batch_top_k.BatchTopKSAE, batch_top_k.BatchTopKTrainer, topk, k=K,
                                                    dtype=torch.bfloat16, rows_first=True),
        "dl_matryoshka": DictionaryLearning(matryoshka_batch_top_k.MatryoshkaBatchTopKSAE, matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
                                            direct, k=K, group_fractions=[0.25, 0.25, 0.5]),
        "dl_gated": DictionaryLearning(dictionary.GatedAutoEncoder, gdm.GatedSAETrainer, gated, dtype=torch.float16),
        "dl_jumprelu": DictionaryLearning(dictionary.JumpReluAutoEncoder, jumprelu.JumpReluTrainer, direct),
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------- sparsify

import sparsify  # noqa: E402

SPARSIFY_F = 96


class Sparsify:
    library, site, arguments = "eai-sparsify", "mlp", []

    def __init__(self, dtype=torch.float32, **config):
        self.config, self.dtype, self.features = config, dtype, SPARSIFY_F
        self.about = f"SparseCoder, {config['activation']}, {str(dtype).removeprefix('torch.')}"

    def path(self, layer):
        return f"layers.{layer}.mlp"

    def save(self, folder, layer, x, seed):
        module = sparsify.SparseCoder(x.shape[1], sparsify.SparseCoderConfig(**self.config), dtype=self.dtype)
        weights = random_sae(x, self.features, seed)
        fill(module, {"encoder.weight": weights["W_enc"], "encoder.bias": weights["b_enc"], "W_dec": weights["W_dec"], "b_dec": weights["b_dec"]})
        module.save_to_disk(folder / self.path(layer))

    def load(self, folder, layer, dtype):
        m = sparsify.SparseCoder.load_from_disk(folder / self.path(layer)).to(dtype)
        k = self.config["k"]
        gap = gap_topk(k) if self.config["activation"] == "topk" else gap_groupmax(k)
        encode, decode = dense(m)
        return Coder(m, lambda x: m.encoder(x - m.b_dec), gap, encode, decode)

    def flips(self, coder):
        k, smaller = self.config["k"], self.config["k"] - 1 if self.config["activation"] == "topk" else self.config["k"] // 2
        assert coder.module.cfg.k == k
        other = "groupmax" if self.config["activation"] == "topk" else "topk"
        return flips(coder, ()) | {
            "fewer k": set_attribute(coder.module.cfg, "k", smaller),
            "activation": set_attribute(coder.module.cfg, "activation", other),
            "taken for a transcoder": set_attribute(coder.module.cfg, "transcode", True),
        }


# --------------------------------------------------------------------------------------------------- SAELens

from sae_lens import SAE, GatedSAE, GatedSAEConfig, JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig  # noqa: E402
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, TopKSAE, TopKSAEConfig  # noqa: E402

LENS_F = 96
NORM_SCALE = 1.75


class Lens:
    library, site = "sae-lens", "mlp_out"

    def __init__(self, architecture, normalize="none", subtract=True, shift=0.0, old=None, dtype="float32", **more):
        self.architecture, self.normalize, self.subtract, self.shift, self.old, self.more = architecture, normalize, subtract, shift, old, more
        self.dtype = dtype
        self.features, self.about = LENS_F, f"{architecture}, {normalize}" + (f", {more}" if more else "") + f", {dtype}" + (", old config" if old else "")
        self.scaled = normalize == "expected_average_only_in"
        self.arguments = ["--sae_norm_scale", str(NORM_SCALE)] if self.scaled else []
        self.k = more.get("k", 10)

    def path(self, layer):
        return f"blocks.{layer}.hook_mlp_out"

    def normalised(self, x):
        if self.scaled:
            return x * NORM_SCALE
        if self.normalize == "constant_norm_rescale":
            return x * x.shape[1] ** 0.5 / x.norm(dim=1, keepdim=True)
        if self.normalize == "layer_norm":
            x = x - x.mean(1, keepdim=True)
            return x / (x.std(1, keepdim=True) + 1e-5)
        return x

    def save(self, folder, layer, x, seed):
        w = random_sae(self.normalised(x), self.features, seed, self.shift)
        values = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
        metadata = {"model_name": MODEL, "hook_name": f"blocks.{layer}.hook_mlp_out", "prepend_bos": False, "context_size": 64}
        common = dict(d_in=x.shape[1], d_sae=self.features, apply_b_dec_to_input=self.subtract, normalize_activations=self.normalize,
                      dtype=self.dtype)  # fmt: skip
        target = folder / self.path(layer)
        if self.architecture == "batchtopk":
            module = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**common, **self.more))
            h = ((self.normalised(x) - w["b_dec"] * self.subtract) @ w["W_enc"].T + w["b_enc"]) * w["W_dec"].norm(dim=1)
            fill(module, values | {"b_enc": w["b_enc"], "topk_threshold": (h.flatten().quantile(0.88) * 1000).round() / 1000})
        else:
            classes = {"standard": (StandardSAE, StandardSAEConfig), "topk": (TopKSAE, TopKSAEConfig),
                       "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig), "gated": (GatedSAE, GatedSAEConfig)}  # fmt: skip
            sae, config = classes[self.architecture]
            module = sae(config(**common, **self.more))
            if self.architecture == "gated":
                fill(module, values | {"b_gate": w["gate"], "b_mag": w["b_enc"], "r_mag": w["r_mag"]})
            elif self.architecture == "jumprelu":
                fill(module, values | {"b_enc": w["b_enc"], "threshold": w["threshold"]})
            else:
                fill(module, values | {"b_enc": w["b_enc"]})
        for key, value in metadata.items():
            setattr(module.cfg.metadata, key, value)
        target.mkdir(parents=True)
        if self.architecture == "batchtopk":
            module.save_inference_model(target)
            cfg = json.loads((target / "cfg.json").read_text())  # the order of its keys comes from a set
            (target / "cfg.json").write_text(json.dumps(cfg, sort_keys=True))
        else:
            module.save_model(target)
        for file in target.iterdir():
            file.chmod(0o644)
        if self.old:
            self.rewrite(target, layer, x.shape[1])

    def rewrite(self, target, layer, width):
        """cfg.json as SAELens 3 to 5 wrote it, and in the weights the scaling factors of ones that it kept for a while."""
        weights = safetensors.torch.load_file(target / "sae_weights.safetensors")
        write_tensors(target / "sae_weights.safetensors", weights | {"scaling_factor": torch.ones(self.features)})
        write_json(target / "cfg.json", {
            "model_name": MODEL, "hook_point": f"blocks.{layer}.hook_mlp_out", "hook_point_layer": layer, "hook_point_head_index": None,
            "d_in": width, "d_sae": self.features, "dtype": "torch.float32", "device": "cpu", "prepend_bos": True, "context_size": 64,
            "finetuning_scaling_factor": False, **self.old,
        })  # fmt: skip

    def load(self, folder, layer, dtype):
        path = folder / self.path(layer)
        if self.old:  # "torch.float32" is no name of a dtype in the loader of 6
            cfg = json.loads((path / "cfg.json").read_text())
            module = SAE.load_from_disk(path, device="cpu", dtype=cfg["dtype"].removeprefix("torch."))
        else:
            module = SAE.load_from_disk(path, device="cpu")
        m = module.to(dtype=dtype)
        m.requires_grad_(False)
        if self.scaled:
            m.fold_activation_norm_scaling_factor(NORM_SCALE)
        kind = m.cfg.architecture()

        def h(x):
            z = m.process_sae_in(x) @ m.W_enc
            if kind == "gated":
                return m.r_mag.exp() * z + m.b_mag
            h = z + m.b_enc
            return h * m.W_dec.norm(dim=-1) if getattr(m.cfg, "rescale_acts_by_decoder_norm", False) else h

        gap = {
            "standard": lambda: gap_relu, "topk": lambda: gap_topk(m.cfg.k), "jumprelu": lambda: gap_threshold(m.threshold),
            "gated": lambda: gap_gated(m.r_mag, m.b_mag, m.b_gate),
        }[kind]()  # fmt: skip
        return Coder(m, h, gap)

    def flips(self, coder):
        m = coder.module
        out = flips(coder, ()) | {"b_dec of the input": set_attribute(m.cfg, "apply_b_dec_to_input", not m.cfg.apply_b_dec_to_input)}
        if hasattr(m.cfg, "k"):
            out["k − 1"] = set_attribute(m.activation_fn, "k", m.cfg.k - 1)
            out["rescaling"] = set_attribute(m.cfg, "rescale_acts_by_decoder_norm", not m.cfg.rescale_acts_by_decoder_norm)
        if self.architecture == "batchtopk":
            out.pop("W_dec normalised")  # it is, when saved
        if m.cfg.normalize_activations != "none":

            def plain():
                old = m.run_time_activation_norm_fn_in, m.run_time_activation_norm_fn_out
                m.run_time_activation_norm_fn_in = m.run_time_activation_norm_fn_out = lambda x: x

                def back():
                    m.run_time_activation_norm_fn_in, m.run_time_activation_norm_fn_out = old

                return back

            out["normalisation"] = plain
        if self.scaled:

            def unscaled():
                m.fold_activation_norm_scaling_factor(1 / NORM_SCALE)
                return lambda: m.fold_activation_norm_scaling_factor(NORM_SCALE)

            out["norm scale"] = unscaled
        return out


def lens_cases():
    old_topk = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 9}, "normalize_activations": False,
                "apply_b_dec_to_input": False}  # fmt: skip
    return {
        "lens_standard": Lens("standard", shift=-1.0),
        "lens_standard_rescale": Lens("standard", "constant_norm_rescale", subtract=False, shift=-1.0),
        "lens_standard_old": Lens("standard", "constant_norm_rescale", shift=-1.0,
                                  old={"activation_fn_str": "relu", "normalize_activations": "constant_norm_rescale"}),
        "lens_topk": Lens("topk", "layer_norm", k=8),
        "lens_topk_rescaled": Lens("topk", "expected_average_only_in", k=8, rescale_acts_by_decoder_norm=True),
        "lens_topk_rescaled_layer_norm": Lens("topk", "layer_norm", subtract=False, dtype="bfloat16", k=8, rescale_acts_by_decoder_norm=True),
        "lens_topk_old": Lens("topk", subtract=False, k=9, old=old_topk),
        "lens_jumprelu": Lens("jumprelu", "expected_average_only_in"),
        "lens_jumprelu_layer_norm": Lens("jumprelu", "layer_norm", subtract=False, dtype="float16"),
        "lens_gated": Lens("gated"),
        "lens_gated_rescale": Lens("gated", "constant_norm_rescale", subtract=False, dtype="float16"),
        "lens_batchtopk": Lens("batchtopk", "none", k=10, rescale_acts_by_decoder_norm=True),
    }  # fmt: skip


# ------------------------------------------------------------------- Gemma Scope, Llama Scope: published formulas


class Published(nn.Module):
    """f = h where h > θ and h > 0, else 0, with h = x W_encᵀ + b_enc;  x̂ = f W_dec + b_dec."""

    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def h(self, x):
        return x @ self.W_enc.T + self.b_enc

    def encode(self, x):
        h = self.h(x)
        return torch.relu(h) * (h > self.threshold)

    def decode(self, f):
        return f @ self.W_dec + self.b_dec

    def coder(self):
        return Coder(self, self.h, gap_threshold(self.threshold))


class GemmaScope1:
    """params.npz; per layer whether the archive is deflated and whether its matrices are in Fortran order."""

    library, site, arguments, features = "published formula", "mlp_out", [], 97

    def __init__(self, forms):
        self.forms = forms
        self.about = "Gemma Scope: " + "; ".join(f"layer {i} {name}" for i, (name, *_) in forms.items())

    def path(self, layer):
        return f"gemma-scope-2b-pt-mlp/layer_{layer}/width_97/average_l0_12"

    def save(self, folder, layer, x, seed):
        w = random_sae(x, self.features, seed)
        _, deflated, fortran = self.forms[layer]
        order = np.asfortranarray if fortran else np.ascontiguousarray
        arrays = {"W_enc": order(w["W_enc"].T.numpy().astype(np.float32)), "W_dec": order(w["W_dec"].numpy().astype(np.float32)),
                  **{k: w[k].numpy().astype(np.float32) for k in ("b_enc", "b_dec", "threshold")}}  # fmt: skip
        target = folder / self.path(layer)
        target.mkdir(parents=True)
        (np.savez_compressed if deflated else np.savez)(target / "params.npz", **arrays)

    def load(self, folder, layer, dtype):
        with np.load(folder / self.path(layer) / "params.npz") as file:
            t = {k: torch.from_numpy(np.ascontiguousarray(file[k])).to(dtype) for k in file.files}
        return Published(**(t | {"W_enc": t["W_enc"].T})).coder()

    def flips(self, coder):
        return flips(coder, ())


class GemmaScope2:
    library, site, arguments, features = "published formula", "mlp_out", [], 97
    about = "Gemma Scope 2"

    def path(self, layer):
        return f"mlp_out_all/layer_{layer}_width_97_l0_small"

    def save(self, folder, layer, x, seed):
        w = random_sae(x, self.features, seed)
        target = folder / self.path(layer)
        target.mkdir(parents=True)
        hook = f"model.layers.{layer}.post_feedforward_layernorm.output"
        write_json(target / "config.json", {
            "hf_hook_point_in": hook, "hf_hook_point_out": hook, "width": self.features, "model_name": MODEL, "architecture": "jump_relu",
            "l0": 12, "affine_connection": False, "type": "sae",
        })  # fmt: skip
        write_tensors(target / "params.safetensors", {
            "w_enc": w["W_enc"].T.float().contiguous(), "w_dec": w["W_dec"].float(),
            **{k: w[k].float() for k in ("b_enc", "b_dec", "threshold")},
        })  # fmt: skip

    def load(self, folder, layer, dtype):
        t = {k: v.to(dtype) for k, v in safetensors.torch.load_file(folder / self.path(layer) / "params.safetensors").items()}
        return Published(W_enc=t["w_enc"].T, W_dec=t["w_dec"], b_enc=t["b_enc"], b_dec=t["b_dec"], threshold=t["threshold"]).coder()

    def flips(self, coder):
        return flips(coder, ())


class LlamaScope:
    """bfloat16, one threshold for all features. Of OpenMOSS's code (`native`): the scale of the input is folded, then each
    feature is scaled to a decoder row of norm 1, and the threshold is in that space. SAELens leaves the norms as they are."""

    library, site, features = "published formula", "mlp_out", 96

    def __init__(self, convention):
        self.convention, self.about = convention, f"Llama Scope, {convention}"
        self.arguments = [] if convention == "native" else ["--llamascope_convention", "saelens"]

    def path(self, layer):
        return f"Llama3_1-8B-Base-L{layer}M-2x"

    def fold(self, t, norms, width):
        """File → Published, in the precision of the tensors."""
        s_in, s_out = width**0.5 / norms["in"], width**0.5 / norms["out"]
        W_enc, b_enc, W_dec, b_dec = t["encoder.weight"], t["encoder.bias"], t["decoder.weight"].T, t["decoder.bias"]
        if self.convention == "saelens":  # JumpReLUSAE, expected_average_only_in folded: see Lens
            return dict(W_enc=W_enc * s_in, b_enc=b_enc, W_dec=W_dec / s_in, b_dec=b_dec / s_in), s_in
        b_enc, W_dec, b_dec = b_enc / s_in, W_dec * (s_in / s_out), b_dec / s_out
        n = W_dec.norm(dim=1)
        return dict(W_enc=W_enc * n[:, None], b_enc=b_enc * n, W_dec=W_dec / n[:, None], b_dec=b_dec), 1.0

    def save(self, folder, layer, x, seed):
        norm = x.norm(dim=1).mean().item()
        width = x.shape[1]
        norms = {"in": float(f"{norm:.4g}"), "out": float(f"{norm:.4g}")}
        w = random_sae(x * width**0.5 / norms["in"], self.features, seed)
        t = {"encoder.weight": w["W_enc"], "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T.contiguous(), "decoder.bias": w["b_dec"]}
        t = {k: v.bfloat16() for k, v in t.items()}
        folded, unit = self.fold({k: v.double() for k, v in t.items()}, norms, width)
        h = x @ folded["W_enc"].T + folded["b_enc"]
        threshold = torch.tensor(h.flatten().quantile(0.87).item() / unit).bfloat16().item()
        target = folder / self.path(layer)
        (target / "checkpoints").mkdir(parents=True)
        write_tensors(target / "checkpoints" / "final.safetensors", t)
        hook = f"blocks.{layer}.hook_mlp_out"
        write_json(target / "hyperparams.json", {
            "hook_point_in": hook, "hook_point_out": hook, "d_model": width, "d_sae": self.features, "expansion_factor": 2, "act_fn": "jumprelu",
            "jump_relu_threshold": threshold, "norm_activation": "dataset-wise", "dataset_average_activation_norm": norms,
            "sparsity_include_decoder_norm": True, "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False, "use_glu_encoder": False,
            "top_k": 12, "dtype": "torch.bfloat16",
        })  # fmt: skip

    def load(self, folder, layer, dtype):
        target = folder / self.path(layer)
        about = json.loads((target / "hyperparams.json").read_text())
        t = {k: v.double() for k, v in safetensors.torch.load_file(target / "checkpoints" / "final.safetensors").items()}
        folded, unit = self.fold(t, about["dataset_average_activation_norm"], about["d_model"])
        threshold = torch.tensor(about["jump_relu_threshold"], dtype=torch.float64) * unit
        return Published(**folded, threshold=threshold).to(dtype).coder()

    def flips(self, coder):
        out = flips(coder, ())
        if self.convention == "native":
            out.pop("W_dec normalised")  # it is
        return out


CASES = {
    **dictionary_learning_cases(),
    "sparsify_topk": Sparsify(activation="topk", k=8, expansion_factor=2),
    "sparsify_groupmax": Sparsify(activation="groupmax", dtype=torch.bfloat16, k=12, num_latents=SPARSIFY_F),
    **lens_cases(),
    "gemma_scope": GemmaScope1({1: ("stored", False, False), 3: ("deflated, Fortran order", True, True)}),
    "gemma_scope_fortran": GemmaScope1({1: ("stored, Fortran order", False, True), 3: ("deflated", True, False)}),
    "gemma_scope_2": GemmaScope2(),
    "llama_scope": LlamaScope("native"),
    "llama_scope_saelens": LlamaScope("saelens"),
}
STRIDED = ("dl_batchtopk",)
SCRIPTS = "dl_batchtopk"  # the class that the scripts' users have


# ------------------------------------------------------------------------------------------------- one case


def closest_decision(coder, x):
    """How near a decision of the encoder is to going the other way, over the largest |h|."""
    with torch.no_grad():
        f, h = coder.encode(x), coder.h(x)
        fired = f > 0
        assert torch.allclose(f[fired], h[fired], rtol=1e-6, atol=0), "h is not what the library decides on"
        return (coder.gap(h).min() / h.abs().max()).item()


def make_case(name, subjects):
    case, folder = CASES[name], ROOT / name
    double, single = subjects
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    seeds, expected, found, about, moved = {}, {}, {}, {}, {}
    strided = name in STRIDED
    for layer in LAYERS:
        x = double.all(layer)
        first = zlib.crc32(f"{name} {layer}".encode()) % 1_000_000
        for seed in range(first, first + 400):
            target = folder / case.path(layer)
            shutil.rmtree(target, ignore_errors=True)
            case.save(folder, layer, x, seed)
            coder = case.load(folder, layer, torch.float64)
            margin = closest_decision(coder, x)
            if margin > MARGIN:
                break
        else:
            raise AssertionError(f"{name}: no seed keeps away from its thresholds")
        seeds[layer] = seed
        numbers, about[layer] = layer_numbers(double, coder, layer, strided)
        about[layer]["closest_decision"] = margin
        assert FIRES[0] <= about[layer]["fired_share"] <= FIRES[1], about[layer]
        expected |= numbers
        found |= layer_numbers(single, case.load(folder, layer, torch.float32), layer, strided)[0]
        here = sensitive(double, coder, layer)
        for flip, change in case.flips(coder).items():
            back = change()
            after = sensitive(double, coder, layer)
            back()
            amount = distance(after, here)[0]
            moved[flip] = min(moved.get(flip, np.inf), amount)
            assert amount > MOVES, f"{name}, layer {layer}: {flip} moves the golden by {amount:.1e} only"
        again = sensitive(double, coder, layer)
        assert distance(again, here)[0] < 1e-12, "a flip was not taken back"
    control = distance(floats(found), floats(expected))
    counts = [k for k, v in expected.items() if not v.is_floating_point()]
    assert control[0] < CONTROL, control
    assert all(torch.equal(found[k], expected[k]) for k in counts), "float32 decides otherwise"
    ambiguous = sum(int((expected[k][:, 0] == -2).sum()) for k in counts if k.endswith("max_at"))
    write_tensors(folder / "expected.safetensors", {k: v.contiguous() for k, v in expected.items()})
    lengths = [len(s) for s in double.samples]
    write_json(folder / "expected.json", {
        "library": case.library, "class": case.about, "model": MODEL, "sae": case.path("{layer}"), "site": case.site,
        "arguments": case.arguments, "layers": list(LAYERS), "features": case.features,
        "values_count": sum(lengths), "gradients_count": sum(n for n in lengths if n > 1), "fit_tokens": sum(n - 1 for n in lengths),
        **{f"layer_{i}": {k: float(f"{v:.10g}") for k, v in about[i].items()} | {"seed": seeds[i]} for i in LAYERS},
        "ambiguous_maxima": ambiguous, "float32_against_float64": float(f"{control[0]:.1e}"),
        "forgetting_moves": {k: float(f"{v:.2g}") for k, v in moved.items()},
    })  # fmt: skip
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    shares = ", ".join(f"{about[i]['fired_share']:.2f} FVU {about[i]['fvu']:.2f} seed {seeds[i]}" for i in LAYERS)
    print(f"{name:<30} fires {shares}; float32 {control[0]:.0e}; least move {min(moved.values()):.2f}; {size / 1024:.0f} KiB", flush=True)


# ---------------------------------------------------------------------------------------- the scripts' algorithm


def make_scripts():
    """What sae_gradient_analysis.py does with the case SCRIPTS: float32, every layer in its own spliced pass, of the flattened
    batch every 4th valid position, means of batch means. All texts fill max_length, a multiple of 4."""
    settings = json.loads((HERE / MODEL / "expected.json").read_text())["scripts"]
    ids = safetensors.torch.load_file(HERE / MODEL / "expected_scripts.safetensors")["ids"]
    assert ids.shape[0] % BATCH_SIZE == 0 and ids.shape[1] % SCRIPTS_STRIDE == 0
    numbers = {}
    for dtype in (torch.float32, torch.float64):
        model = AutoModelForCausalLM.from_pretrained(HERE / MODEL, attn_implementation="eager").to(dtype).eval()
        numbers[dtype] = scripts_numbers(model, ids, dtype)
    distances = distance(floats(numbers[torch.float32]), floats(numbers[torch.float64]))
    assert distances[0] < CONTROL, distances
    # The program's way: samples alone, loss of the batch, positions 0, 4, 8, … of each sample, one mean over all.
    ours = one_mean(AutoModelForCausalLM.from_pretrained(HERE / MODEL, attn_implementation="eager").double().eval(), ids)
    same = distance(ours, floats(numbers[torch.float64]))
    assert same[0] < 1e-6, same  # transformers' own loss is in float32, whatever the model is in
    write_tensors(ROOT / SCRIPTS / "expected_scripts.safetensors", numbers[torch.float32] | {"ids": ids})
    path = ROOT / SCRIPTS / "expected.json"
    about = json.loads(path.read_text())
    about["scripts"] = settings | {
        "position_stride": SCRIPTS_STRIDE, "sae_splice": "replace", "loss_reduction": "batch",
        "tokens": ids.numel() // SCRIPTS_STRIDE, "float32_against_float64": float(f"{distances[0]:.1e}"),
    }  # fmt: skip
    write_json(path, about)
    print(f"scripts: float32 against float64 {distances[0]:.1e}, one mean against means of batch means {same[0]:.1e}")


def scripts_numbers(model, ids, dtype):
    out = {}
    for layer in LAYERS:
        sae = CASES[SCRIPTS].load(ROOT / SCRIPTS, layer, dtype).module
        per_batch = {(what, agg): [] for what in ("values", "gradients") for agg in ("mean", "mean_abs")}
        for batch in ids.split(BATCH_SIZE):
            mask = torch.ones_like(batch)
            valid = mask.flatten().nonzero()[:, 0][::SCRIPTS_STRIDE]
            leaf = []

            def replace(_module, _inputs, output):
                flat = output.detach().reshape(-1, output.shape[-1])
                leaf.append(sae.encode(flat[valid]).detach().requires_grad_())
                new = flat.clone()
                new[valid] = sae.decode(leaf[0])
                return new.view_as(output)

            handle = model.model.layers[layer].mlp.register_forward_hook(replace)
            model(input_ids=batch, attention_mask=mask, labels=batch).loss.backward()
            handle.remove()
            model.zero_grad(set_to_none=True)
            for what, v in (("values", leaf[0].detach()), ("gradients", leaf[0].grad)):
                per_batch[what, "mean"].append(v.mean(0))
                per_batch[what, "mean_abs"].append(v.abs().mean(0))
        for (what, agg), parts in per_batch.items():
            v = torch.stack(parts).mean(0)
            out[f"layer_{layer}.{what}.{agg}"] = v
            out[f"layer_{layer}.{what}.{agg}.norm_sum_abs"] = v * len(v) / v.abs().sum()
    return out


def one_mean(model, ids):
    subject = Subject.__new__(Subject)
    subject.model, subject.dtype = model, torch.float64
    out = {}
    for layer in LAYERS:
        coder = CASES[SCRIPTS].load(ROOT / SCRIPTS, layer, torch.float64)
        values, gradients = [], []
        for sample in ids:
            f, df, _ = spliced(subject, coder, layer, sample, SCRIPTS_STRIDE)
            values.append(f)
            gradients.append(df / BATCH_SIZE)  # every sample has as many targets: the batch's mean is the mean of theirs
        for what, v in (("values", torch.cat(values)), ("gradients", torch.cat(gradients))):
            means(out, f"layer_{layer}.{what}", v)
            for agg in ("mean", "mean_abs"):
                mean = out[f"layer_{layer}.{what}.{agg}"]
                out[f"layer_{layer}.{what}.{agg}.norm_sum_abs"] = mean * len(mean) / mean.abs().sum()
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the libraries' own initial weights, all of which are overwritten
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    subjects = Subject(torch.float64), Subject(torch.float32)
    for name in args.only:
        make_case(name, subjects)
    if SCRIPTS in args.only:
        make_scripts()
    packages = ("torch", "transformers", "safetensors", "numpy", "dictionary-learning", "eai-sparsify", "sae-lens")
    versions = {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}}
    write_json(ROOT / "versions.json", versions)
    print(json.dumps(versions))


if __name__ == "__main__":
    sys.exit(main())
