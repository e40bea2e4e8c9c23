//! Promise: a delta that is made from a package as it is loaded is the very one that encoding base and fine-tune gives, from a
//! base in a file or in memory, whatever the words and however many pieces a tensor has; and a base that is another one, or
//! is another one by the time it is read, gives none.

use crate::common::data::{Rng, adversarial, matrix, perturbed, stepped};
use crate::common::exchanged::exchanged;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use xorz::codec::Prefer;
use xorz::error::{Error, Kind};
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::package::{Base, Codec, PackOptions, Package, Run, SafeTensors, Tensor, Trust, Writer};
use xorz::resident::{Resident, encode_pair, restore};

/// A base in a file and in memory, and a package of one fine-tune of it.
struct Loaded {
    dir: tempfile::TempDir,
    dtype: Dtype,
    shape: Shape,
    base: Vec<u8>,
    tuned: Vec<u8>,
    package: Package,
}

impl Loaded {
    fn new(dtype: Dtype, dims: &[usize], base: Vec<u8>, tuned: Vec<u8>, codec: Option<Codec>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let text = format!(
            r#"{{"w":{{"dtype":"{}","shape":{dims:?},"data_offsets":[0,{}]}}}}"#,
            dtype.name(),
            base.len()
        );
        let file = [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &base].concat();
        fs::write(dir.path().join("base.safetensors"), file).unwrap();
        let path = dir.path().join("p.xorz");
        let mut w = Writer::create(&path, PackOptions { codec, ..PackOptions::default() }).unwrap();
        let t = |bytes| Tensor { name: "w", dtype: dtype.name(), dims, bytes };
        w.add(&t(&tuned), Some(&t(&base))).unwrap();
        w.finish().unwrap();
        let package = Package::open(&path).unwrap();
        assert!(codec.is_none_or(|codec| package.entries()[0].codec == codec), "{dtype} {dims:?}");
        Self { dir, dtype, shape: Shape::of_dims(dims).unwrap(), base, tuned, package }
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("base.safetensors")
    }

    fn matrix<'a>(&self, words: &'a [u8]) -> Matrix<'a> {
        matrix(self.dtype, self.shape, words)
    }

    /// What loading gives where the words are elsewhere.
    fn known(&self, base: &Matrix<'_>, prefer: Option<Prefer>) -> Result<Option<Vec<u8>>, Error> {
        self.package.resident_known("w", (base.dtype(), base.shape(), base.digest()), prefer)
    }

    /// What loading gives is what encoding gives, for both preferences.
    fn compare(&self, what: &str) {
        let on_disk = Base::open(&self.file(), &Run::default()).unwrap();
        let base = self.matrix(&self.base);
        assert!(exchanged(&self.package, "w", &base).unwrap() == self.tuned, "{what}: in place");
        for prefer in [Prefer::Speed, Prefer::Memory] {
            let want = encode_pair(&base, &self.matrix(&self.tuned), prefer).unwrap();
            let from_file = on_disk.resident(&self.package, "w", Some(prefer)).unwrap();
            assert!(from_file == want, "{what} {prefer:?}: from a file");
            let in_memory = self.package.resident("w", &base, Some(prefer)).unwrap();
            assert!(in_memory == want, "{what} {prefer:?}: from memory");
            let by_digest = self.known(&base, Some(prefer)).unwrap();
            assert!(by_digest.is_none_or(|made| made == want), "{what} {prefer:?}: by the digest");
            let mut out = vec![0; self.tuned.len()];
            restore(&Resident::parse(&want).unwrap(), &base, &mut out).unwrap();
            assert!(out == self.tuned, "{what} {prefer:?}: restored");
        }
    }
}

/// One piece and many, rows of one word and rows longer than a piece, runs of one row.
const SHAPES: [&[usize]; 7] =
    [&[3, 70], &[1237, 1023], &[700_001], &[3, 450_001], &[70, 150_000], &[300_000, 1], &[64, 9, 1200]];

