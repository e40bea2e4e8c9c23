//! Promise: what people have in their folders packs: droppings of systems and the state of trainings are left out, caches are
//! understood, an index of an earlier save is not believed; and what cannot be packed is refused with a sentence that helps.

use crate::common::disk::{done, matrices, model, names, refused, safetensors, tree};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let (base, ft) = matrices(81, 4, 64, 128);
    model(&dir.path().join("base"), &base, 2);
    model(&dir.path().join("ft"), &ft, 2);
    dir
}

/// Pack `ft` against `base`, and give it back.
fn there_and_back(d: &Path, base: &str, ft: &str) -> String {
    let said = done(d, &["pack", base, ft, "-o", "p"]);
    let _ = fs::remove_dir_all(d.join("out"));
    done(d, &["unpack", base, "p", "-o", "out"]);
    done(d, &["verify", base, "p", ft]);
    said
}

#[test]
fn what_systems_drop_into_folders_is_left_out_of_either_side() {
    let dir = folder();
    let d = dir.path();
    let clean = tree(&d.join("ft"));
    for side in ["base", "ft"] {
        let at = |name: &str| d.join(side).join(name);
        // AppleDouble files of macOS, which bear the name of the file that they belong to.
        fs::write(at("._model-00001-of-00002.safetensors"), b"\x00\x05\x16\x07Mac OS X").unwrap();
        fs::write(at("._x.safetensors"), b"").unwrap();
        for name in [".DS_Store", "Thumbs.db", "desktop.ini", ".nfs0000000000a1b2", "._config.json"] {
            fs::write(at(name), b"junk").unwrap();
        }
        for name in ["__MACOSX", ".ipynb_checkpoints", "@eaDir", ".git", ".cache/huggingface/download"] {
            fs::create_dir_all(at(name)).unwrap();
            fs::write(at(name).join("model.safetensors"), b"junk").unwrap();
        }
    }
    there_and_back(d, "base", "ft");
    assert!(tree(&d.join("out")) == clean, "{:?}", names(&d.join("out")));
}

#[test]
fn the_state_of_a_training_is_left_out_and_said() {
    let dir = folder();
    let d = dir.path();
    let clean = tree(&d.join("ft"));
    let states = [
        "optimizer.pt",
        "rng_state_0.pth",
        "global_step7/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "optimizer_0/__0_0.distcp",
    ];
    for name in states {
        fs::create_dir_all(d.join("ft").join(name).parent().unwrap()).unwrap();
        fs::write(d.join("ft").join(name), vec![b'P'; 2 << 20]).unwrap();
    }
    let said = there_and_back(d, "base", "ft");
    assert!(said.contains("global_step7") && said.contains("3 more") && said.contains("training"), "{said}");
    assert!(tree(&d.join("out")) == clean);
    // Small files may be anything, and come along.
    for name in ["scheduler.pt", "training_args.bin"] {
        fs::write(d.join("ft").join(name), b"PK\x03\x04").unwrap();
    }
    there_and_back(d, "base", "ft");
    assert!(d.join("out/scheduler.pt").exists() && d.join("out/training_args.bin").exists());
    // Weights in a pickle are no state of a training: they might be the model.
    fs::write(d.join("ft/pytorch_model.bin"), vec![0; 2 << 20]).unwrap();
    refused(d, &["pack", "base", "ft", "-o", "q"], 3, &["pytorch_model.bin", "safe_serialization"]);
}

#[test]
fn models_of_other_programs_are_no_pickles() {
    let dir = folder();
    let d = dir.path();
    fs::write(d.join("ft/openvino_model.bin"), vec![7; 2 << 20]).unwrap();
    fs::write(d.join("ft/openvino_model.xml"), b"<net/>").unwrap();
    there_and_back(d, "base", "ft");
    assert!(tree(&d.join("out")) == tree(&d.join("ft")));
    // Where there is nothing else, they are named for what they are.
    fs::create_dir(d.join("only")).unwrap();
    fs::write(d.join("only/openvino_model.bin"), vec![7; 2 << 20]).unwrap();
    fs::write(d.join("only/openvino_model.xml"), b"<net/>").unwrap();
    refused(d, &["pack", "base", "only", "-o", "q"], 2, &["openvino_model.xml", "another program"]);
}

#[test]
fn an_index_of_an_earlier_save_is_not_believed() {
    let dir = folder();
    let d = dir.path();
    let (_, ft) = matrices(81, 4, 64, 128);
    for file in ["model.safetensors", "weights.safetensors"] {
        for side in ["base", "ft"] {
            let at = d.join(format!("{side}.one"));
            let _ = fs::remove_dir_all(&at);
            fs::create_dir(&at).unwrap();
            let index = "model.safetensors.index.json";
            fs::copy(d.join(side).join(index), at.join(index)).unwrap();
            fs::write(at.join(file), safetensors(&ft)).unwrap();
        }
        there_and_back(d, "base.one", "ft.one");
        assert!(tree(&d.join("out")) == tree(&d.join("ft.one")));
    }
    // Of a folder that lacks weights it is believed.
    fs::write(d.join("ft.one/weights.safetensors"), safetensors(&ft[1..])).unwrap();
    refused(d, &["pack", "base", "ft.one", "-o", "q"], 1, &["index.json", "not in the folder"]);
}

