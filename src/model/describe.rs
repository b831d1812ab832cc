//! Config → [`Spec`]: the op lists of a decoder model and the weights they name.
//!
//! One description serves every architecture: a difference is a value from [`Config`] or an op that is
//! present or not.

use super::arch::{self, Names};
use super::op::{Attention, Block, Op, Site, Slot, Weight};
use super::{Config, WeightSpec};

/// A whole model as data: what to compute and which tensors it takes.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// D.
    pub hidden_size: usize,
    /// V.
    pub vocab_size: usize,
    /// Rotary frequencies of the pairs (j, j + Hd/2), radians per position. `[Hd/2]`
    pub inv_freq: Vec<f32>,
    /// Token ids → the residual stream.
    pub embed: Block,
    /// One per layer: residual stream in, residual stream out. `[L]`
    pub blocks: Vec<Block>,
    /// Residual stream → loss.
    pub head: Block,
    /// Every tensor of the checkpoint the ops name, by [`Weight`] number. A tied table stands here once.
    pub weights: Vec<WeightSpec>,
}

impl Spec {
    /// Number of parameters; a tied table counts once.
    pub fn num_parameters(&self) -> u64 {
        self.weights.iter().map(|w| w.shape.iter().map(|&d| d as u64).product::<u64>()).sum()
    }

    /// Multiply-adds ×2 of every matrix product of one token's forward, without attention scores and
    /// without the output head. The backward has as many: there are no weight gradients.
    pub fn flops_per_token(&self) -> u64 {
        let linear = |op: &Op| match op {
            Op::Linear { weight, .. } => 2 * self.elements(*weight),
            _ => 0,
        };
        self.blocks.iter().flat_map(|block| &block.ops).map(linear).sum()
    }

    /// Multiply-adds ×2 of one token's output head, in one direction.
    pub fn head_flops_per_token(&self) -> u64 {
        2 * (self.vocab_size as u64) * (self.hidden_size as u64)
    }

    fn elements(&self, weight: Weight) -> u64 {
        self.weights[weight.0].shape.iter().map(|&d| d as u64).product()
    }
}

/// Builds the description of the model that `config` names.
pub fn describe(config: &Config) -> Spec {
    let mut weights = Weights::default();
    let d = config.hidden_size;
    let names = config.names;
    let table = weights.add(arch::weight(names.embed_tokens, 0), vec![config.vocab_size, d]);
    let embed =
        Block { ops: vec![Op::Embed { table, out: Block::INPUT }], widths: vec![d], output: Block::INPUT };
    let blocks = (0..config.num_layers).map(|layer| decoder_block(config, layer, &mut weights)).collect();

    let mut head = Builder::new(d);
    let weight = weights.add(arch::weight(names.final_norm, 0), vec![d]);
    let x = head.norm(Block::INPUT, weight, config);
    let weight = match config.tie_word_embeddings {
        true => table,
        false => weights.add(arch::weight(names.lm_head, 0), vec![config.vocab_size, d]),
    };
    head.ops.push(Op::Loss { x, weight });

    Spec {
        hidden_size: d,
        vocab_size: config.vocab_size,
        inv_freq: config.rope.inv_freq(config.head_dim),
        embed,
        blocks,
        head: head.finish(Block::INPUT),
        weights: weights.0,
    }
}

/// Pre-norm decoder block: h' = h + attention(norm(h)), out = h' + mlp(norm(h')).
fn decoder_block(config: &Config, layer: usize, weights: &mut Weights) -> Block {
    let names: &Names = config.names;
    let (d, inner) = (config.hidden_size, config.intermediate_size);
    let (q_width, kv_width) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
    let mut block = Builder::new(d);
    let vector = |weights: &mut Weights, path: &str| weights.add(arch::weight(path, layer), vec![d]);
    let linear = |block: &mut Builder, weights: &mut Weights, path: &str, x: Slot, out: usize, bias: bool| {
        let weight = weights.add(arch::weight(path, layer), vec![out, block.widths[x.0]]);
        let bias = bias.then(|| weights.add(arch::bias(path, layer), vec![out]));
        let slot = block.slot(out);
        block.ops.push(Op::Linear { x, weight, bias, out: slot });
        slot
    };

    let weight = vector(weights, names.attn_norm);
    let x = block.norm(Block::INPUT, weight, config);
    let q = linear(&mut block, weights, names.q_proj, x, q_width, config.qkv_bias);
    let k = linear(&mut block, weights, names.k_proj, x, kv_width, config.qkv_bias);
    let v = linear(&mut block, weights, names.v_proj, x, kv_width, config.qkv_bias);
    let q = block.rope(q, config.num_heads);
    let k = block.rope(k, config.num_kv_heads);
    let attended = block.slot(q_width);
    let attention = Attention {
        heads: config.num_heads,
        kv_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        window: config.windows[layer],
        scale: (config.head_dim as f64).sqrt().recip(),
    };
    block.ops.push(Op::Attend { q, k, v, attention, out: attended });
    let attended = linear(&mut block, weights, names.o_proj, attended, d, config.out_bias);
    let middle = block.add(Block::INPUT, attended);

    let weight = vector(weights, names.mlp_norm);
    let x = block.norm(middle, weight, config);
    let gate = linear(&mut block, weights, names.gate_proj, x, inner, config.mlp_bias);
    let up = linear(&mut block, weights, names.up_proj, x, inner, config.mlp_bias);
    let hidden = block.slot(inner);
    block.ops.push(Op::Gate { gate, up, activation: config.activation, out: hidden });
    let mlp = linear(&mut block, weights, names.down_proj, hidden, d, config.mlp_bias);
    block.ops.push(Op::Tap { site: Site::Mlp, x: mlp });
    let output = block.add(middle, mlp);
    block.finish(output)
}

#[derive(Default)]
struct Weights(Vec<WeightSpec>);

impl Weights {
    fn add(&mut self, name: String, shape: Vec<usize>) -> Weight {
        self.0.push(WeightSpec { name, shape });
        Weight(self.0.len() - 1)
    }
}

struct Builder {
    ops: Vec<Op>,
    widths: Vec<usize>,
}

impl Builder {
    fn new(input_width: usize) -> Self {
        Self { ops: vec![], widths: vec![input_width] }
    }

    fn slot(&mut self, width: usize) -> Slot {
        self.widths.push(width);
        Slot(self.widths.len() - 1)
    }

    fn norm(&mut self, x: Slot, weight: Weight, config: &Config) -> Slot {
        let out = self.slot(self.widths[x.0]);
        self.ops.push(Op::Norm { x, weight, eps: config.rms_norm_eps, out });
        out
    }

    fn rope(&mut self, x: Slot, heads: usize) -> Slot {
        let out = self.slot(self.widths[x.0]);
        self.ops.push(Op::Rope { x, heads, out });
        out
    }

    fn add(&mut self, a: Slot, b: Slot) -> Slot {
        let out = self.slot(self.widths[a.0]);
        self.ops.push(Op::Add { a, b, out });
        out
    }

    fn finish(self, output: Slot) -> Block {
        Block { ops: self.ops, widths: self.widths, output }
    }
}
