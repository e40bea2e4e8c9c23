//! Launches of the kernels of `cuda/` as their host side will make them (cuda/README.md), and tenants to
//! serve.

use super::data::{Rng, adversarial, matrix, perturbed, value};
use super::device::{After, Device, Launch, Param};
use super::linear::Case;
use xorz::codec::{Encoding, Grid};
use xorz::matrix::{Dtype, Shape};
use xorz::resident::{Assembler, DeltaPiece, Plan, Resident, encode_tiles};

/// Words a few steps from `base`, as `exponent` is made for: each moved by less than `2^(bits - 1)` times
/// `2^low`.
pub fn nudged(rng: &mut Rng, word_bytes: usize, base: &[u8], bits: u32, low: u32) -> Vec<u8> {
    let one = |word: &[u8]| {
        let mut bytes = [0; 8];
        bytes[..word_bytes].copy_from_slice(word);
        let step = (rng.next() >> (64 - bits)).wrapping_sub(1 << (bits - 1)) << low;
        u64::from_le_bytes(bytes).wrapping_add(step).to_le_bytes()[..word_bytes].to_vec()
    };
    base.chunks(word_bytes).flat_map(one).collect()
}

/// Fine-tuned words that are exact where `words` are: steps of seven bits of mantissa, zeros and non-finite
/// words kept.
fn stepped_exactly(rng: &mut Rng, dtype: Dtype, base: &[u8]) -> Vec<u8> {
    let low = match dtype {
        Dtype::F16 => 3,
        Dtype::F32 => 16,
        _ => 0,
    };
    let w = dtype.word_bytes();
    let moved = nudged(rng, w, base, 3, low);
    let plain = |b: &[u8]| (1.0 / 64.0..1e4).contains(&value(dtype, b).abs());
    base.chunks(w).zip(moved.chunks(w)).flat_map(|(b, m)| if plain(b) { m } else { b }.to_vec()).collect()
}

/// Whether the streams of an `exponent` delta hold a bit for each word, at least.
pub fn assert_streams(blob: &[u8]) {
    let h = *Resident::parse(blob).unwrap().header();
    let words = h.shape.n * h.shape.k;
    let bits = h.units as usize * 8 * h.dtype.word_bytes();
    assert!(h.encoding != Encoding::Exponent || bits >= words, "streams of {bits} bits for {words} words");
}

/// A delta of `case` on other tiles than the encoder would choose.
pub fn on_tiles(case: &Case, tile_rows: usize, tile_cols: usize) -> Vec<u8> {
    let h = *Resident::parse(&case.blob).unwrap().header();
    let grid = Grid { shape: case.shape, tile_rows, tile_cols };
    planned(case, Plan { encoding: h.encoding, grid, gap: h.gap, widths: h.widths })
}

/// An `exponent` delta of `case` whose changes are all stored apart.
pub fn all_apart(case: &Case, tile_rows: usize, tile_cols: usize) -> Vec<u8> {
    let h = *Resident::parse(&case.blob).unwrap().header();
    let grid = Grid { shape: case.shape, tile_rows, tile_cols };
    planned(case, Plan { encoding: Encoding::Exponent, grid, gap: h.gap, widths: [0; 32] })
}

fn planned(case: &Case, plan: Plan) -> Vec<u8> {
    let grid = plan.grid;
    let (mut piece, mut assembler) = (DeltaPiece::default(), Assembler::new(case.dtype, &plan).unwrap());
    encode_tiles(&plan, case.dtype, 0..grid.tiles(), &case.base, &case.fine_tuned, &mut piece).unwrap();
    assembler.add(&piece).unwrap();
    let finished = assembler.finish(matrix(case.dtype, case.shape, &case.base).digest()).unwrap();
    let payload = if finished.keep_payload { &piece.payload[..] } else { &[] };
    [&finished.head[..], payload, &finished.tail].concat()
}

