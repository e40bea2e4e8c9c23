//! The processor by CPUID: Intel's and AMD's manuals of the architecture, "CPUID".

use crate::vector::processor::{Processor, Vendor};
use std::arch::x86_64::{__cpuid, __cpuid_count, __get_cpuid_max, _xgetbv, CpuidResult};

/// Leaf `leaf`, if the processor has it.
fn leaf(leaf: u32, sub: u32) -> Option<CpuidResult> {
    let most = __get_cpuid_max(leaf & 0x8000_0000).0;
    (leaf <= most).then(|| __cpuid_count(leaf, sub))
}

/// The one that runs this.
pub(crate) fn processor() -> Processor {
    let first = __cpuid(0);
    let name: Vec<u8> = [first.ebx, first.edx, first.ecx].iter().flat_map(|r| r.to_le_bytes()).collect();
    let vendor = match name.as_slice() {
        b"AuthenticAMD" | b"HygonGenuine" => Vendor::Amd,
        b"GenuineIntel" => Vendor::Intel,
        _ => Vendor::Other,
    };
    let signature = leaf(1, 0).map_or(0, |l| l.eax);
    let field = |from: u32, bits: u32| signature >> from & ((1 << bits) - 1);
    let family = if field(8, 4) == 15 { 15 + field(20, 8) } else { field(8, 4) };
    let model = field(4, 4) | field(16, 4) << 4;
    let caches = if vendor == Vendor::Amd { 0x8000_001D } else { 4 };
    Processor { vendor, family, model, amx_bf16: amx_bf16(), cache_bytes: largest_cache(caches) }
}

/// AMX-BF16, and tiles that the system saves for a thread (XCR0 bits 17 and 18).
fn amx_bf16() -> bool {
    let saves = leaf(1, 0).is_some_and(|l| l.ecx >> 27 & 1 == 1);
    let has = leaf(7, 0).is_some_and(|l| l.edx >> 22 & 1 == 1);
    // SAFETY: OSXSAVE is on, so that XGETBV is there.
    has && saves && unsafe { tiles_are_saved() }
}

#[target_feature(enable = "xsave")]
fn tiles_are_saved() -> bool {
    // SAFETY: register 0 exists wherever XGETBV does.
    unsafe { _xgetbv(0) >> 17 & 3 == 3 }
}

/// Bytes of the largest cache that a leaf describes, one sub-leaf per cache (the same form with Intel and
/// AMD).
fn largest_cache(described: u32) -> usize {
    let caches = (0..16).map_while(|sub| leaf(described, sub).filter(|l| l.eax & 31 != 0));
    let bytes = |l: CpuidResult| {
        let part = |from: u32, bits: u32| (l.ebx >> from & ((1 << bits) - 1)) as usize + 1;
        part(22, 10) * part(12, 10) * part(0, 12) * (l.ecx as usize + 1)
    };
    caches.map(bytes).max().unwrap_or(0)
}
