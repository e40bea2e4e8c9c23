//! What each kernel takes, in order: one table per kernel, which declares the struct that a caller fills in,
//! packs it, and is compared with the kernels' sources by `tests/rust/cuda/plan.rs`.

#![forbid(unsafe_code)]

/// The type of a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An address of device memory; 0 is null.
    Pointer,
    /// A number of 64 bits.
    U64,
    /// A number of 32 bits.
    U32,
}

/// Most parameters of any kernel.
pub const MOST: usize = 16;

/// Parameters of `xorz_linear_small_*`: all but the workspace.
pub const SMALL: usize = 14;

/// Parameters as the driver takes them: each begins a word of 64 bits, little-endian, as every host of a CUDA
/// device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed {
    words: [u64; MOST],
    count: usize,
}

impl Packed {
    /// The first `count` of them.
    #[must_use]
    pub fn first(mut self, count: usize) -> Self {
        self.count = count.min(self.count);
        self
    }

    /// The words, one per parameter.
    pub fn words_mut(&mut self) -> &mut [u64] {
        &mut self.words[..self.count]
    }
}

/// Parameters of a kernel.
pub trait Params {
    /// Name and type of each, in order.
    const TABLE: &'static [(&'static str, Kind)];

    /// As the driver takes them.
    fn pack(&self) -> Packed;
}

macro_rules! params {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $kind:ident,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[allow(missing_docs)]
        pub struct $name {
            $(pub $field: params!(@type $kind),)*
        }

        impl Params for $name {
            const TABLE: &'static [(&'static str, Kind)] = &[$((stringify!($field), Kind::$kind),)*];

            fn pack(&self) -> Packed {
                let fields = [$(u64::from(self.$field)),*];
                let mut words = [0; MOST];
                words[..fields.len()].copy_from_slice(&fields);
                Packed { words, count: fields.len() }
            }
        }
    };
    (@type Pointer) => { u64 };
    (@type U64) => { u64 };
    (@type U32) => { u32 };
}

params! {
    /// Of `xorz_delta_restore_*`; `cuda/README.md` says what each is.
    Restore {
        base: Pointer,
        out: Pointer,
        delta: Pointer,
        delta_bytes: U64,
        n: U64,
        k: U64,
        dtype: U32,
        status: Pointer,
        row_from: U64,
        rows: U64,
    }
}

params! {
    /// Of `xorz_delta_verify_*` and `xorz_delta_apply_*`.
    Apply {
        weight: Pointer,
        delta: Pointer,
        delta_bytes: U64,
        n: U64,
        k: U64,
        dtype: U32,
        status: Pointer,
        verdicts: Pointer,
        verdict_count: U64,
    }
}

params! {
    /// Of `xorz_digest_leaves`.
    DigestLeaves {
        words: Pointer,
        n: U64,
        row_bytes: U64,
        workspace: Pointer,
    }
}

params! {
    /// Of `xorz_digest_root`.
    DigestRoot {
        workspace: Pointer,
        n: U64,
        k: U64,
        word_bytes: U32,
        dtype: U32,
        delta: Pointer,
        delta_bytes: U64,
        status: Pointer,
        verdict: Pointer,
        digest: Pointer,
    }
}

params! {
    /// Of `xorz_delta_embedding_*`.
    Embedding {
        indices: Pointer,
        weight: Pointer,
        arena: Pointer,
        arena_bytes: U64,
        slots: Pointer,
        slot_count: U64,
        tenant_of_row: Pointer,
        out: Pointer,
        m: U64,
        n: U64,
        k: U64,
        dtype: U32,
        status: Pointer,
    }
}

params! {
    /// Of `xorz_linear_segments_*`, `xorz_linear_large_*` and `xorz_linear_grad_*`; `xorz_linear_small_*` takes the first
    /// [`SMALL`] of them.
    Linear {
        x: Pointer,
        weight: Pointer,
        biases: Pointer,
        bias_stride: U64,
        arena: Pointer,
        arena_bytes: U64,
        slots: Pointer,
        slot_count: U64,
        tenant_of_row: Pointer,
        out: Pointer,
        m: U64,
        n: U64,
        k: U64,
        status: Pointer,
        workspace: Pointer,
    }
}
