//! Checkpoints that are packed, given back, verified and compared.

use super::data::{Rng, stepped};
use super::disk::{Tensor, names, safetensors, tree};
use std::fs;
use std::path::Path;
use xorz::matrix::Dtype;
use xorz::package::{
    Destination, Entry, PackOptions, Package, Report, Run, pack_files, unpack_files, verify_files,
};

/// A tensor of a checkpoint.
pub fn t(name: &str, dtype: &'static str, dims: &[usize], bytes: &[u8]) -> Tensor {
    (name.into(), dtype, dims.to_vec(), bytes.to_vec())
}

/// Files of a folder by path.
pub type Files<'a> = [(&'a str, Vec<Tensor>)];

fn write(dir: &Path, files: &Files<'_>) {
    for (path, tensors) in files {
        fs::create_dir_all(dir.join(path).parent().unwrap()).unwrap();
        fs::write(dir.join(path), safetensors(tensors)).unwrap();
    }
}

/// A package, and all that it was made of, in a folder.
pub struct Packed {
    pub report: Report,
    pub dir: tempfile::TempDir,
}

impl Packed {
    /// Pack `ft` against `base`, give it back, verify it, and compare everything.
    pub fn of(base: &Files<'_>, ft: &Files<'_>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        write(&at("base"), base);
        write(&at("ft"), ft);
        let (run, options) = (Run { jobs: 2, ..Run::default() }, PackOptions::default());
        let report = pack_files(&at("base"), &at("ft"), Destination::Path(&at("p")), &options, &run).unwrap();
        unpack_files(&at("base"), &at("p"), Destination::Path(&at("out")), &run).unwrap();
        assert!(tree(&at("out")) == tree(&at("ft")));
        verify_files(&at("base"), &at("p"), Some(&at("ft")), &run).unwrap();
        verify_files(&at("base"), &at("p"), None, &run).unwrap();
        assert!(names(dir.path()).iter().all(|n| !n.starts_with('.')));
        Self { report, dir }
    }

    /// Of single files.
    pub fn one(base: &[Tensor], ft: &[Tensor]) -> Self {
        Self::of(&[("model.safetensors", base.to_vec())], &[("model.safetensors", ft.to_vec())])
    }

    /// It takes at most this share of its tensors, and a KiB and a half for each.
    pub fn takes(&self, share: f64) {
        let most = self.report.tensor_bytes as f64 * share + 1536.0 * (1 + self.report.tensors) as f64;
        assert!((self.report.package_bytes as f64) < most, "{most}: {:?}", self.report);
    }

    pub fn entry(&self, name: &str) -> Entry {
        Package::open(&self.dir.path().join("p")).unwrap().entry(name).unwrap().clone()
    }
}

/// `words` weights and a fine-tune of them.
pub fn tuned(rng: &mut Rng, words: usize) -> (Vec<u8>, Vec<u8>) {
    let base = rng.weights(Dtype::BF16, words);
    let ft = stepped(rng, Dtype::BF16, &base, 1e-6);
    (base, ft)
}
