//! Taps in the wrong place.

use gradlens::model::op::{Block, Op, Site};

/// A tap that shows what is not its site.
pub struct Misplaced {
    pub site: Site,
    pub name: &'static str,
    pub goldens: &'static [&'static str],
    place: Place,
    /// Whether values are others there.
    pub values: bool,
    /// Whether gradients are.
    pub gradients: bool,
}

#[derive(Clone, Copy)]
enum Place {
    /// Before the op that writes what the site is: its input of this number.
    Input(usize),
    /// After the first op that reads the site: the site itself, whose gradient lacks that op's part there.
    Late,
    /// After that op: its output.
    Output,
}

const ALL: &[&str] = &["gemma2", "gemma3", "qwen3", "mixtral"];
const GEMMAS: &[&str] = &["gemma2", "gemma3"];
const DENSE: &[&str] = &["gemma2", "gemma3", "qwen3"];

const BOTH: [bool; 2] = [true, true];
const VALUES: [bool; 2] = [true, false];
const GRADIENTS: [bool; 2] = [false, true];

const fn tap(
    site: Site,
    name: &'static str,
    goldens: &'static [&'static str],
    place: Place,
    [values, gradients]: [bool; 2],
) -> Misplaced {
    Misplaced { site, name, goldens, place, values, gradients }
}

pub const MISPLACED: &[Misplaced] = &[
    tap(Site::ResidPre, "without the gradient of attention", ALL, Place::Late, GRADIENTS),
    tap(Site::ResidPre, "after the norm", ALL, Place::Output, BOTH),
    tap(Site::AttnOut, "before the norm that follows attention", GEMMAS, Place::Input(0), BOTH),
    // An addition hands its gradient to both operands.
    tap(Site::AttnOut, "with the residual stream", ALL, Place::Output, VALUES),
    tap(Site::ResidMid, "before attention is added", ALL, Place::Input(0), VALUES),
    tap(Site::ResidMid, "without the residual stream", ALL, Place::Input(1), VALUES),
    tap(Site::ResidMid, "without the gradient of the MLP", ALL, Place::Late, GRADIENTS),
    tap(Site::ResidMid, "after the norm", ALL, Place::Output, BOTH),
    tap(Site::MlpHidden, "is the gate", DENSE, Place::Input(0), BOTH),
    tap(Site::MlpHidden, "is what the gate multiplies", DENSE, Place::Input(1), BOTH),
    tap(Site::Mlp, "after the norm that follows it", GEMMAS, Place::Output, BOTH),
    tap(Site::MlpOut, "before the norm that follows the MLP", GEMMAS, Place::Input(0), BOTH),
    tap(Site::MlpOut, "with the residual stream", ALL, Place::Output, VALUES),
    tap(Site::ResidPost, "before the MLP is added", ALL, Place::Input(0), VALUES),
    tap(Site::ResidPost, "without the residual stream", ALL, Place::Input(1), VALUES),
];

impl Misplaced {
    pub fn misplace(&self, block: &mut Block) {
        let tap = block.tap(self.site).unwrap();
        let x = block.ops.remove(tap).inputs()[0];
        let reads = |op: &Op| !matches!(op, Op::Tap { .. }) && op.inputs().contains(&x);
        let (at, shown) = match self.place {
            Place::Input(number) => {
                let writer = block.ops.iter().position(|op| op.outputs().contains(&x)).unwrap();
                (writer, block.ops[writer].inputs()[number])
            }
            Place::Late => (block.ops.iter().position(reads).unwrap() + 1, x),
            Place::Output => {
                let reader = block.ops.iter().position(reads).unwrap();
                (reader + 1, block.ops[reader].outputs()[0])
            }
        };
        assert_eq!(block.widths[shown.0], block.widths[x.0], "a tap of another width is noticed anyway");
        block.ops.insert(at, Op::Tap { site: self.site, x: shown });
    }
}
