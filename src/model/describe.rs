//! Config → [`Spec`]: the op lists of a decoder model and the weights they name.
//!
//! One description serves every architecture: a difference is a value from [`Config`] or an op that is
//! present or not.

use super::arch;
use super::op::{Attention, Block, Op, RmsNorm, Site, Slot, Weight};
use super::{Config, Elsewhere, Experts, WeightSpec};

/// A whole model as data: what to compute and which tensors it takes.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// D.
    pub hidden_size: usize,
    /// V.
    pub vocab_size: usize,
    /// Rotary frequencies of the pairs (j, j + Hd/2), radians per position, in as many ways as the layers ask for.
    /// `[..][Hd/2]`
    pub inv_freq: Vec<Vec<f32>>,
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
        (0..self.weights.len()).map(|number| self.elements(Weight(number))).sum()
    }

    /// Parameters of one layer.
    pub fn layer_parameters(&self, layer: usize) -> u64 {
        self.blocks[layer].weights().into_iter().map(|weight| self.elements(weight)).sum()
    }

    /// All parameters but those of experts that a token does not go to.
    pub fn num_active_parameters(&self) -> u64 {
        let ops = self.blocks.iter().flat_map(|block| block.ops.iter().map(move |op| (block, op)));
        let idle = ops.map(|(block, op)| match op {
            Op::ExpertLinear { weights, .. } => {
                weights.iter().map(|weight| self.elements(*weight)).sum::<u64>() - self.met(block, op)
            }
            _ => 0,
        });
        self.num_parameters() - idle.sum::<u64>()
    }

    /// Multiply-adds ×2 of every matrix product of one token's forward, without attention scores and
    /// without the output head. The backward has as many: there are no weight gradients.
    pub fn flops_per_token(&self) -> u64 {
        let of = |block: &Block| block.ops.iter().map(|op| 2 * self.met(block, op)).sum::<u64>();
        self.blocks.iter().map(of).sum()
    }

    /// Weights of the matrices that a token is multiplied with in `op`.
    fn met(&self, block: &Block, op: &Op) -> u64 {
        match op {
            Op::Linear { weight, .. } => self.elements(*weight),
            Op::ExpertLinear { weights, out, .. } => {
                let weight = &self.weights[weights[0].0];
                self.elements(weights[0]) * (block.widths[out.0] / weight.shape[0]) as u64
            }
            _ => 0,
        }
    }

    /// Multiply-adds ×2 of one token's output head, in one direction.
    pub fn head_flops_per_token(&self) -> u64 {
        2 * (self.vocab_size as u64) * (self.hidden_size as u64)
    }

    /// E/k, rounded down: how many experts there are for each that a token goes to; 1 without experts.
    pub fn experts_per_choice(&self) -> usize {
        let of = |block: &Block| {
            block.ops.iter().find_map(|op| match op {
                Op::Route { logits, top_k, .. } => Some(block.widths[logits.0] / top_k),
                _ => None,
            })
        };
        self.blocks.iter().filter_map(of).max().unwrap_or(1)
    }

    /// Whether the logits have a soft-cap.
    pub fn has_capped_logits(&self) -> bool {
        self.head.ops.iter().any(|op| matches!(op, Op::Loss { softcap: Some(_), .. }))
    }

    /// Width of what `site` shows of `layer`; `None` where the model has no such place.
    pub fn site_width(&self, layer: usize, site: Site) -> Option<usize> {
        self.blocks[layer].site_width(site)
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
    let embed = Block {
        ops: vec![Op::Embed { table, scale: config.embedding_scale, out: Block::INPUT }],
        widths: vec![d],
        output: Block::INPUT,
    };
    let blocks = (0..config.num_layers).map(|layer| decoder_block(config, layer, &mut weights)).collect();

    let mut head = Builder::new(config, 0, &mut weights);
    let x = head.norm(Block::INPUT, names.final_norm, d);
    let head = head.finish(Block::INPUT);
    let weight = match config.tie_word_embeddings {
        true => table,
        false => weights.add(arch::weight(names.lm_head, 0), vec![config.vocab_size, d]),
    };
    let loss = Op::Loss { x, weight, softcap: config.logit_softcap };

    let ropes = [Some(&config.rope), config.local_rope.as_ref()];
    Spec {
        hidden_size: d,
        vocab_size: config.vocab_size,
        inv_freq: ropes.into_iter().flatten().map(|rope| rope.inv_freq(config.head_dim)).collect(),
        embed,
        blocks,
        head: Block { ops: head.ops.into_iter().chain([loss]).collect(), ..head },
        weights: weights.0,
    }
}