/// `delta_restore` or `delta_apply_` of a blob, on `blocks` blocks. `dtype` 0 takes any of the word's size.
pub fn restore(
    apply: bool,
    (dtype, shape): (u32, Shape),
    word_bytes: usize,
    base: &[u8],
    blob: &[u8],
    blocks: u32,
    seed: u64,
) -> Launch {
    let bits = 8 * word_bytes;
    let mut params = vec![];
    if apply {
        params.push(Param::Out(base.to_vec(), 0));
    } else {
        params.push(Param::In(base.to_vec(), 0));
        params.push(Param::Out(vec![0x5A; base.len()], 0));
    }
    params.push(Param::In(blob.to_vec(), 0));
    params.extend([blob.len() as u64, shape.n as u64, shape.k as u64].map(Param::U64));
    params.push(Param::U32(dtype));
    params.push(Param::Out(vec![0; 4], 0));
    if apply {
        // No verdicts: whatever the delta is, it is applied.
        params.extend([Param::Null, Param::U64(0)]);
    } else {
        // All rows.
        params.extend([0, shape.n as u64].map(Param::U64));
    }
    let kernel = format!("xorz_delta_{}_{bits}", if apply { "apply" } else { "restore" });
    Launch { kernel, blocks: (blocks, 1), seed, count: false, late: false, only: None, params }
}

/// Where in the parameters of apply the weight, status and verdicts are.
pub const APPLY_WEIGHT: usize = 0;
pub const APPLY_STATUS: usize = 6;
pub const APPLY_VERDICTS: usize = 7;

/// The launch that looks at every tile before `apply`, on `blocks` blocks: it may not write to the weight.
pub fn verify(apply: &Launch, blocks: u32) -> Launch {
    let mut launch = Launch { blocks: (blocks, 1), ..apply.clone() };
    launch.kernel = apply.kernel.replace("apply", "verify");
    if let Param::Out(weight, offset) = &apply.params[APPLY_WEIGHT] {
        launch.params[APPLY_WEIGHT] = Param::In(weight.clone(), *offset);
    }
    launch.params[APPLY_VERDICTS] = Param::Out(vec![0xEE; 4 * blocks as usize], 0);
    launch.params[APPLY_VERDICTS + 1] = Param::U64(blocks.into());
    launch
}

/// Run launches of apply, each after its verify on `blocks` blocks.
///
/// # Errors
/// What the runner or a sanitizer said.
pub fn run_applies(device: &Device, all: &[Launch], blocks: u32) -> Result<Vec<Vec<After>>, String> {
    let verifies: Vec<_> = all.iter().map(|launch| verify(launch, blocks)).collect();
    let left = device.run(&verifies)?;
    let after = |(launch, mut left): (&Launch, Vec<After>)| {
        let mut launch = launch.clone();
        launch.params[APPLY_STATUS] = Param::Out(std::mem::take(&mut left[APPLY_STATUS].bytes), 0);
        launch.params[APPLY_VERDICTS] = Param::In(std::mem::take(&mut left[APPLY_VERDICTS].bytes), 0);
        launch.params[APPLY_VERDICTS + 1] = Param::U64(blocks.into());
        launch
    };
    let applies: Vec<_> = all.iter().zip(left).map(after).collect();
    device.run(&applies)
}

/// Many tenants' rows, or one tenant's.
pub struct Linear<'a> {
    pub dtype: Dtype,
    pub shape: Shape,
    pub base: &'a [u8],
    pub x: &'a [u8],
    pub m: usize,
    pub arena: &'a [u8],
    /// None: `arena` is the delta of every row.
    pub slots: Option<&'a [[i64; 2]]>,
    pub tenant_of_row: Option<&'a [i32]>,
    /// A row for each slot and one for the base; or the one of the tenant.
    pub biases: Option<&'a [u8]>,
    /// Rows of x of a block: 4 or 16.
    pub rows: usize,
    pub seed: u64,
}

/// Where in the parameters output and status are.
pub const LINEAR_OUT: usize = 9;
pub const LINEAR_STATUS: usize = 13;

