//! A sum by atomic additions in shared memory. No kernel of ours adds so, because the order shows in floats; the
//! fault that such kernels invite must be noticed all the same.

use cuemu::launcher::Sanitizer;
use gradlens::backend::cuda::launch::Launch;
use gradlens::backend::cuda::{Buf, Sources};

use super::faults::{Fault, planted};
use super::machine::machine_with;

const SUM: &str = r#"
    extern "C" __global__ void __launch_bounds__(128)
    sum(const int* __restrict__ x, int* total, int len) {
      __shared__ int of_block;
      if (threadIdx.x == 0) of_block = 0;
      __syncthreads();
      int i = blockIdx.x * 128 + threadIdx.x;
      if (i < len) atomicAdd(&of_block, x[i]);
      __syncthreads();
      if (threadIdx.x == 0) atomicAdd(total, of_block);
    }
"#;

/// What this test must notice.
pub const FAULTS: &[Fault] = &[
    Fault {
        name: "+= for atomicAdd in shared memory",
        file: "sum.cu",
        from: "atomicAdd(&of_block, x[i])",
        to: "of_block += x[i]",
        test: "atomics::sum",
        build: Sanitizer::Thread,
        reports: &["ThreadSanitizer: data race"],
    },
    Fault {
        name: "+= for atomicAdd in device memory",
        file: "sum.cu",
        from: "atomicAdd(total, of_block)",
        to: "*total += of_block",
        test: "atomics::sum",
        build: Sanitizer::Thread,
        reports: &["ThreadSanitizer: data race"],
    },
];

/// The kernels, and this one.
pub fn sources() -> Sources {
    Sources::embedded().and("sum.cu", SUM)
}

#[test]
fn sum() {
    let Some(machine) = machine_with(planted(sources())) else { return };
    let memory = &machine.cuda.device.memory;
    let x: Vec<i32> = (0..300).map(|i| i * i - 7).collect();
    let found = machine.same_under_all_schedules(|| {
        let given = Buf::from_host(memory, &x, x.len()).unwrap();
        let total = Buf::from_host(memory, &[0], 1).unwrap();
        let kernel = machine.cuda.kernel("sum.cu", "sum").unwrap();
        let launch = Launch::new(&kernel, x.len().div_ceil(128), 128)
            .arg("const int* x", &given)
            .arg("int* total", &total)
            .arg("int len", x.len() as i32);
        // SAFETY: x has `len` elements, total one.
        unsafe { launch.on(&machine.cuda.device.compute) }.unwrap();
        total.to_host().unwrap()
    });
    assert_eq!(found, [x.iter().sum::<i32>()]);
}