/// Pre-norm decoder block: h' = h + attention(norm(h)), out = h' + mlp(norm(h')), where what is added may have passed
/// another norm.
fn decoder_block(config: &Config, layer: usize, weights: &mut Weights) -> Block {
    let (names, d) = (config.names, config.hidden_size);
    let mut block = Builder::new(config, layer, weights);
    block.tap(Site::ResidPre, Block::INPUT);
    let x = block.norm(Block::INPUT, names.attn_norm, d);
    let attended = block.attention(x);
    let attended = block.optional_norm(attended, names.attn_post_norm, d);
    block.tap(Site::AttnOut, attended);
    let middle = block.add(Block::INPUT, attended);
    block.tap(Site::ResidMid, middle);

    let x = block.norm(middle, names.mlp_norm, d);
    let mlp = match (&names.experts, config.experts) {
        (Some(names), Some(experts)) => block.experts(x, names, experts),
        _ => block.mlp(x),
    };
    block.tap(Site::Mlp, mlp);
    let mlp = block.optional_norm(mlp, names.mlp_post_norm, d);
    block.tap(Site::MlpOut, mlp);
    let output = block.add(middle, mlp);
    block.tap(Site::ResidPost, output);
    block.finish(output)
}

#[derive(Default)]
struct Weights(Vec<WeightSpec>);

impl Weights {
    fn add(&mut self, name: String, shape: Vec<usize>) -> Weight {
        self.add_with(WeightSpec { name, shape, elsewhere: None })
    }

    fn add_with(&mut self, spec: WeightSpec) -> Weight {
        self.0.push(spec);
        Weight(self.0.len() - 1)
    }
}

/// A block that grows op by op.
struct Builder<'a> {
    config: &'a Config,
    layer: usize,
    weights: &'a mut Weights,
    ops: Vec<Op>,
    widths: Vec<usize>,
}

impl<'a> Builder<'a> {
    /// A block of `layer` (any number outside layers) whose input is the residual stream.
    fn new(config: &'a Config, layer: usize, weights: &'a mut Weights) -> Self {
        Self { config, layer, weights, ops: vec![], widths: vec![config.hidden_size] }
    }

    fn slot(&mut self, width: usize) -> Slot {
        self.widths.push(width);
        Slot(self.widths.len() - 1)
    }

    fn finish(self, output: Slot) -> Block {
        Block { ops: self.ops, widths: self.widths, output }
    }

    fn tap(&mut self, site: Site, x: Slot) {
        self.ops.push(Op::Tap { site, x });
    }

    fn add(&mut self, a: Slot, b: Slot) -> Slot {
        let out = self.slot(self.widths[a.0]);
        self.ops.push(Op::Add { a, b, out });
        out
    }

    /// A norm of runs of `width`.
    fn norm(&mut self, x: Slot, path: &str, width: usize) -> Slot {
        let weight = self.weights.add(arch::weight(path, self.layer), vec![width]);
        let norm = RmsNorm { eps: self.config.rms_norm_eps, offset: self.config.norm_offset };
        let out = self.slot(self.widths[x.0]);
        self.ops.push(Op::Norm { x, weight, norm, out });
        out
    }

    /// The same where there is one.
    fn optional_norm(&mut self, x: Slot, path: Option<&str>, width: usize) -> Slot {
        match path {
            Some(path) => self.norm(x, path, width),
            None => x,
        }
    }

    fn linear(&mut self, x: Slot, path: &str, out: usize, bias: bool) -> Slot {
        let weight = self.weights.add(arch::weight(path, self.layer), vec![out, self.widths[x.0]]);
        let bias = bias.then(|| self.weights.add(arch::bias(path, self.layer), vec![out]));
        let out = self.slot(out);
        self.ops.push(Op::Linear { x, weight, bias, out });
        out
    }

    fn rope(&mut self, x: Slot, heads: usize) -> Slot {
        // Layers with a window have frequencies of their own where there are two kinds.
        let local = self.config.windows[self.layer].is_some() && self.config.local_rope.is_some();
        let out = self.slot(self.widths[x.0]);
        self.ops.push(Op::Rope { x, heads, table: usize::from(local), out });
        out
    }

