//! Compiles the C++ half of the typed door (`src/ffi/bridge.rs`), if the feature `bridge` is on; and the CUDA kernels, if
//! `XORZ_NVCC` names the nvcc to do it with. CMakeLists.txt, which builds the library for torch, looks for one, and says in
//! `XORZ_WITHOUT_KERNELS` why there is none.

use std::path::Path;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(xorz_cuda)");
    println!("cargo::rerun-if-env-changed=XORZ_NVCC");
    match std::env::var_os("XORZ_NVCC").filter(|nvcc| !nvcc.is_empty()) {
        Some(nvcc) => kernels(Path::new(&nvcc)),
        None => {
            println!("cargo::rerun-if-env-changed=XORZ_WITHOUT_KERNELS");
            let why = std::env::var("XORZ_WITHOUT_KERNELS").unwrap_or_default();
            let why = if why.is_empty() { "no nvcc was named (XORZ_NVCC)" } else { &why };
            println!("cargo::rustc-env=XORZ_WITHOUT_KERNELS={why}");
        }
    }
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

/// `cuda/` through its CMakeLists.txt: one fatbin, which `src/cuda/image.rs` embeds.
fn kernels(nvcc: &Path) {
    println!("cargo::rerun-if-changed=cuda");
    let mut config = cmake::Config::new("cuda");
    // An isolated build has no make on PATH, but CMakeLists.txt knows where one is.
    if let Some(make) = std::env::var_os("XORZ_MAKE_PROGRAM") {
        config.define("CMAKE_MAKE_PROGRAM", make);
    }
    let threads = std::env::var("NUM_JOBS").unwrap_or_else(|_| "1".into());
    let built =
        config.define("XORZ_NVCC", nvcc).define("XORZ_NVCC_THREADS", threads).build_target("kernels").build();
    let folder = built.join("build");
    let toolkit = std::fs::read_to_string(folder.join("toolkit.txt"))
        .expect("cuda/CMakeLists.txt says its CUDA version");
    println!("cargo::rustc-env=XORZ_FATBIN={}", folder.join("xorz.fatbin").display());
    println!("cargo::rustc-env=XORZ_CUDA_TOOLKIT={}", toolkit.trim());
    println!("cargo::rustc-cfg=xorz_cuda");
}
