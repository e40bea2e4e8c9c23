//! Promise: the C ABI leaves nothing behind: what it hands out is freed by the function that its header names, and where there is
//! nowhere to hand it to, it is not made, or freed. Counted on the calling thread.

use crate::common::counting::held_by;
use crate::common::data::Rng;
use std::ffi::{CString, c_char, c_void};
use std::ptr::{null, null_mut};
use xorz::error::Kind;
use xorz::ffi::capi::*;
use xorz::matrix::{Dtype, Matrix, Shape};

const N: usize = 24;
const K: usize = 40;

fn of(words: &[u8]) -> XorzMatrix {
    XorzMatrix { words: words.as_ptr().cast(), bytes: words.len(), n: N, k: K, dtype: Dtype::BF16 as u32 }
}

fn empty() -> XorzBuffer {
    XorzBuffer { data: null_mut(), length: 0 }
}

/// What a call left behind; it must give `code`.
fn left(what: &str, code: i32, call: &mut dyn FnMut() -> i32) -> isize {
    let (got, held) = held_by(call);
    assert_eq!(got, code, "{what}");
    held.left
}

/// A call that gives its result to an output: nothing may be left of it with no output, and nothing after `free`, which is given
/// what came out.
fn leaves_nothing<T>(
    what: &str,
    nothing: T,
    call: &mut dyn FnMut(*mut T) -> i32,
    free: &mut dyn FnMut(*mut T),
) {
    let refused = Kind::InvalidArgument as i32;
    // The first call of each kind may fill what a thread or the process keeps.
    call(null_mut());
    assert_eq!(left(what, refused, &mut || call(null_mut())), 0, "{what} without an output leaks");
    let mut out = nothing;
    let mut both = || {
        let code = call(&raw mut out);
        free(&raw mut out);
        code
    };
    both();
    assert_eq!(left(what, 0, &mut both), 0, "{what} leaks what was freed");
}

fn free_buffer(buffer: *mut XorzBuffer) {
    // SAFETY: a buffer that a call has just filled, or an empty one.
    unsafe { xorz_buffer_free(buffer) };
}

#[test]
fn nothing_is_left_of_a_delta_that_nobody_takes() {
    let mut rng = Rng::new(5);
    let (base, ft) = (rng.weights(Dtype::BF16, N * K), rng.weights(Dtype::BF16, N * K));
    let (base, ft) = (of(&base), of(&ft));
    let (none, serial) = (null_mut::<XorzError>(), null::<XorzExecutor>());
    let mut delta = empty();
    // SAFETY: matrices, buffers and lengths are those of the vectors above, here and in every call below.
    assert_eq!(
        // SAFETY: matrices, executor and out pointers are valid; `none` asks for no error.
        unsafe { xorz_delta_encode(&raw const base, &raw const ft, 1, &raw mut delta, serial, none) },
        0
    );
    let (words, bytes) = (delta.data.cast::<c_void>().cast_const(), delta.length);
    for prefer in [0, 1] {
        let encode = &mut |out: *mut XorzBuffer| unsafe {
            // SAFETY: as above.
            xorz_delta_encode(&raw const base, &raw const ft, prefer, out, serial, none)
        };
        leaves_nothing("xorz_delta_encode", empty(), encode, &mut free_buffer);
    }
    let slice = &mut |out: *mut XorzBuffer| unsafe {
        // SAFETY: as above.
        xorz_delta_slice(words, bytes, &raw const base, 0, 3, 9, out, none)
    };
    leaves_nothing("xorz_delta_slice", empty(), slice, &mut free_buffer);
    let part = || XorzPart {
        delta: words,
        delta_bytes: bytes,
        base: XorzMatrix { words: base.words, bytes: base.bytes, n: base.n, k: base.k, dtype: base.dtype },
    };
    let parts = [part(), part()];
    let concat = &mut |out: *mut XorzBuffer| unsafe {
        // SAFETY: as above; `parts` has two items.
        xorz_delta_concat(parts.as_ptr(), 2, 1, out, none)
    };
    leaves_nothing("xorz_delta_concat", empty(), concat, &mut free_buffer);
    free_buffer(&raw mut delta);
}