    /// From the norm's output to that of the output projection.
    fn attention(&mut self, x: Slot) -> Slot {
        let (config, names) = (self.config, self.config.names);
        let (heads, kv_heads, head_dim) = (config.num_heads, config.num_kv_heads, config.head_dim);
        let q = self.linear(x, names.q_proj, heads * head_dim, config.qkv_bias);
        let k = self.linear(x, names.k_proj, kv_heads * head_dim, config.qkv_bias);
        let v = self.linear(x, names.v_proj, kv_heads * head_dim, config.qkv_bias);
        let q = self.optional_norm(q, names.q_norm, head_dim);
        let k = self.optional_norm(k, names.k_norm, head_dim);
        let q = self.rope(q, heads);
        let k = self.rope(k, kv_heads);
        let attention = Attention {
            heads,
            kv_heads,
            head_dim,
            window: config.windows[self.layer],
            scale: config.attention_scale,
            softcap: config.attention_softcap,
        };
        let out = self.slot(heads * head_dim);
        self.ops.push(Op::Attend { q, k, v, attention, out });
        self.linear(out, names.o_proj, config.hidden_size, config.out_bias)
    }

    fn gate(&mut self, gate: Slot, up: Slot) -> Slot {
        let out = self.slot(self.widths[gate.0]);
        self.ops.push(Op::Gate { gate, up, activation: self.config.activation, out });
        out
    }

    fn mlp(&mut self, x: Slot) -> Slot {
        let (config, names) = (self.config, self.config.names);
        let gate = self.linear(x, names.gate_proj, config.intermediate_size, config.mlp_bias);
        let up = self.linear(x, names.up_proj, config.intermediate_size, config.mlp_bias);
        let hidden = self.gate(gate, up);
        self.tap(Site::MlpHidden, hidden);
        self.linear(hidden, names.down_proj, config.hidden_size, config.mlp_bias)
    }

    /// A mixture of experts. transformers scales the chosen ones' parts of the softmax over all experts to a sum of 1:
    /// that is the softmax over the chosen ones.
    fn experts(&mut self, x: Slot, names: &arch::ExpertNames, experts: Experts) -> Slot {
        let Experts { count, per_token } = experts;
        let (d, inner) = (self.config.hidden_size, self.config.intermediate_size);
        let [router, elsewhere] = names.router.map(|path| arch::weight(path, self.layer));
        let shape = vec![count, d];
        let elsewhere = Some(Elsewhere { name: elsewhere, shape: shape.clone(), first: 0 });
        let weight = self.weights.add_with(WeightSpec { name: router, shape, elsewhere });
        let logits = self.slot(count);
        self.ops.push(Op::Linear { x, weight, bias: None, out: logits });
        let scores = self.slot(per_token);
        self.ops.push(Op::Route { logits, top_k: per_token, out: scores });
        let rows = self.slot(per_token * d);
        self.ops.push(Op::Dispatch { x, out: rows });

        let gate =
            self.expert_linear(rows, names.gate_proj, (names.all_gate_up, 2 * inner, 0), [inner, d], experts);
        let up = self.expert_linear(
            rows,
            names.up_proj,
            (names.all_gate_up, 2 * inner, inner),
            [inner, d],
            experts,
        );
        let hidden = self.gate(gate, up);
        let rows = self.expert_linear(hidden, names.down_proj, (names.all_down, d, 0), [d, inner], experts);
        let out = self.slot(d);
        self.ops.push(Op::Combine { x: rows, scores, out });
        out
    }

    /// Every expert's own `[out, width]`; `all`: the tensor that may hold all of them, its rows for each expert, and
    /// where among those these start.
    fn expert_linear(
        &mut self,
        x: Slot,
        path: &str,
        (all, rows, first): (&str, usize, usize),
        [out, width]: [usize; 2],
        Experts { count, per_token }: Experts,
    ) -> Slot {
        let weight = |expert: usize| WeightSpec {
            name: arch::expert_weight(path, self.layer, expert),
            shape: vec![out, width],
            elsewhere: Some(Elsewhere {
                name: arch::in_layer(all, self.layer),
                shape: vec![count, rows, width],
                first: (expert * rows + first) * width,
            }),
        };
        let weights = (0..count).map(|expert| self.weights.add_with(weight(expert))).collect();
        let slot = self.slot(per_token * out);
        self.ops.push(Op::ExpertLinear { x, weights, out: slot });
        slot
    }
}