impl<'a> Linear<'a> {
    /// One delta for all rows, in 16 rows of x a block where the product is of few.
    pub fn of_one(case: &'a Case, x: &'a [u8], m: usize) -> Self {
        Linear {
            dtype: case.dtype,
            shape: case.shape,
            base: &case.base,
            x,
            m,
            arena: &case.blob,
            slots: None,
            tenant_of_row: None,
            biases: None,
            rows: 16,
            seed: 1,
        }
    }
}

impl Linear<'_> {
    pub fn launch(&self) -> Launch {
        let Shape { n, k } = self.shape;
        let name = self.dtype.name().to_lowercase();
        let w = self.dtype.word_bytes();
        let slots = self.slots.unwrap_or(&[]);
        let input = |bytes: &[u8]| Param::In(bytes.to_vec(), 0);
        let params = vec![
            input(self.x),
            input(self.base),
            self.biases.map_or(Param::Null, input),
            Param::U64(if slots.is_empty() { 0 } else { n as u64 }),
            input(self.arena),
            Param::U64(self.arena.len() as u64),
            self.slots.map_or(Param::Null, |s| {
                input(&s.iter().flatten().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>())
            }),
            Param::U64(slots.len() as u64),
            self.tenant_of_row
                .map_or(Param::Null, |t| input(&t.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>())),
            Param::Out(vec![0x5A; self.m * n * w], 0),
            Param::U64(self.m as u64),
            Param::U64(n as u64),
            Param::U64(k as u64),
            Param::Out(vec![0; 4], 0),
        ];
        // Words of two bytes have blocks of sixteen rows alone.
        let rows = *blocks_of(self.dtype).iter().find(|rows| **rows >= self.rows).unwrap();
        let blocks = (n.div_ceil(16).max(1) as u32, self.m.div_ceil(rows).max(1) as u32);
        Launch {
            kernel: format!("xorz_linear_small_{name}_m{rows}"),
            blocks,
            seed: self.seed,
            count: false,
            late: false,
            only: None,
            params,
        }
    }
}

/// The two launches of a product of many rows.
#[derive(Clone)]
pub struct Large {
    pub segments: Launch,
    pub product: Launch,
}

/// Where in the parameters of both the workspace is.
pub const LARGE_WORKSPACE: usize = 14;

/// Rows of x of a tile.
pub fn large_rows(dtype: Dtype) -> usize {
    if dtype == Dtype::F32 { 64 } else { 128 }
}

impl Linear<'_> {
    /// As cuda/README.md says: bytes of the workspace, and pairs of a panel and a tile of rows of x at most.
    fn large_sizes(&self) -> (usize, usize) {
        let (m, slots) = (self.m, self.slots.map_or(1, |s| s.len()));
        let (tenants, tiles) = (m.min(slots + 2), m / large_rows(self.dtype));
        let bytes = 64 + 144 * tenants + 16 * tiles + 4 * (slots + 2) + 4 * m;
        (bytes, (tiles + tenants) * self.shape.n.div_ceil(64))
    }

    /// On `blocks` blocks, or as many as there may be pairs.
    pub fn large(&self, blocks: Option<usize>, late: bool) -> Large {
        let (bytes, pairs) = self.large_sizes();
        let mut one = self.launch();
        one.late = late;
        one.params.push(Param::Out(vec![0xEE; bytes], 0));
        let name = self.dtype.name().to_lowercase();
        let blocks = blocks.unwrap_or(pairs).clamp(1, pairs.max(1)) as u32;
        let kernel = |what: &str, blocks| Launch {
            kernel: format!("xorz_linear_{what}_{name}"),
            blocks: (blocks, 1),
            ..one.clone()
        };
        Large { segments: kernel("segments", 1), product: kernel("large", blocks) }
    }
}

/// Run the products, each after its segments, on one status word and one workspace.
///
/// # Errors
/// What the runner or a sanitizer said.
pub fn run_large(device: &Device, all: &[Large]) -> Result<Vec<Vec<After>>, String> {
    let segments: Vec<_> = all.iter().map(|l| l.segments.clone()).collect();
    let left = device.run(&segments)?;
    let products: Vec<_> = all.iter().zip(left).map(|(l, mut left)| l.product_after(&mut left)).collect();
    device.run(&products)
}

