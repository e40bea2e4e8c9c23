//! Why a fine-tune's tensors are no deltas: what a newcomer who packed against the wrong base, or in another dtype, is told.

use crate::package::format::container::TensorInfo;

/// Counts tensors to which no base tensor belongs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lonely {
    bytes: u64,
    total: u64,
    /// The largest one, and why.
    worst: Option<(u64, String)>,
}

impl Lonely {
    /// Count a fine-tuned tensor; `named` is the base tensor that it would be a delta of: dtype and dimensions.
    pub(crate) fn count(&mut self, name: &str, ft: Kind<'_>, bytes: u64, named: Option<Kind<'_>>) {
        self.total = self.total.saturating_add(bytes);
        if named.is_some_and(|base| base == ft) {
            return;
        }
        self.bytes = self.bytes.saturating_add(bytes);
        if self.worst.as_ref().is_none_or(|(most, _)| bytes > *most) {
            self.worst = Some((bytes, reason(name, ft, named)));
        }
    }

    /// [`Lonely::count`] of a tensor of a file.
    pub(super) fn count_info(&mut self, t: &TensorInfo, named: Option<&TensorInfo>) {
        self.count(&t.name, (&t.dtype, &t.dims), t.bytes(), named.map(|b| (b.dtype.as_str(), &*b.dims)));
    }

    /// What to do about it, where it is most of the fine-tune.
    pub(crate) fn advice(&self) -> Option<String> {
        let (_, why) = self.worst.as_ref().filter(|_| self.bytes > self.total / 2)?;
        let share = 100.0 * self.bytes as f64 / self.total as f64;
        Some(format!("{share:.0} % of the fine-tune's bytes are stored alone, not as deltas: {why}"))
    }
}

/// Parts of names that adapters' tensors have.
const ADAPTER: [&str; 9] =
    ["lora_A", "lora_B", "lora_down", "lora_up", "lora_embedding", ".lora.", "hada_w", "lokr_w", "ia3_"];

fn adapter(name: &str) -> bool {
    ADAPTER.iter().any(|part| name.contains(part))
}

/// Dtype and dimensions of a tensor.
type Kind<'a> = (&'a str, &'a [usize]);

fn reason(name: &str, ft: Kind<'_>, base: Option<Kind<'_>>) -> String {
    match base {
        None if adapter(name) => format!(
            "`{name}` is of a LoRA adapter, which is small by itself and changes no tensor of the base: keep and serve it as it \
             is, or merge it (`merge_and_unload` of peft), save that, and pack what was saved"
        ),
        None => format!(
            "the base has no tensor `{name}`; is it this fine-tune's base? Where only the names differ, --strip-prefix or \
             renaming helps"
        ),
        Some((dtype, _)) if dtype != ft.0 => format!(
            "`{name}` is {} in the fine-tune, but {dtype} in the base; save both in one dtype (deltas are exact, so nothing \
             is converted)",
            ft.0
        ),
        Some((_, dims)) => format!(
            "`{name}` is {:?} in the fine-tune, but {dims:?} in the base; is it this fine-tune's base?",
            ft.1
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_is_given_where_most_is_alone_and_names_the_largest_tensor_and_both_values() {
        let mut lonely = Lonely::default();
        lonely.count("a", ("F32", &[4, 4]), 64, Some(("F32", &[4, 4])));
        lonely.count("small", ("F32", &[4]), 16, None);
        assert_eq!(lonely.advice(), None);
        lonely.count("big", ("F32", &[64, 64]), 16384, Some(("BF16", &[64, 64])));
        let text = lonely.advice().unwrap();
        assert!(
            text.starts_with("100 %") && text.contains("`big` is F32") && text.contains("BF16"),
            "{text}"
        );
        lonely.count("bigger", ("F32", &[64, 128]), 32768, Some(("F32", &[64, 64])));
        assert!(lonely.advice().unwrap().contains("[64, 128] in the fine-tune, but [64, 64]"));
        lonely.count("biggest", ("F32", &[128, 128]), 65536, None);
        assert!(lonely.advice().unwrap().contains("no tensor `biggest`"));
    }
}