#[test]
fn nothing_is_left_of_packages_and_bases_that_nobody_takes() {
    let dir = tempfile::tempdir().unwrap();
    let c = |name: &str| CString::new(dir.path().join(name).to_str().unwrap()).unwrap();
    let (package_path, base_path) = (c("p.xorz"), c("base.safetensors"));
    let mut rng = Rng::new(6);
    let (base, ft) = (rng.weights(Dtype::BF16, N * K), rng.weights(Dtype::BF16, N * K));
    let header = format!(r#"{{"w":{{"dtype":"BF16","shape":[{N},{K}],"data_offsets":[0,{}]}}}}"#, base.len());
    let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &base].concat();
    std::fs::write(dir.path().join("base.safetensors"), file).unwrap();
    let (none, name, dtype, dims) = (null_mut::<XorzError>(), c"w".as_ptr(), c"BF16".as_ptr(), [N, K]);
    let tensor = |words: &[u8]| XorzTensor {
        name,
        dtype,
        dims: dims.as_ptr(),
        rank: 2,
        data: words.as_ptr().cast(),
        bytes: words.len(),
    };
    let how = XorzOptions { prefer: 1, codec: 1, level: 0, trust: 1, strip_prefix: null::<c_char>() };
    let mut writer = null_mut();
    let new = &mut |out: *mut *mut XorzWriter| unsafe {
        // SAFETY: path and options are valid.
        xorz_writer_new(package_path.as_ptr(), &raw const how, out, none)
    };
    // SAFETY: filled by the call before, and freed once.
    leaves_nothing("xorz_writer_new", null_mut(), new, &mut |out| unsafe { xorz_writer_free(*out) });
    assert_eq!(new(&raw mut writer), 0);
    let (new_tensor, old_tensor) = (tensor(&ft), tensor(&base));
    // SAFETY: the writer was just made; tensors and their dimensions outlive the calls.
    unsafe {
        assert_eq!(xorz_writer_add(writer, &raw const new_tensor, &raw const old_tensor, none), 0);
        assert_eq!(xorz_writer_finish(writer, null_mut(), none), 0);
    }

    let mut package = null_mut();
    // SAFETY: the path is valid.
    let open =
        &mut |out: *mut *mut XorzPackage| unsafe { xorz_package_open(package_path.as_ptr(), out, none) };
    // SAFETY: filled by the call before, and closed once.
    leaves_nothing("xorz_package_open", null_mut(), open, &mut |out| unsafe { xorz_package_close(*out) });
    assert_eq!(open(&raw mut package), 0);
    // SAFETY: the package is open, here and below.
    let describe = &mut |out: *mut XorzBuffer| unsafe { xorz_package_describe(package, out, none) };
    leaves_nothing("xorz_package_describe", empty(), describe, &mut free_buffer);
    let matrix = of(&base);
    let resident = &mut |out: *mut XorzBuffer| unsafe {
        // SAFETY: the matrix is that of `base`.
        xorz_package_resident(package, name, &raw const matrix, -1, out, none)
    };
    leaves_nothing("xorz_package_resident", empty(), resident, &mut free_buffer);
    let digest = Matrix::new(Dtype::BF16, Shape { n: matrix.n, k: matrix.k }, &base).unwrap().digest();
    let known = &mut |out: *mut XorzBuffer| unsafe {
        // SAFETY: as above; the digest has its 16 bytes.
        xorz_package_resident_known(package, name, &raw const matrix, digest.0.as_ptr(), -1, out, none)
    };
    leaves_nothing("xorz_package_resident_known", empty(), known, &mut free_buffer);

    let (mut old, one) = (null_mut(), XorzRun { jobs: 1, flags: 0, stop: null() });
    let open_base = &mut |out: *mut *mut XorzBase| unsafe {
        // SAFETY: the path and the run are valid.
        xorz_base_open(base_path.as_ptr(), &raw const one, out, none)
    };
    // SAFETY: filled by the call before, and closed once.
    leaves_nothing("xorz_base_open", null_mut(), open_base, &mut |out| unsafe { xorz_base_close(*out) });
    assert_eq!(open_base(&raw mut old), 0);
    let from = &mut |out: *mut XorzBuffer| unsafe {
        // SAFETY: package and base are open.
        xorz_package_resident_from(package, name, old, 1, out, none)
    };
    leaves_nothing("xorz_package_resident_from", empty(), from, &mut free_buffer);
    // SAFETY: both are open, and closed once.
    unsafe {
        xorz_base_close(old);
        xorz_package_close(package);
    }
}
