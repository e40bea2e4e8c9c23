//! What is known of the processor: who made it, its family, and what it has beside the instruction sets of
//! `dispatch`. What the cost model goes by where a choice changes bits, since this never changes on a
//! machine, as a measurement does.

use std::sync::OnceLock;

/// Who made a processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Vendor {
    /// "AuthenticAMD".
    Amd,
    /// "GenuineIntel".
    Intel,
    /// Anybody else, or not known.
    #[default]
    Other,
}

/// A processor, by CPUID; all zeros where there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Processor {
    /// Who made it.
    pub(crate) vendor: Vendor,
    /// Family, the extended one included: 25 is Zen 3 and 4, 26 Zen 5, 6 every Intel of today.
    pub(crate) family: u32,
    /// Model within the family, the extended one included.
    pub(crate) model: u32,
    /// Matrix units that multiply bf16 (AMX-BF16), switched on by the system.
    pub(crate) amx_bf16: bool,
    /// Bytes of the largest cache, 0 if not known.
    pub(crate) cache_bytes: usize,
}

impl Processor {
    /// The one that runs this, asked once.
    pub(crate) fn here() -> &'static Self {
        static HERE: OnceLock<Processor> = OnceLock::new();
        HERE.get_or_init(Self::detect)
    }

    #[cfg(target_arch = "x86_64")]
    fn detect() -> Self {
        super::x86_64::cpuid::processor()
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn detect() -> Self {
        Self::default()
    }
}

impl std::fmt::Display for Processor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} family {} model {}", self.vendor, self.family, self.model)?;
        f.write_str(if self.amx_bf16 { " with AMX" } else { "" })
    }
}
