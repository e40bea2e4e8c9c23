//! Promise: matrices of more than 2^32 words are read and written where they should be: products of few rows and of many,
//! lookups, restore. Mutants that count in 32 bits are noticed.
//!
//! Only touched pages of such memory are real, and only the one block that reaches far runs.

use crate::common::data::Rng;
use crate::common::device::{After, Device, Launch, Param};
use crate::common::kernels::{LARGE_WORKSPACE, LINEAR_OUT, LINEAR_STATUS, Large, device, run_large, status};
use crate::common::linear::{Case, first_difference, integers};
use crate::common::lookups::{LOOKUP_OUT, LOOKUP_STATUS};
use crate::common::mutants::{Mutant, all_caught};
use xorz::codec::Encoding;
use xorz::matrix::{Dtype, Shape};

type Checked = Result<(), String>;
const BF16: Dtype = Dtype::BF16;
/// Rows of W, and columns: the last panel begins beyond word 2^32, as does row 16 of the output.
const N: u64 = 1 << 28;
const K: usize = 17;
const M: usize = 17;
const SLOTS: u64 = 20;

fn sparse_in(size: u64, at: u64, bytes: &[u8]) -> Param {
    Param::Vast(size, vec![(at, bytes.to_vec())], vec![])
}

/// The product of the base's last 64 rows, whose words and biases lie far from the first, and 17 rows of x.
struct Far {
    x: Vec<u8>,
    case: Case,
    bias: Vec<u8>,
}

impl Far {
    fn new() -> Self {
        let mut rng = Rng::new(301);
        let shape = Shape { n: 64, k: K };
        let base = integers(&mut rng, BF16, 64 * K, 8);
        Self {
            x: integers(&mut rng, BF16, M * K, 3),
            case: Case::new(BF16, shape, Encoding::Unchanged, &base, &base),
            bias: integers(&mut rng, BF16, 64, 9),
        }
    }

    fn launch(&self, kernel: &str, blocks: (u32, u32), only: Option<(u32, u32)>) -> Launch {
        let row = |row: u64| 2 * (row * N + N - 64);
        let back = (0..M as u64).map(|m| (row(m), 128)).collect();
        let params = vec![
            Param::In(self.x.clone(), 0),
            sparse_in(2 * N * K as u64, 2 * (N - 64) * K as u64, &self.case.base),
            sparse_in(2 * N * (SLOTS + 1), row(SLOTS), &self.bias),
            Param::U64(N),
            Param::In(vec![0; 64], 0),
            Param::U64(64),
            Param::In(vec![0; 16 * SLOTS as usize], 0),
            Param::U64(SLOTS),
            Param::In((-1i32).to_le_bytes().repeat(M), 0),
            Param::Vast(2 * N * M as u64, vec![], back),
            Param::U64(M as u64),
            Param::U64(N),
            Param::U64(K as u64),
            Param::Out(vec![0; 4], 0),
        ];
        Launch { kernel: kernel.into(), blocks, seed: 1, count: false, late: false, only, params }
    }

    /// Rows `from` .. of the output's last columns, `cols` of them.
    fn compare(&self, after: &[After], from: usize, cols: usize) -> Checked {
        let code = status(after, LINEAR_STATUS);
        let want = self.case.reference(&self.x, M, Some(&self.bias));
        for m in from..M {
            let got = &after[LINEAR_OUT].bytes[m * 128..][128 - 2 * cols..128];
            let want = &want[m * 64..][64 - cols..64];
            if let Some(wrong) = first_difference(BF16, got, want) {
                return Err(format!("row {m}: {wrong}"));
            }
        }
        if code == 0 { Ok(()) } else { Err(format!("status {code:#x}")) }
    }
}

fn few_rows(device: &Device) -> Checked {
    let (far, panels) = (Far::new(), (N / 16) as u32);
    // The last panel, and the second block of rows of x: row 16.
    let launch = far.launch("xorz_linear_small_bf16_m16", (panels, 2), Some((panels - 1, 1)));
    far.compare(&device.run(&[launch])?[0], 16, 16)
}

/// Bytes of the workspace of `m` rows that are all the base's, and where their order begins.
fn workspace(m: usize, slots: usize) -> (usize, usize) {
    let tenants = m.min(slots + 2);
    let order = 64 + 144 * tenants + 4 * (slots + 2);
    (order + 4 * m, order)
}

fn many_rows(device: &Device) -> Checked {
    let (far, panels) = (Far::new(), (N / 64) as u32);
    let two = |kernel: &str, blocks: u32, only| {
        let mut launch = far.launch(kernel, (blocks, 1), only);
        launch.params.push(Param::Out(vec![0xEE; workspace(M, SLOTS as usize).0], 0));
        launch
    };
    let product = two("xorz_linear_large_bf16", panels, Some((panels - 1, 0)));
    let large = Large { segments: two("xorz_linear_segments_bf16", 1, None), product };
    far.compare(&run_large(device, &[large])?[0], 0, 64)
}

