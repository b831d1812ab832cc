//! Kernels from lists of instructions, and a way to run any kernel.

use std::ffi::c_void;
use std::fmt::Write;
use std::ptr::NonNull;

use cuemu::driver::{Runtime, Schedule, jit};

/// Whether kernels can be compiled here; says so if not.
pub fn can_run() -> bool {
    let found = std::process::Command::new("g++").arg("--version").output().is_ok_and(|o| o.status.success());
    if !found {
        eprintln!("skipped: no g++");
    }
    found
}

/// Numbers that look random.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

/// Device memory.
pub struct Buffer {
    pointer: NonNull<u8>,
    bytes: usize,
}

impl Buffer {
    pub fn new(bytes: usize) -> Self {
        let pointer = Runtime::load().unwrap().allocate(bytes, 0xFFFF_FFFF).unwrap();
        Self { pointer, bytes }
    }

    pub fn from<T: Copy>(values: &[T]) -> Self {
        let buffer = Self::new(size_of_val(values));
        // SAFETY: the buffer has the size of the values.
        unsafe {
            std::ptr::copy_nonoverlapping(values.as_ptr().cast(), buffer.pointer.as_ptr(), buffer.bytes)
        };
        buffer
    }

    pub fn read<T: Copy>(&self) -> Vec<T> {
        let count = self.bytes / size_of::<T>();
        // SAFETY: the buffer is that long, and aligned for any number.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr().cast(), count) }.to_vec()
    }

    pub fn address(&self) -> u64 {
        self.pointer.as_ptr() as u64
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: it was allocated by `new`; no grid runs, since launches return when they end.
        unsafe { Runtime::load().unwrap().free(self.pointer) };
    }
}

/// A module of one kernel called `k`: parameters as PTX, and what stands between its braces.
pub fn module(parameters: &str, body: &str) -> String {
    format!(
        ".version 8.4\n.target sm_90a\n.address_size 64\n.visible .entry k({parameters})\n{{\n{body}\nret;\n}}\n"
    )
}

/// Runs kernel `k` with 64-bit parameters: `Err` is what it did wrong.
pub fn launch_as(
    ptx: &str,
    grid: u32,
    block: u32,
    dynamic: u64,
    parameters: &[u64],
    schedule: Schedule,
) -> Result<(), String> {
    let compiled = jit::compile(ptx).unwrap_or_else(|error| panic!("{error}"));
    let kernel = compiled.kernel("k").unwrap().unwrap();
    let mut values = parameters.to_vec();
    let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|v| std::ptr::from_mut(v).cast()).collect();
    // SAFETY: each parameter has 8 bytes, and no parameter is larger.
    unsafe { kernel.launch([grid, 1, 1], [block, 1, 1], dynamic, &mut pointers, schedule) }
}

/// The same, with the plainest schedule and no failure.
pub fn launch(ptx: &str, grid: u32, block: u32, parameters: &[u64]) {
    launch_as(ptx, grid, block, 0, parameters, Schedule::default())
        .unwrap_or_else(|error| panic!("{error}\n{ptx}"));
}

/// The operands of an instruction under test, three of each kind.
#[derive(Clone, Copy, Debug)]
pub struct Input {
    pub raw: [u64; 3],
}

#[allow(dead_code, reason = "families use different ones")]
impl Input {
    pub fn l(&self, i: usize) -> u64 {
        self.raw[i]
    }
    pub fn sl(&self, i: usize) -> i64 {
        self.raw[i] as i64
    }
    pub fn r(&self, i: usize) -> u32 {
        self.raw[i] as u32
    }
    pub fn s(&self, i: usize) -> i32 {
        self.raw[i] as i32
    }
    pub fn h(&self, i: usize) -> u16 {
        self.raw[i] as u16
    }
    pub fn f(&self, i: usize) -> f32 {
        f32::from_bits(self.raw[i] as u32)
    }
    pub fn d(&self, i: usize) -> f64 {
        f64::from_bits(self.raw[i])
    }
    pub fn p(&self, i: usize) -> bool {
        self.raw[i] & 1 == 1
    }
}

/// What an instruction writes: which of the registers `%h %r %l %f %d %p`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Out {
    H(u16),
    R(u32),
    L(u64),
    F(f32),
    D(f64),
    P(bool),
}

impl Out {
    fn store(self) -> &'static str {
        match self {
            Self::H(_) => "cvt.u64.u16 %l, %h;",
            Self::R(_) => "cvt.u64.u32 %l, %r;",
            Self::L(_) => "",
            Self::F(_) => "mov.b32 %r, %f; cvt.u64.u32 %l, %r;",
            Self::D(_) => "mov.b64 %l, %d;",
            Self::P(_) => "selp.u64 %l, 1, 0, %p;",
        }
    }

    fn bits(self) -> u64 {
        match self {
            Self::H(v) => u64::from(v),
            Self::R(v) => u64::from(v),
            Self::L(v) => v,
            Self::F(v) => u64::from(v.to_bits()),
            Self::D(v) => v.to_bits(),
            Self::P(v) => u64::from(v),
        }
    }

    fn is(self, got: u64) -> bool {
        match self {
            Self::F(v) if v.is_nan() => f32::from_bits(got as u32).is_nan(),
            Self::D(v) if v.is_nan() => f64::from_bits(got).is_nan(),
            _ => self.bits() == got,
        }
    }
}