#[test]
fn what_is_loaded_is_what_encoding_gives() {
    let mut rng = Rng::new(71);
    for dims in SHAPES {
        let words: usize = dims.iter().product();
        let base = rng.weights(Dtype::BF16, words);
        let few = perturbed(&mut rng, Dtype::BF16, &base, 0.004);
        // Of the longest rows, whose pieces are cut without regard to rows, once will do.
        if words > 1 << 22 {
            Loaded::new(Dtype::BF16, dims, base, few, Some(Codec::Predicted)).compare(&format!("{dims:?}"));
            continue;
        }
        let odd = adversarial(&mut rng, Dtype::BF16, words);
        let tuned = [
            few.clone(),
            stepped(&mut rng, Dtype::BF16, &base, 2e-4),
            rng.mix(Dtype::BF16, &few, &odd, 0.01),
        ];
        for (i, tuned) in tuned.into_iter().enumerate() {
            let codec = Some(Codec::Predicted);
            let loaded = Loaded::new(Dtype::BF16, dims, base.clone(), tuned, codec);
            loaded.compare(&format!("{dims:?} {i}"));
        }
        let loaded =
            Loaded::new(Dtype::BF16, dims, base.clone(), rng.bytes(2 * words), Some(Codec::Predicted));
        loaded.compare(&format!("{dims:?} random"));
    }
    for dtype in [Dtype::F16, Dtype::F32, Dtype::U8] {
        let base = rng.weights(dtype, 1237 * 511);
        let tuned = perturbed(&mut rng, dtype, &base, 0.01);
        for codec in [Codec::Predicted, Codec::Planes, Codec::Xor, Codec::ResidentZstd] {
            let loaded = Loaded::new(dtype, &[1237, 511], base.clone(), tuned.clone(), Some(codec));
            loaded.compare(&format!("{dtype} {codec:?}"));
        }
    }
}

/// All changes are in rows that a sample does not see: the plan is chosen again from all tiles.
#[test]
fn changes_that_the_sample_misses_are_loaded_as_encoding_gives_them() {
    let mut rng = Rng::new(72);
    let (n, k) = (3000, 1024);
    let base = rng.weights(Dtype::BF16, n * k);
    let mut tuned = base.clone();
    tuned[2 * k * 900..2 * k * 905].iter_mut().for_each(|b| *b ^= 0x5A);
    for codec in [Codec::Predicted, Codec::Planes] {
        Loaded::new(Dtype::BF16, &[n, k], base.clone(), tuned.clone(), Some(codec)).compare("missed");
    }
}

#[test]
fn a_base_that_is_another_by_the_time_it_is_read_gives_no_delta() {
    let mut rng = Rng::new(73);
    for dims in [&[1237usize, 1023][..], &[700_001], &[70, 150_000]] {
        let words: usize = dims.iter().product();
        let base = rng.weights(Dtype::BF16, words);
        let tuned = perturbed(&mut rng, Dtype::BF16, &base, 0.004);
        let loaded = Loaded::new(Dtype::BF16, dims, base.clone(), tuned, Some(Codec::Predicted));
        // A word of any piece, changed after the base was opened and its digest computed.
        for at in [0, words / 3, words / 2, words - 1] {
            let on_disk = Base::open(&loaded.file(), &Run::default()).unwrap();
            let data = SafeTensors::open(&loaded.file()).unwrap().file_bytes() - 2 * words as u64;
            let file = fs::OpenOptions::new().write(true).open(loaded.file()).unwrap();
            let place = data + 2 * at as u64;
            file.write_all_at(&[base[2 * at] ^ 1], place).unwrap();
            for prefer in [Prefer::Speed, Prefer::Memory] {
                let e = on_disk.resident(&loaded.package, "w", Some(prefer)).unwrap_err();
                assert!(matches!(e.kind(), Kind::Mismatch | Kind::Io), "{dims:?} {at}: {e}");
                assert!(e.message().contains('w'), "{e}");
            }
            file.write_all_at(&[base[2 * at]], place).unwrap();
        }
        // In memory the digest tells at once.
        let mut other = base.clone();
        other[words] ^= 1;
        let e = loaded.package.resident("w", &loaded.matrix(&other), Some(Prefer::Speed)).unwrap_err();
        assert_eq!(e.kind(), Kind::Mismatch);
        let e = exchanged(&loaded.package, "w", &loaded.matrix(&other)).unwrap_err();
        assert_eq!(e.kind(), Kind::Mismatch);
    }
}

/// Parts are of a few MiB, however many pieces they are made of; who takes them may end it.
#[test]
fn exchanges_of_a_package_are_given_in_parts() {
    let mut rng = Rng::new(74);
    let base = rng.weights(Dtype::BF16, 4096 * 2048);
    let tuned = perturbed(&mut rng, Dtype::BF16, &base, 0.001);
    let loaded = Loaded::new(Dtype::BF16, &[4096, 2048], base.clone(), tuned.clone(), None);
    let matrix = loaded.matrix(&base);
    let mut sizes = Vec::new();
    let give = &mut |range: std::ops::Range<usize>, _: &[u8], _: u64| {
        sizes.push(range.len());
        Ok(())
    };
    loaded.package.exchanges("w", &matrix, give).unwrap();
    assert_eq!(sizes, [4 << 20; 4]);
    let give = &mut |_: std::ops::Range<usize>, _: &[u8], _: u64| Err(Error::io("the disk is full"));
    let e = loaded.package.exchanges("w", &matrix, give).unwrap_err();
    assert!(e.kind() == Kind::Io && e.message() == "tensor `w`: the disk is full", "{e}");
}

