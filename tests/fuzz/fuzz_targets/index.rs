//! `model.safetensors.index.json`, any text and any names, beside two shards: an error or an opened folder.
#![no_main]

mod support;

use libfuzzer_sys::fuzz_target;
use std::path::PathBuf;
use std::sync::OnceLock;
use support::{Choices, bounded, edit, folder};
use xorz::package::Checkpoint;

const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
const NAMES: [&str; 6] = ["a.weight", "b.weight", "", "c", "a.weight\0", "\u{202E}tensor"];

/// A folder with two shards of a tensor each.
fn place() -> &'static PathBuf {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    PLACE.get_or_init(|| {
        let place = folder().join("model");
        std::fs::create_dir_all(&place).expect("made");
        for (shard, name) in SHARDS.iter().zip(NAMES) {
            let header = format!(r#"{{"{name}":{{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]}}}}"#);
            let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 8]].concat();
            std::fs::write(place.join(shard), bytes).expect("written");
        }
        place
    })
}

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices::of(data);
    let text = match choices.byte() & 1 {
        0 => choices.rest().to_vec(),
        _ => {
            let shard = |choices: &mut Choices<'_>| match choices.byte() & 7 {
                i @ 0..2 => SHARDS[usize::from(i)].to_owned(),
                2 => format!("../{}", SHARDS[0]),
                3 => place().join(SHARDS[0]).display().to_string(),
                _ => String::from_utf8_lossy(choices.bytes(9)).into_owned(),
            };
            let mut map = serde_json::Map::new();
            for _ in 0..choices.below(6) {
                map.insert(choices.of_list(&NAMES).to_owned(), shard(&mut choices).into());
            }
            let whole = serde_json::json!({"metadata": {"total_size": choices.number(8)}, "weight_map": map});
            let mut text = whole.to_string().into_bytes();
            edit(&mut text, &mut choices);
            text
        }
    };
    std::fs::write(place().join("model.safetensors.index.json"), &text).expect("written");
    bounded(text.len(), || {
        for open in [Checkpoint::open, Checkpoint::open_base] {
            if let Ok(opened) = open(place()) {
                assert_eq!(opened.files().len(), 2);
                assert!(opened.tensors().count() == 2 && opened.find("a.weight").is_some());
            }
        }
    });
});