impl Large {
    /// The second launch, on what the first has left.
    pub fn product_after(&self, left: &mut [After]) -> Launch {
        let mut product = self.product.clone();
        product.params[LARGE_WORKSPACE] = Param::In(std::mem::take(&mut left[LARGE_WORKSPACE].bytes), 0);
        product.params[LINEAR_STATUS] = Param::Out(std::mem::take(&mut left[LINEAR_STATUS].bytes), 0);
        product
    }
}

/// Tenants on one base, their deltas in one arena among rubbish.
pub struct Fleet {
    pub dtype: Dtype,
    pub shape: Shape,
    /// By slot; empty slots and the base (last) are of encoding `unchanged`.
    pub cases: Vec<Case>,
    pub arena: Vec<u8>,
    pub slots: Vec<[i64; 2]>,
    pub biases: Vec<u8>,
}

/// The tenants that a row may be of.
pub const TENANTS: [i32; 12] = [-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10];

impl Fleet {
    /// Tenants of each encoding, some on other tiles than usual, one unchanged, and an empty slot.
    pub fn new(
        rng: &mut Rng,
        dtype: Dtype,
        shape: Shape,
        words: impl Fn(&mut Rng, usize) -> Vec<u8>,
        share: f64,
    ) -> Self {
        let base = words(rng, shape.n * shape.k);
        let mut cases = Vec::new();
        let (mut arena, mut slots) = (vec![0xEE; 128], Vec::new());
        use Encoding::{Exponent, Raw, Sparse, Unchanged};
        let kinds = [
            Sparse, Sparse, Sparse, Exponent, Raw, Unchanged, Unchanged, Exponent, Exponent, Sparse, Exponent,
        ];
        for (slot, encoding) in kinds.into_iter().enumerate() {
            let other = words(rng, shape.n * shape.k);
            let share = if slot == 2 { share / 20.0 } else { share };
            // A tenant of each kind that `exponent` has: nearly all in streams, or nearly all exceptions.
            let streams = encoding == Exponent && slot != 10;
            let near = if streams { stepped_exactly(rng, dtype, &base) } else { base.clone() };
            let fine_tuned = rng.mix(dtype, &near, &other, if streams { share / 10.0 } else { share });
            let mut case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
            if streams && shape.n * shape.k > 1000 {
                assert_streams(&case.blob);
            }
            let encoded = Resident::parse(&case.blob).unwrap().header().encoding;
            match slot {
                1 if encoded == Sparse => case.blob = on_tiles(&case, 16, 256),
                7 if encoded == Exponent => case.blob = on_tiles(&case, 32, 256),
                8 if encoded == Exponent => case.blob = on_tiles(&case, 16, 1024),
                _ => {}
            }
            let empty = slot == 6;
            slots.push(if empty { [-5, 0] } else { [arena.len() as i64, case.blob.len() as i64] });
            arena.extend_from_slice(if empty { &[] } else { &case.blob });
            arena.resize(arena.len().next_multiple_of(64) + 64, 0xEE);
            cases.push(case);
        }
        cases.push(Case::new(dtype, shape, Unchanged, &base, &base));
        let biases = words(rng, cases.len() * shape.n);
        Self { dtype, shape, cases, arena, slots, biases }
    }

    fn place(&self, tenant: i32) -> usize {
        usize::try_from(tenant).unwrap_or(self.slots.len())
    }

    pub fn case(&self, tenant: i32) -> &Case {
        &self.cases[self.place(tenant)]
    }

    pub fn bias(&self, tenant: i32) -> &[u8] {
        let len = self.shape.n * self.dtype.word_bytes();
        &self.biases[self.place(tenant) * len..][..len]
    }

    pub fn launch(&self, x: &[u8], map: &[i32], rows: usize, seed: u64) -> Launch {
        self.linear(x, map, rows, seed, |linear| linear.launch())
    }

