//! Wrong readings of a model, planted in its op list.

use gradlens::model::op::{Attention, Block, Op, RmsNorm, Weight};
use gradlens::model::{Activation, Spec};

use super::NOTICED;
use super::common::rename;

/// One wrong reading, planted at every place where it changes something, one place at a time.
pub struct Reading {
    pub name: &'static str,
    /// The goldens that must notice it: those whose models have such a place.
    pub goldens: &'static [&'static str],
    /// Relative L2 by which it moves some array at least.
    pub least: f64,
    pub plant: Plant,
}

pub enum Plant {
    /// In one op.
    Op(fn(&Spec, &mut Op)),
    /// In the op of this index of a block and what stands beside it.
    At(fn(&mut Block, usize)),
    /// In the block of one layer.
    Layer(fn(&mut Block)),
    /// In all of the model.
    Model(fn(&mut Spec)),
}

const ALL: &[&str] = &["gemma2", "gemma3", "qwen3", "mixtral"];
const GEMMAS: &[&str] = &["gemma2", "gemma3"];
const HEAD_NORMS: &[&str] = &["gemma3", "qwen3"];

const fn op(name: &'static str, goldens: &'static [&'static str], edit: fn(&Spec, &mut Op)) -> Reading {
    Reading { name, goldens, least: NOTICED, plant: Plant::Op(edit) }
}

const fn at(name: &'static str, goldens: &'static [&'static str], edit: fn(&mut Block, usize)) -> Reading {
    Reading { name, goldens, least: NOTICED, plant: Plant::At(edit) }
}

const fn layer(name: &'static str, goldens: &'static [&'static str], edit: fn(&mut Block)) -> Reading {
    Reading { name, goldens, least: NOTICED, plant: Plant::Layer(edit) }
}

const fn model(name: &'static str, goldens: &'static [&'static str], edit: fn(&mut Spec)) -> Reading {
    Reading { name, goldens, least: NOTICED, plant: Plant::Model(edit) }
}

pub const READINGS: &[Reading] = &[
    // Attention.
    op("no soft-cap of scores", &["gemma2"], |_, op| attention(op, |a| a.softcap = None)),
    op("a soft-cap of scores a tenth higher", &["gemma2"], |_, op| {
        attention(op, |a| a.softcap = a.softcap.map(|cap| 1.1 * cap));
    }),
    op("a window one wider", GEMMAS, |_, op| attention(op, |a| a.window = a.window.map(|w| w + 1))),
    op("a window one narrower", GEMMAS, |_, op| attention(op, |a| a.window = a.window.map(|w| w - 1))),
    op("no window", GEMMAS, |_, op| attention(op, |a| a.window = None)),
    op("a window where there is none", GEMMAS, |spec, op| {
        let windows = spec.blocks.iter().flat_map(|block| &block.ops).filter_map(|op| match op {
            Op::Attend { attention, .. } => attention.window,
            _ => None,
        });
        let window = windows.max();
        attention(op, |a| a.window = a.window.or(window));
    }),
    op("scores scaled by the head's width", GEMMAS, |_, op| {
        attention(op, |a| a.scale = (a.head_dim as f64).sqrt().recip());
    }),
    at("keys and values exchanged", ALL, |block, at| {
        if let Op::Attend { k, v, .. } = &mut block.ops[at] {
            std::mem::swap(k, v);
        }
    }),
    // Rotation.
    op("the other layers' rotary base", &["gemma3"], |_, op| {
        if let Op::Rope { table, .. } = op {
            *table = 1 - *table;
        }
    }),
    at("no rotation", ALL, |block, at| {
        if matches!(block.ops[at], Op::Rope { .. }) {
            leave_out(block, at);
        }
    }),
    at("heads rotated before their norm", HEAD_NORMS, |block, at| {
        let Op::Norm { x, weight, norm, out: between } = block.ops[at] else { return };
        let turns = |op: &Op| matches!(op, Op::Rope { x, .. } if *x == between);
        let Some(then) = block.ops.iter().position(turns) else { return };
        let Op::Rope { heads, table, out, .. } = block.ops[then] else { return };
        block.ops[at] = Op::Rope { x, heads, table, out: between };
        block.ops[then] = Op::Norm { x: between, weight, norm, out };
    }),
    model("the rotary bases exchanged", &["gemma3"], |spec| spec.inv_freq.swap(0, 1)),
    model("no rotary scaling", &["gemma3"], |spec| spec.inv_freq[0].iter_mut().for_each(|f| *f *= 8.0)),
    model("rotary scaling for local layers too", &["gemma3"], |spec| {
        spec.inv_freq[1].iter_mut().for_each(|f| *f /= 8.0);
    }),
    model("the rotary base 500,000", &["gemma2", "qwen3", "mixtral"], |spec| {
        let pairs = spec.inv_freq[0].len();
        let frequency = |j: usize| 500_000f64.powf(-(j as f64) / pairs as f64) as f32;
        spec.inv_freq[0] = (0..pairs).map(frequency).collect();
    }),
    // Norms.
    at("w for 1 + w", GEMMAS, |block, at| {
        if !is_head(block) {
            norm(&mut block.ops[at], |norm| norm.offset = 0.0);
        }
    }),
    Reading {
        // Before a tied head of small embeddings these weights are around 200: 1 is 0.005 of them.
        least: 1e-3,
        ..at("w for 1 + w in the last norm", GEMMAS, |block, at| {
            if is_head(block) {
                norm(&mut block.ops[at], |norm| norm.offset = 0.0);
            }
        })
    },
    op("1 + w for w", &["qwen3", "mixtral"], |_, op| norm(op, |norm| norm.offset = 1.0)),
    at("a norm left out", ALL, |block, at| {
        if matches!(block.ops[at], Op::Norm { .. }) {
            leave_out(block, at);
        }
    }),
    layer("the norms before and after attention exchanged", GEMMAS, |block| exchange_norms(block, 0, 1)),
    layer("the norms before and after the MLP exchanged", GEMMAS, |block| exchange_norms(block, 2, 3)),
    layer("the norms after attention and before the MLP exchanged", GEMMAS, |block| {
        exchange_norms(block, 1, 2);
    }),
    layer("the norms before attention and MLP exchanged", &["qwen3", "mixtral"], |block| {
        exchange_norms(block, 0, 1);
    }),
    layer("the norms of query and key heads exchanged", HEAD_NORMS, |block| {
        let norms = norms(block, true);
        exchange(block, norms[0], norms[1]);
    }),
    // MLP, embedding, head.
    op("the other activation", ALL, |_, op| {
        if let Op::Gate { activation, .. } = op {
            *activation = match activation {
                Activation::Silu => Activation::GeluTanh,
                Activation::GeluTanh => Activation::Silu,
            };
        }
    }),
    op("gate and up exchanged", ALL, |_, op| {
        if let Op::Gate { gate, up, .. } = op {
            std::mem::swap(gate, up);
        }
    }),
    op("an embedding that is not scaled", GEMMAS, |_, op| {
        if let Op::Embed { scale, .. } = op {
            *scale = 1.0;
        }
    }),
    op("no soft-cap of logits", &["gemma2"], |_, op| {
        if let Op::Loss { softcap, .. } = op {
            *softcap = None;
        }
    }),
    // Experts.
    layer("a single expert for each token", &["mixtral"], |block| {
        let Block { ops, widths, .. } = block;
        let Some(Op::Route { top_k, .. }) = ops.iter_mut().find(|op| matches!(op, Op::Route { .. })) else {
            return;
        };
        let all = std::mem::replace(top_k, 1);
        // Rows are one for each expert of a token.
        for op in ops.iter() {
            if let Op::Route { out, .. }
            | Op::Dispatch { out, .. }
            | Op::ExpertLinear { out, .. }
            | Op::Gate { out, .. } = op
            {
                widths[out.0] /= all;
            }
        }
    }),
    op("two experts exchanged in one product", &["mixtral"], |_, op| {
        if let Op::ExpertLinear { weights, .. } = op {
            weights.swap(0, 1);
        }
    }),
    layer("each expert is the next one", &["mixtral"], |block| {
        for op in &mut block.ops {
            if let Op::ExpertLinear { weights, .. } = op {
                weights.rotate_left(1);
            }
        }
    }),
    layer("an expert for the one that nobody chose", &["mixtral"], |block| {
        for op in &mut block.ops {
            if let Op::ExpertLinear { weights, .. } = op {
                weights.swap(3, 4);
            }
        }
    }),
];

impl Plant {
    /// The model with the fault at each place where there can be one, and the place.
    pub fn models(&self, whole: &Spec) -> Vec<(String, Spec)> {
        let mut planted = Vec::new();
        let mut keep = |place: String, spec: Spec| {
            if spec != *whole {
                planted.push((place, spec));
            }
        };
        let ops = (0..whole.blocks.len() + 2)
            .flat_map(|block| (0..block_mut(&mut whole.clone(), block).ops.len()).map(move |at| (block, at)));
        match self {
            Self::Op(edit) => ops.for_each(|(block, at)| {
                let mut spec = whole.clone();
                edit(whole, &mut block_mut(&mut spec, block).ops[at]);
                keep(format!("{}, op {at}", name_of(whole, block)), spec);
            }),
            Self::At(edit) => ops.for_each(|(block, at)| {
                let mut spec = whole.clone();
                edit(block_mut(&mut spec, block), at);
                keep(format!("{}, op {at}", name_of(whole, block)), spec);
            }),
            Self::Layer(edit) => (0..whole.blocks.len()).for_each(|layer| {
                let mut spec = whole.clone();
                edit(&mut spec.blocks[layer]);
                keep(name_of(whole, layer), spec);
            }),
            Self::Model(edit) => {
                let mut spec = whole.clone();
                edit(&mut spec);
                keep("everywhere".to_owned(), spec);
            }
        }
        planted
    }
}

/// Layers, then the embedding, then the head.
fn block_mut(spec: &mut Spec, index: usize) -> &mut Block {
    match index.checked_sub(spec.blocks.len()) {
        None => &mut spec.blocks[index],
        Some(0) => &mut spec.embed,
        Some(_) => &mut spec.head,
    }
}

fn name_of(spec: &Spec, index: usize) -> String {
    match index.checked_sub(spec.blocks.len()) {
        None => format!("layer {index}"),
        Some(0) => "embedding".to_owned(),
        Some(_) => "head".to_owned(),
    }
}

fn attention(op: &mut Op, edit: impl FnOnce(&mut Attention)) {
    if let Op::Attend { attention, .. } = op {
        edit(attention);
    }
}

fn norm(op: &mut Op, edit: impl FnOnce(&mut RmsNorm)) {
    if let Op::Norm { norm, .. } = op {
        edit(norm);
    }
}

fn is_head(block: &Block) -> bool {
    matches!(block.ops.last(), Some(Op::Loss { .. }))
}

/// Removes an op whose output is as wide as its only input, which is read in its place.
fn leave_out(block: &mut Block, at: usize) {
    let op = block.ops.remove(at);
    let (x, out) = (op.inputs()[0], op.outputs()[0]);
    block.ops.iter_mut().for_each(|op| rename(op, out, x));
}

/// Indices of the norms of heads, or of the others. A rotation reads what a norm of heads writes.
fn norms(block: &Block, of_heads: bool) -> Vec<usize> {
    let turned = |slot| block.ops.iter().any(|op| matches!(op, Op::Rope { x, .. } if *x == slot));
    let is = |op: &Op| matches!(op, Op::Norm { out, .. } if turned(*out) == of_heads);
    (0..block.ops.len()).filter(|at| is(&block.ops[*at])).collect()
}

/// Exchanges the weights of two norms of the residual stream's width, counted from the block's start.
fn exchange_norms(block: &mut Block, one: usize, other: usize) {
    let norms = norms(block, false);
    exchange(block, norms[one], norms[other]);
}

fn exchange(block: &mut Block, one: usize, other: usize) {
    let weight = |op: &Op| match op {
        Op::Norm { weight, .. } => *weight,
        _ => unreachable!("{op:?} is no norm"),
    };
    let weights: [Weight; 2] = [weight(&block.ops[one]), weight(&block.ops[other])];
    for (at, own) in [(one, weights[1]), (other, weights[0])] {
        if let Op::Norm { weight, .. } = &mut block.ops[at] {
            *weight = own;
        }
    }
}