/// A model's folder in a Hugging Face cache: blobs by their hashes, and snapshots of links to them.
fn cached(hub: &Path, from: &Path, revisions: &[&str]) {
    let blobs = hub.join("blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(hub.join("refs")).unwrap();
    for revision in revisions {
        let snapshot = hub.join("snapshots").join(revision);
        fs::create_dir_all(&snapshot).unwrap();
        for name in names(from) {
            fs::copy(from.join(&name), blobs.join(format!("sha-{name}-{revision}"))).unwrap();
            symlink(format!("../../blobs/sha-{name}-{revision}"), snapshot.join(&name)).unwrap();
        }
    }
}

#[test]
fn folders_of_a_cache_are_taken_for_the_snapshot_in_them() {
    let dir = folder();
    let d = dir.path();
    cached(&d.join("hub/models--a--base"), &d.join("base"), &["0123abc"]);
    cached(&d.join("hub/models--a--ft"), &d.join("ft"), &["1111", "2222"]);
    fs::remove_file(d.join("hub/models--a--base/snapshots/0123abc/config.json")).unwrap();
    let base = "hub/models--a--base";
    for base in [base, "hub/models--a--base/snapshots", "hub/models--a--base/blobs"] {
        there_and_back(d, base, "ft");
    }
    // A README whose blob is gone says nothing of a base.
    symlink("../../blobs/gone", d.join(base).join("snapshots/0123abc/README.md")).unwrap();
    there_and_back(d, base, "ft");
    refused(d, &["pack", "base", "hub/models--a--ft", "-o", "q"], 2, &["2 snapshots", "snapshots/1111"]);
    fs::write(d.join("hub/models--a--ft/refs/main"), b"2222\n").unwrap();
    there_and_back(d, base, "hub/models--a--ft");
    assert!(tree(&d.join("out")) == tree(&d.join("ft")));
    refused(d, &["pack", "hub", "ft", "-o", "q"], 2, &["cache of 2 models", "models--a--base"]);
    // Of a fine-tune nothing is left out unsaid; of weights, neither.
    let shard = "model-00001-of-00002.safetensors";
    symlink("../../blobs/gone", d.join("hub/models--a--ft/snapshots/2222/README.md")).unwrap();
    refused(d, &["pack", "base", "hub/models--a--ft", "-o", "q"], 4, &["README.md", "fetch the file again"]);
    fs::remove_file(d.join(base).join(format!("blobs/sha-{shard}-0123abc"))).unwrap();
    refused(d, &["pack", base, "ft", "-o", "q"], 4, &[shard, "fetch the file again"]);
}

#[test]
fn links_to_folders_are_followed_in_a_base() {
    let dir = folder();
    let d = dir.path();
    fs::create_dir_all(d.join("pipe.base")).unwrap();
    fs::create_dir_all(d.join("pipe.ft")).unwrap();
    symlink("../base", d.join("pipe.base/unet")).unwrap();
    symlink("..", d.join("pipe.base/up")).unwrap();
    fs::rename(d.join("ft"), d.join("pipe.ft/unet")).unwrap();
    let said = there_and_back(d, "pipe.base", "pipe.ft");
    assert!(said.contains("4 deltas") && said.contains("0 stored alone"), "{said}");
}

#[test]
fn adapters_are_told_what_they_are() {
    let dir = folder();
    let d = dir.path();
    fs::create_dir(d.join("lora")).unwrap();
    let (_, mut tensors) = matrices(82, 2, 8, 128);
    for (i, t) in tensors.iter_mut().enumerate() {
        t.0 = format!("base_model.model.model.layers.0.q_proj.lora_{}.weight", ["A", "B"][i]);
    }
    fs::write(d.join("lora/adapter_model.safetensors"), safetensors(&tensors)).unwrap();
    fs::write(d.join("lora/adapter_config.json"), b"{}").unwrap();
    let said = there_and_back(d, "base", "lora");
    assert!(said.contains("LoRA adapter") && said.contains("merge_and_unload"), "{said}");
}

#[test]
fn bytes_after_the_last_tensor_are_refused_with_advice() {
    let dir = folder();
    let d = dir.path();
    let path = d.join("ft/model-00001-of-00002.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    bytes.extend([0; 3]);
    fs::write(&path, bytes).unwrap();
    refused(d, &["pack", "base", "ft", "-o", "q"], 3, &["model-00001", "3 bytes follow", "fetch", "anew"]);
}