    /// As a product of many rows, on `blocks` blocks or as many as there may be pairs.
    pub fn large(&self, x: &[u8], map: &[i32], blocks: Option<usize>, late: bool, seed: u64) -> Large {
        self.linear(x, map, 16, seed, |linear| linear.large(blocks, late))
    }

    fn linear<T>(&self, x: &[u8], map: &[i32], rows: usize, seed: u64, f: impl Fn(&Linear<'_>) -> T) -> T {
        f(&Linear {
            dtype: self.dtype,
            shape: self.shape,
            base: &self.cases[0].base,
            x,
            m: map.len(),
            arena: &self.arena,
            slots: Some(&self.slots),
            tenant_of_row: Some(map),
            biases: Some(&self.biases),
            rows,
            seed,
        })
    }

    /// In f64, row by row.
    pub fn reference(&self, x: &[u8], map: &[i32]) -> Vec<f64> {
        let row = self.shape.k * self.dtype.word_bytes();
        let each = map
            .iter()
            .enumerate()
            .flat_map(|(i, &t)| self.case(t).reference(&x[i * row..(i + 1) * row], 1, Some(self.bias(t))));
        each.collect()
    }
}

/// How many rows of x a block of `linear_small` may have.
pub fn blocks_of(dtype: Dtype) -> &'static [usize] {
    if dtype == Dtype::F32 { &[4, 16] } else { &[16] }
}

/// Maps of `m` rows: all different, one tenant, the base, a few favourites, any, in runs, streams alone.
pub fn maps(rng: &mut Rng, m: usize) -> Vec<Vec<i32>> {
    let all = TENANTS.len() as u64;
    let mut any = |of: u64| TENANTS[(rng.next() % of) as usize];
    let (one, favourite) = (any(all), any(all));
    let zipf = (0..m).map(|i| if i % 5 < 3 { favourite } else { any(all) }).collect();
    let mixed = (0..m).map(|_| any(all)).collect();
    let distinct = (0..m).map(|i| TENANTS[i % TENANTS.len()]).collect();
    let runs = (0..m).map(|i| TENANTS[i * 5 / m.max(1) + 1]).collect();
    let streams = (0..m).map(|i| [3, 7, 8, 10][i % 4]).collect();
    let entries = (0..m).map(|i| [0, 1, 2, 9][i % 4]).collect();
    // Of those with entries 2, 5, 1 and 3 rows side by side, others between them.
    let groups = (0..m).map(|i| [0, 0, 1, 1, 1, 1, 1, 3, 2, 9, 9, 9, -1, -1, 3, 3][i % 16]).collect();
    vec![distinct, vec![one; m], vec![-1; m], zipf, mixed, runs, streams, entries, groups]
}

/// The kernels of this repository.
pub fn device() -> Device {
    Device::new("plain", &["-O2"])
}

/// The status word, parameter `at`.
pub fn status(after: &[After], at: usize) -> u32 {
    u32::from_le_bytes(after[at].bytes[..].try_into().unwrap())
}

/// Fine-tuned words with everything that arithmetic mishandles in a few places.
pub fn tuned(rng: &mut Rng, dtype: Dtype, base: &[u8], share: f64) -> Vec<u8> {
    let floating = matches!(dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16 | Dtype::F64);
    let near = perturbed(rng, dtype, base, share);
    let words = base.len() / dtype.word_bytes();
    let odd = if floating { adversarial(rng, dtype, words) } else { rng.bytes(base.len()) };
    rng.mix(dtype, &near, &odd, share / 8.0)
}

/// Every map of some numbers of rows, as launches, and what each shall give.
pub fn mixes(
    rng: &mut Rng,
    fleet: &Fleet,
    numbers: &[usize],
    x_of: impl Fn(&mut Rng, usize) -> Vec<u8>,
) -> Vec<(Launch, Vec<u8>, Vec<i32>)> {
    let mut all = vec![];
    for &m in numbers {
        let x = x_of(rng, m * fleet.shape.k);
        for map in maps(rng, m) {
            let rows = if m <= 4 { 4 } else { 16 };
            all.push((fleet.launch(&x, &map, rows, rng.next() % 3), x.clone(), map));
        }
    }
    all
}
