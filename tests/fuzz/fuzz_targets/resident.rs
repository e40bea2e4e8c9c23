//! Any bytes as a resident delta, as they are and behind right digests, and any pair encoded and restored. Nothing may panic, hang
//! or allocate much, and what is encoded comes back.
#![no_main]

mod support;

use libfuzzer_sys::fuzz_target;
use support::{bounded, seal};
use xorz::codec::Prefer;
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::resident::{Resident, concat, encode_pair, restore, slice};

fuzz_target!(|data: &[u8]| {
    // A base and an output as large as the header says exist only if a caller has them: at most 64 KiB here.
    bounded(data.len() + (4 << 16), || {
        read(data);
        sealed(data);
        // Choosing among tens of thousands of tables takes a hundred times as long as reading, once it is instrumented.
        if data.last().is_some_and(|last| last & 7 == 0) {
            round_trip(data);
        }
    });
});

fn read(data: &[u8]) {
    let Ok(delta) = Resident::parse(data) else { return };
    let _ = delta.check();
    let (dtype, shape) = (delta.header().dtype, delta.header().shape);
    // A base as large as the header says exists only if a caller has it.
    let Ok(bytes @ ..=65536) = shape.bytes(dtype) else { return };
    for index in 0..delta.grid().tiles() {
        let _ = delta.tile(index);
    }
    let base = vec![0x3F; bytes];
    let Ok(base) = Matrix::new(dtype, shape, &base) else { return };
    let _ = restore(&delta, &base, &mut vec![0; bytes]);
    let _ = slice(&delta, &base, 0, 0..shape.n / 2);
    let _ = slice(&delta, &base, 1, shape.k / 3..shape.k);
}

/// The same with the digests of content and base made right: past the checks that catch mistakes.
fn sealed(data: &[u8]) {
    let Ok(delta) = Resident::parse(data) else { return };
    let (dtype, shape) = (delta.header().dtype, delta.header().shape);
    let Ok(bytes @ ..=65536) = shape.bytes(dtype) else { return };
    let base = vec![0x3F; bytes];
    let Ok(base) = Matrix::new(dtype, shape, &base) else { return };
    let mut data = data.to_vec();
    seal::reseal_for(&mut data, base.digest().0);
    read(&data);
    let Ok(delta) = Resident::parse(&data) else { return };
    let _ = delta.check_full(&base);
    let _ = concat(&[(delta.clone(), base), (delta, base)], usize::from(data[0] & 1));
}

fn round_trip(data: &[u8]) {
    let [dtype, k, data @ ..] = data else { return };
    let dtype = Dtype::ALL[usize::from(*dtype) % Dtype::ALL.len()];
    let row = (1 + usize::from(*k)) * dtype.word_bytes();
    let n = data.len() / 2 / row;
    let (base, rest) = data.split_at(n * row);
    let shape = Shape { n, k: 1 + usize::from(*k) };
    let (Ok(base), Ok(fine_tuned)) =
        (Matrix::new(dtype, shape, base), Matrix::new(dtype, shape, &rest[..n * row]))
    else {
        return;
    };
    for prefer in [Prefer::Speed, Prefer::Memory] {
        let bytes = encode_pair(&base, &fine_tuned, prefer).expect("every pair can be encoded");
        let delta = Resident::parse(&bytes).expect("what was encoded parses");
        delta.check().expect("what was encoded is sound");
        let mut out = vec![0; n * row];
        restore(&delta, &base, &mut out).expect("what was encoded restores");
        assert!(out == fine_tuned.bytes(), "another matrix came back");
    }
}
