//! Compiles the C++ half of the typed door (`src/ffi/bridge.rs`). Does nothing unless the feature `bridge` is on.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "bridge")]
    {
        for file in ["src/ffi/bridge.rs", "csrc/executor.h"] {
            println!("cargo::rerun-if-changed={file}");
        }
        cxx_build::bridge("src/ffi/bridge.rs")
            .include("csrc")
            .std("c++20")
            .flag("-fvisibility=hidden")
            .compile("xorz_bridge");
    }
}
