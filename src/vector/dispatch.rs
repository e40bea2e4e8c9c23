//! Which instance of the vector trait runs: chosen once, on the first op, from what the machine has.
//!
//! `XORZ_ISA=scalar|avx2|avx512|avx512vbmi2|avx512bf16` in the environment asks for a lower one; an unknown
//! or unavailable value is an error of the first op, not a silent other choice. Must hold no kernel.

use crate::error::{Error, Result};
use std::sync::OnceLock;

/// An instruction set that the kernels are compiled for. All give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Portable code; every machine has it.
    Scalar,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F and BW.
    Avx512,
    /// AVX-512 with VBMI2, which decodes `exponent` at the speed of memory.
    Avx512Vbmi2,
    /// The same with the bf16 dot product, which `mode = "fast"` uses: its bits then differ from those of the
    /// others.
    Avx512Bf16,
}

impl Isa {
    /// Every instruction set, slowest first.
    pub const ALL: [Self; 5] = [Self::Scalar, Self::Avx2, Self::Avx512, Self::Avx512Vbmi2, Self::Avx512Bf16];

    /// The name that `XORZ_ISA` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Vbmi2 => "avx512vbmi2",
            Self::Avx512Bf16 => "avx512bf16",
        }
    }

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        on_isa!(self, _s => ()).is_ok()
    }

    /// The one that ops use: the fastest that the machine has, or the one that `XORZ_ISA` names.
    ///
    /// # Errors
    /// `InvalidArgument` for an unknown `XORZ_ISA`, `Unsupported` for one that this machine lacks.
    pub fn active() -> Result<Self> {
        static ACTIVE: OnceLock<Result<Isa>> = OnceLock::new();
        ACTIVE.get_or_init(|| Self::choose(std::env::var("XORZ_ISA").ok().as_deref())).clone()
    }

    /// [`Isa::active`] for a given value of the environment variable.
    ///
    /// # Errors
    /// `InvalidArgument` for an unknown name, `Unsupported` for an instruction set that this machine lacks.
    pub fn choose(asked: Option<&str>) -> Result<Self> {
        let Some(asked) = asked.filter(|a| !a.is_empty()) else {
            return Ok(Self::ALL.into_iter().rfind(|isa| isa.is_available()).unwrap_or(Self::Scalar));
        };
        let isa = Self::ALL.into_iter().find(|isa| isa.name() == asked).ok_or_else(|| {
            Error::invalid(format!(
                "XORZ_ISA is \"{asked}\"; it takes one of scalar, avx2, avx512, avx512vbmi2, avx512bf16"
            ))
        })?;
        if !isa.is_available() {
            return Err(Error::unsupported(format!("XORZ_ISA is \"{asked}\", which this machine lacks")));
        }
        Ok(isa)
    }
}

/// Run `$body` with `$s` bound to the instance of `$isa`; `Err` where the machine lacks it. The body is
/// compiled once per instance, so it should be a call.
macro_rules! on_isa {
    ($isa:expr, $s:ident => $body:expr) => {
        match $isa {
            crate::vector::Isa::Scalar => {
                let $s = crate::vector::scalar::Scalar;
                Ok($body)
            }
            #[cfg(target_arch = "x86_64")]
            crate::vector::Isa::Avx2 => match crate::vector::x86_64::avx2::Avx2::detect() {
                Some($s) => Ok($body),
                None => Err(crate::vector::dispatch::lacking($isa)),
            },
            #[cfg(target_arch = "x86_64")]
            crate::vector::Isa::Avx512 => match crate::vector::x86_64::avx512::Avx512::detect() {
                Some($s) => Ok($body),
                None => Err(crate::vector::dispatch::lacking($isa)),
            },
            #[cfg(target_arch = "x86_64")]
            crate::vector::Isa::Avx512Vbmi2 => {
                match crate::vector::x86_64::avx512_more::Avx512Vbmi2::detect() {
                    Some($s) => Ok($body),
                    None => Err(crate::vector::dispatch::lacking($isa)),
                }
            }
            #[cfg(target_arch = "x86_64")]
            crate::vector::Isa::Avx512Bf16 => {
                match crate::vector::x86_64::avx512_more::Avx512Bf16::detect() {
                    Some($s) => Ok($body),
                    None => Err(crate::vector::dispatch::lacking($isa)),
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            isa => Err(crate::vector::dispatch::lacking(isa)),
        }
    };
}
pub(crate) use on_isa;

#[cold]
pub(crate) fn lacking(isa: Isa) -> Error {
    Error::unsupported(format!("this machine lacks {}", isa.name()))
}