#[test]
fn real_pairs_are_loaded_as_encoding_gives_them() {
    let pairs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/pairs");
    let dir = std::env::var_os("XORZ_PAIRS").map_or(pairs, PathBuf::from);
    let Ok(list) = fs::read_dir(&dir) else {
        eprintln!("SKIPPED real_pairs_are_loaded_as_encoding_gives_them: no {}", dir.display());
        return;
    };
    let mut seen = 0;
    for path in list.map(|e| e.unwrap().path()) {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let Some((stem, _)) = name.split_once(".ft") else { continue };
        let base = SafeTensors::open(&dir.join(format!("{stem}.base.safetensors"))).unwrap();
        let tuned = SafeTensors::open(&path).unwrap();
        for t in &tuned.header().tensors {
            let (Some(dtype), Some(b)) = (Dtype::from_name(&t.dtype), base.find(&t.name)) else { continue };
            if t.bytes() == 0 || dtype.word_bytes() > 4 || b.dims != t.dims {
                continue;
            }
            let words = (base.read(b).unwrap(), tuned.read(t).unwrap());
            Loaded::new(dtype, &t.dims, words.0, words.1, Some(Codec::Predicted)).compare(&t.name);
            seen += 1;
        }
    }
    assert!(seen > 20, "{seen} tensors in {}", dir.display());
}

#[test]
fn words_that_are_elsewhere_are_asked_for_where_no_delta_is_stored_and_another_digest_gives_none() {
    let mut rng = Rng::new(72);
    let base = rng.weights(Dtype::BF16, 90 * 70);
    let tuned = perturbed(&mut rng, Dtype::BF16, &base, 0.1);
    let dims = [90, 70];
    for codec in [Codec::Resident, Codec::ResidentZstd, Codec::Predicted, Codec::Planes, Codec::Unchanged] {
        let new = if codec == Codec::Unchanged { base.clone() } else { tuned.clone() };
        let given = (codec != Codec::Unchanged).then_some(codec);
        let made = Loaded::new(Dtype::BF16, &dims, base.clone(), new.clone(), given);
        let (old, new) = (made.matrix(&base), made.matrix(&new));
        let stored = made.package.entries()[0].prefer;
        for prefer in [None, Some(Prefer::Speed), Some(Prefer::Memory)] {
            let found = made.known(&old, prefer).unwrap();
            let holds = matches!(codec, Codec::Resident | Codec::ResidentZstd);
            let at_once = codec == Codec::Unchanged || (holds && (prefer.is_none() || prefer == stored));
            assert_eq!(found.is_some(), at_once, "{codec:?} {prefer:?} of {stored:?}");
            if let Some(found) = found {
                let want = encode_pair(&old, &new, prefer.or(stored).unwrap_or(Prefer::Memory)).unwrap();
                assert!(found == want, "{codec:?} {prefer:?}");
            }
            for wrong in [made.matrix(&tuned), matrix(Dtype::BF16, Shape { n: 70, k: 90 }, &base)] {
                let error = made.known(&wrong, prefer).unwrap_err();
                assert_eq!(error.kind(), Kind::Mismatch, "{error}");
                let said = error.to_string();
                assert!(
                    said.contains("`w`") && (said.contains("digest") || said.contains("[70, 90]")),
                    "{said}"
                );
            }
        }
    }
}

#[test]
fn a_digest_does_not_speak_for_a_base_where_a_sha256_must() {
    let mut rng = Rng::new(73);
    let base = rng.weights(Dtype::BF16, 40 * 70);
    let tuned = perturbed(&mut rng, Dtype::BF16, &base, 0.1);
    let dir = tempfile::tempdir().unwrap();
    let (path, dims) = (dir.path().join("p.xorz"), [40, 70]);
    let options =
        PackOptions { codec: Some(Codec::Resident), trust: Trust::Sha256, ..PackOptions::default() };
    let mut w = Writer::create(&path, options).unwrap();
    let t = |bytes| Tensor { name: "w", dtype: "BF16", dims: &dims, bytes };
    w.add(&t(&tuned), Some(&t(&base))).unwrap();
    w.finish().unwrap();
    let mut package = Package::open(&path).unwrap();
    let old = matrix(Dtype::BF16, Shape { n: 40, k: 70 }, &base);
    let known = (old.dtype(), old.shape(), old.digest());
    assert!(package.resident_known("w", known, None).unwrap().is_some());
    package.trust_in(Trust::Sha256).unwrap();
    assert!(package.resident_known("w", known, None).unwrap().is_none());
}