/// A row of x that is row 2^28 of x and of the output: the workspace names it in place of row 16.
fn far_rows_of_x(device: &Device) -> Checked {
    let (far, n) = (Far::new(), 64);
    let (at_x, at_out) = (N * 2 * K as u64, N * 2 * n as u64);
    let of_kernel = |kernel: &str| {
        let mut launch = far.launch(kernel, (1, 1), None);
        launch.params[0] = sparse_in(at_x + 2 * K as u64, at_x, &far.x[16 * 2 * K..]);
        launch.params[1] = Param::In(far.case.base.clone(), 0);
        launch.params[2] = Param::Null;
        launch.params[LINEAR_OUT] = Param::Vast(at_out + 2 * n as u64, vec![], vec![(at_out, 2 * n as u64)]);
        launch.params[11] = Param::U64(n as u64);
        launch.params.push(Param::Out(vec![0xEE; workspace(M, SLOTS as usize).0], 0));
        launch
    };
    let large = Large {
        segments: of_kernel("xorz_linear_segments_bf16"),
        product: of_kernel("xorz_linear_large_bf16"),
    };
    let mut left = device.run(std::slice::from_ref(&large.segments))?.remove(0);
    let order = workspace(M, SLOTS as usize).1;
    let place = (0..M)
        .map(|i| order + 4 * i)
        .find(|&at| left[LARGE_WORKSPACE].bytes[at..at + 4] == 16u32.to_le_bytes());
    let place = place.ok_or("no row 16 in the order")?;
    left[LARGE_WORKSPACE].bytes[place..place + 4].copy_from_slice(&(N as u32).to_le_bytes());
    let after = device.run(&[large.product_after(&mut left)])?.remove(0);
    let want = far.case.reference(&far.x[16 * 2 * K..], 1, None);
    first_difference(BF16, &after[LINEAR_OUT].bytes, &want).map_or(Ok(()), Err)
}

fn lookups(device: &Device) -> Checked {
    let (rows, k) = (1u64 << 26, 70u64);
    let words = Rng::new(302).bytes(2 * k as usize);
    let last = |each: u64| (rows - 1) * each;
    let params = vec![
        sparse_in(8 * rows, last(8), &(rows - 1).to_le_bytes()),
        sparse_in(2 * k * rows, last(2 * k), &words),
        Param::In(vec![0; 64], 0),
        Param::U64(64),
        Param::In(vec![0; 16], 0),
        Param::U64(1),
        sparse_in(4 * rows, last(4), &(-1i32).to_le_bytes()),
        Param::Vast(2 * k * rows, vec![], vec![(last(2 * k), 2 * k)]),
        Param::U64(rows),
        Param::U64(rows),
        Param::U64(k),
        Param::U32(BF16 as u32),
        Param::Out(vec![0; 4], 0),
    ];
    let kernel = "xorz_delta_embedding_16".into();
    let only = Some((rows as u32 - 1, 0));
    let launch =
        Launch { kernel, blocks: (rows as u32, 1), seed: 1, count: false, late: false, only, params };
    let after = device.run(&[launch])?.remove(0);
    let well = status(&after, LOOKUP_STATUS) == 0 && after[LOOKUP_OUT].bytes == words;
    if well { Ok(()) } else { Err("another row".into()) }
}

/// An unchanged matrix, of which the last block copies the last words: all of it, and its last panel alone.
fn restored(device: &Device) -> Checked {
    let (n, k) = (1u64 << 20, 1u64 << 13);
    let small = vec![0; 2 * 8192];
    let mut blob = Case::new(BF16, Shape { n: 1, k: 8192 }, Encoding::Unchanged, &small, &small).blob;
    blob[16..24].copy_from_slice(&n.to_le_bytes());
    let (bytes, words) = (2 * n * k, Rng::new(303).bytes(4096));
    for rows in [n, 256] {
        let out = 2 * rows * k;
        // 256 threads, 8 words a load.
        let blocks = (rows * k / 2048) as u32;
        let params = vec![
            sparse_in(bytes, bytes - 4096, &words),
            Param::Vast(out, vec![], vec![(out - 4096, 4096)]),
            Param::In(blob.clone(), 0),
            Param::U64(blob.len() as u64),
            Param::U64(n),
            Param::U64(k),
            Param::U32(BF16 as u32),
            Param::Out(vec![0; 4], 0),
            Param::U64(n - rows),
            Param::U64(rows),
        ];
        let kernel = "xorz_delta_restore_16".into();
        let only = Some((blocks - 1, 0));
        let launch = Launch { kernel, blocks: (blocks, 1), seed: 1, count: false, late: false, only, params };
        let after = device.run(&[launch])?.remove(0);
        if status(&after, 7) != 0 || after[1].bytes != words {
            return Err(format!("other words of {rows} rows"));
        }
    }
    Ok(())
}

