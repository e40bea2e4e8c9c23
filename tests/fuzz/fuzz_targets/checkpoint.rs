//! Base and fine-tune as safetensors files, made of the fuzzer's choices and then edited: an error, or a package that gives the very
//! file back, by every codec.
#![no_main]

mod support;

use libfuzzer_sys::fuzz_target;
use support::{Choices, bounded, edit, folder, pair};
use xorz::codec::Prefer;
use xorz::matrix::Dtype;
use xorz::package::{Codec, Destination, Header, PackOptions, Run, pack_files, unpack_files};

const NAMES: [&str; 8] =
    ["w", "layers.0.w", "layers.1.w", "model.layers.0.w", "experts.w", "é", "lm_head.weight", "w "];
/// Others than those with a code: half bytes, exponents, complex numbers, what nobody knows.
const KINDS: [(&str, usize); 6] =
    [("F4", 4), ("F6_E2M3", 6), ("F8_E8M0", 8), ("C64", 64), ("X16", 16), ("U3", 3)];

/// A tensor's part of the header, without its place, and its bytes in both files.
struct Made {
    name: &'static str,
    dtype: String,
    dims: Vec<usize>,
    base: Vec<u8>,
    tuned: Vec<u8>,
}

fn tensor(choices: &mut Choices<'_>, i: usize) -> Made {
    let dims: Vec<usize> = (0..choices.below(4)).map(|_| choices.below(23)).collect();
    let elements: usize = dims.iter().product();
    let name = NAMES[(i + choices.below(2)) % NAMES.len()];
    let (seed, dense) = (u64::from(choices.byte()), choices.byte());
    if choices.byte() < 200 {
        let dtype = choices.of_list(&Dtype::ALL);
        let (base, tuned) = pair(dtype, elements, seed, dense);
        return Made { name, dtype: dtype.name().into(), dims, base, tuned };
    }
    let (kind, bits) = choices.of_list(&KINDS);
    let (base, tuned) = pair(Dtype::U8, (elements * bits).div_ceil(8), seed, dense);
    Made { name, dtype: kind.into(), dims, base, tuned }
}

/// A file of tensors; `tuned` has the fine-tuned words, may lack tensors, and have more rows of one.
fn file(tensors: &[Made], tuned: bool, choices: &mut Choices<'_>) -> Vec<u8> {
    let (mut header, mut data) = (String::from("{"), Vec::new());
    for t in tensors {
        let (how, mut dims) = (choices.byte(), t.dims.clone());
        if how < 10 {
            continue;
        }
        let mut bytes = if tuned { t.tuned.clone() } else { t.base.clone() };
        if how < 30 && dims.len() > 1 && dims[0] > 0 {
            let row = bytes.len() / dims[0];
            dims[0] += 1;
            bytes.extend(vec![how; row]);
        }
        let end = data.len() + bytes.len();
        let place = format!(r#""data_offsets":[{},{end}]"#, data.len());
        let comma = if header.len() > 1 { "," } else { "" };
        header += &format!(r#"{comma}"{}":{{"dtype":"{}","shape":{dims:?},{place}}}"#, t.name, t.dtype);
        data.extend(bytes);
    }
    header += "}";
    header += &" ".repeat(choices.below(9));
    let mut out = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    if choices.byte() < 80 {
        edit(&mut out, choices);
    }
    out
}

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices::of(data);
    let _ = bounded(data.len(), || Header::parse(data));
    let tensors: Vec<Made> = (0..1 + choices.below(5)).map(|i| tensor(&mut choices, i)).collect();
    let (base, tuned) = (file(&tensors, false, &mut choices), file(&tensors, true, &mut choices));
    let codec = Codec::ALL.into_iter().nth(choices.below(9)).filter(|c| c.delta());
    let options = PackOptions {
        codec,
        prefer: choices.of_list(&[Prefer::Speed, Prefer::Memory]),
        fast: choices.byte() & 1 == 0,
        ..PackOptions::default()
    };
    let place = folder();
    let [b, f, p] = ["base", "tuned", "p.xorz"].map(|name| place.join(name));
    std::fs::write(&b, &base).expect("written");
    std::fs::write(&f, &tuned).expect("written");
    let run = Run { jobs: 1, ..Run::default() };
    let (mut package, mut back) = (Vec::new(), Vec::new());
    bounded(data.len() + base.len() + 2 * tuned.len(), || {
        if pack_files(&b, &f, Destination::Stream(&mut package), &options, &run).is_err() {
            return;
        }
        std::fs::write(&p, &package).expect("written");
        unpack_files(&b, &p, Destination::Stream(&mut back), &run).expect("what was packed unpacks");
        assert!(back == tuned, "another file came back");
    });
});