/// Instructions over `%a %b %c` (32 bits), `%la…` (64), `%ha…` (16), `%fa…`, `%da…`, `%pa…` and what they give.
pub type Case = (&'static str, fn(&Input) -> Out);

/// Runs every case on the same inputs, each in a scope of its own, and compares.
pub fn check(cases: &[Case], inputs: &[Input]) {
    if !can_run() {
        return;
    }
    let mut body = String::from(
        ".reg .b64 %rd<9>; .reg .b32 %i<4>;
        .reg .b16 %h, %ha, %hb, %hc; .reg .b32 %r, %a, %b, %c; .reg .b64 %l, %la, %lb, %lc;
        .reg .f32 %f, %fa, %fb, %fc; .reg .f64 %d, %da, %db, %dc; .reg .pred %p, %pa, %pb, %pc;
        ld.param.u64 %rd0, [in]; ld.param.u64 %rd1, [out];
        mov.u32 %i0, %ctaid.x; mov.u32 %i1, %ntid.x; mov.u32 %i2, %tid.x; mad.lo.u32 %i0, %i0, %i1, %i2;
        mad.wide.u32 %rd0, %i0, 24, %rd0; ",
    );
    for (i, x) in ["a", "b", "c"].iter().enumerate() {
        writeln!(
            body,
            "ld.global.b64 %l{x}, [%rd0+{}]; cvt.u32.u64 %{x}, %l{x}; cvt.u16.u64 %h{x}, %l{x};
             mov.b32 %f{x}, %{x}; mov.b64 %d{x}, %l{x}; and.b32 %i3, %{x}, 1; setp.ne.u32 %p{x}, %i3, 0;",
            i * 8
        )
        .unwrap();
    }
    writeln!(body, "mad.wide.u32 %rd1, %i0, {}, %rd1;", cases.len() * 8).unwrap();
    for (i, (code, expected)) in cases.iter().enumerate() {
        let store = expected(&inputs[0]).store();
        writeln!(body, "{{ {code} {store} st.global.b64 [%rd1+{}], %l; }}", i * 8).unwrap();
    }
    let block = 32;
    let grid = inputs.len().div_ceil(block);
    let mut raw: Vec<u64> = inputs.iter().flat_map(|input| input.raw).collect();
    raw.resize(grid * block * 3, 0);
    let (given, results) = (Buffer::from(&raw), Buffer::new(grid * block * cases.len() * 8));
    let ptx = module(".param .u64 in, .param .u64 out", &body);
    launch(&ptx, grid as u32, block as u32, &[given.address(), results.address()]);
    let results = results.read::<u64>();
    for (input, got) in inputs.iter().zip(results.chunks(cases.len())) {
        for ((code, expected), &got) in cases.iter().zip(got) {
            let expected = expected(input);
            let [a, b, c] = input.raw;
            assert!(
                expected.is(got),
                "`{code}` of {a:#x}, {b:#x}, {c:#x} gives {got:#x}, expected {:#x}: {expected:?}",
                expected.bits()
            );
        }
    }
}

/// Integers of all sizes, with the edges among them.
pub fn integers(count: usize) -> Vec<Input> {
    let mut random = Random(1);
    const EDGES: [u64; 10] = [0, 1, 2, 31, 32, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 63, u64::MAX];
    let mut one = || match random.next() % 4 {
        0 => EDGES[(random.next() % 10) as usize],
        1 => random.next() % 100,
        2 => random.next() as i32 as i64 as u64 >> (random.next() % 32),
        _ => random.next(),
    };
    (0..count).map(|_| Input { raw: [one(), one(), one()] }).collect()
}

/// Floats of f32: ordinary ones, special ones, and any pattern.
pub fn singles(count: usize) -> Vec<Input> {
    let mut random = Random(2);
    const SPECIAL: [f32; 12] = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        1e-40,
        f32::MAX,
        f32::MIN_POSITIVE,
        2.5,
    ];
    let mut one = || {
        u64::from(match random.next() % 5 {
            0 => SPECIAL[(random.next() % 12) as usize].to_bits(),
            1 => random.next() as u32,
            _ => ((random.next() as i32 as f32) / (1 << 24) as f32).to_bits(),
        })
    };
    (0..count).map(|_| Input { raw: [one(), one(), one()] }).collect()
}

/// The same of f64.
pub fn doubles(count: usize) -> Vec<Input> {
    let mut random = Random(3);
    const SPECIAL: [f64; 8] = [0.0, -0.0, 1.0, -2.5, f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 1e-310];
    let mut one = || match random.next() % 5 {
        0 => SPECIAL[(random.next() % 8) as usize].to_bits(),
        1 => random.next(),
        _ => ((random.next() as i64 as f64) / (1_u64 << 56) as f64).to_bits(),
    };
    (0..count).map(|_| Input { raw: [one(), one(), one()] }).collect()
}