#[test]
fn words_beyond_2_to_the_32_are_read_and_written_where_they_are() {
    let device = device();
    few_rows(&device).unwrap();
    many_rows(&device).unwrap();
    far_rows_of_x(&device).unwrap();
    lookups(&device).unwrap();
    restored(&device).unwrap();
}

const FEW: [Mutant; 9] = [
    (
        "a panel's words in 32 bits",
        "restore.cu",
        "void each_tile_of_block(",
        "first = panel.from * v.k",
        "first = static_cast<uint32_t>(panel.from * v.k)",
    ),
    (
        "a panel's place in 32 bits",
        "restore.cu",
        "xorz_delta_restore_##bits",
        "out - row_from * k",
        "out - static_cast<uint32_t>(row_from * k)",
    ),
    (
        "copied vectors in 32 bits",
        "words.cuh",
        "void copy_words(",
        "store_vector(to + head + v * kPer",
        "store_vector(to + head + static_cast<uint32_t>(v * kPer)",
    ),
    (
        "copied from 32 bits",
        "words.cuh",
        "void copy_words(",
        "load_vector_once(from + head + v * kPer",
        "load_vector_once(from + head + static_cast<uint32_t>(v * kPer)",
    ),
    (
        "the table's rows in 32 bits",
        "embedding.cu",
        "void look_up(",
        "p.weight + index * p.k",
        "p.weight + static_cast<uint32_t>(index * p.k)",
    ),
    (
        "looked-up rows in 32 bits",
        "embedding.cu",
        "void embedding(",
        "p.out + i * p.k",
        "p.out + static_cast<uint32_t>(i * p.k)",
    ),
    (
        "outputs in 32 bits",
        "linear_small.cu",
        "W* to = p.out",
        "(m0 + j) * p.n",
        "static_cast<uint32_t>((m0 + j) * p.n)",
    ),
    (
        "rows of W in 32 bits",
        "linear_small.cu",
        "const W* words = p.weight",
        "r0 * p.k",
        "static_cast<uint32_t>(r0 * p.k)",
    ),
    (
        "biases in 32 bits",
        "batch.cuh",
        "uint64_t bias_row(",
        "static_cast<uint64_t>(slot)) * p.bias_stride",
        "static_cast<uint64_t>(slot)) * p.bias_stride & 0xFFFFFFFFu",
    ),
];

const MANY: [Mutant; 4] = [
    (
        "outputs in 32 bits",
        "linear_large.cu",
        "bool write_sums(",
        "shared.rows[j] * p.n",
        "shared.rows[j] * static_cast<uint32_t>(p.n)",
    ),
    (
        "rows of W in 32 bits",
        "linear_large.cu",
        "void add_patched(",
        "words + pair.r0 * p.k",
        "words + static_cast<uint32_t>(pair.r0 * p.k)",
    ),
    (
        "rows of x in 32 bits",
        "stages.cuh",
        "void begin(const W* x",
        "rows[row + i * kApart] : 0) * k",
        "rows[row + i * kApart] : 0) * static_cast<uint32_t>(k)",
    ),
    (
        "biases of many rows in 32 bits",
        "batch.cuh",
        "uint64_t bias_row(",
        "static_cast<uint64_t>(slot)) * p.bias_stride",
        "static_cast<uint64_t>(slot)) * p.bias_stride & 0xFFFFFFFFu",
    ),
];

const FEW_LIST: &str = "#include \"restore.cu\"\n#include \"linear_small.cu\"\n#include \"embedding.cu\"\n\
    #define XORZ_KERNELS(X) X(xorz_linear_small_bf16_m16) X(xorz_delta_restore_16) X(xorz_delta_embedding_16)\n";
const MANY_LIST: &str = "#include \"linear_large.cu\"\n#include \"linear_segments.cu\"\n\
    #define XORZ_KERNELS(X) X(xorz_linear_large_bf16) X(xorz_linear_segments_bf16)\n";

#[test]
fn mutants_of_few_rows_and_of_restore_are_caught() {
    all_caught(&FEW, FEW_LIST, &[], |device| {
        few_rows(device)?;
        lookups(device)?;
        restored(device)
    });
}

#[test]
fn mutants_of_many_rows_are_caught() {
    all_caught(&MANY, MANY_LIST, &[], |device| {
        many_rows(device)?;
        far_rows_of_x(device)
    });
}
