"""Tiny configs of transformers' architectures: what has a known name is made small, and what that does not fit is
said by name.
"""

from collections.abc import Collection
from typing import Any

VOCABULARY, IMAGE = 96, 32
_WIDTHS = "hidden_size d_model n_embd dim embed_dim embedding_size encoder_hidden_size decoder_hidden_size word_embed_proj_dim"
_INNER = "intermediate_size d_ff n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim moe_intermediate_size ffn_hidden_size"
_INNER += " hidden_dim shared_expert_intermediate_size block_ff_dim mlp_dim feed_forward_hidden_size intermediate_size_mlp"
_LAYERS = "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers num_decoder_layers num_encoder_layers"
_HEADS = "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"
SMALL = {
    **dict.fromkeys(_WIDTHS.split(), 32),
    **dict.fromkeys(_INNER.split(), 48),
    **dict.fromkeys(_LAYERS.split(), 2),
    **dict.fromkeys(_HEADS.split(), 4),
    **dict.fromkeys("num_key_value_heads multi_query_group_num num_kv_heads".split(), 2),
    **dict.fromkeys("num_local_experts num_experts n_routed_experts moe_num_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok moe_topk top_k moe_k num_selected_experts".split(), 2),
    **dict.fromkeys("head_dim d_kv kv_channels".split(), 8),
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "num_experts_shared": 1,
    "qk_head_dim": 16,
    "time_step_rank": 4,
    "depths": [1, 1],
    "image_size": IMAGE,
    "patch_size": 8,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "pad_token_id": 0,
    "sliding_window": 16,
    "attention_window": 4,
    "state_size": 8,
    "num_mel_bins": 16,
    "max_source_positions": 32,
    "max_target_positions": 32,
    "conv_dim": [16, 16],
    "conv_stride": [4, 4],
    "conv_kernel": [8, 8],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_expand": 2,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "n_mamba_heads": 2,
    "relative_attention_num_buckets": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "entity_vocab_size": VOCABULARY,
    "entity_emb_size": 16,
    "hidden_size_per_layer_input": 8,
}

# Given to the config's class, whose other sizes follow from these, and left as they are.
_MIXED = {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2}
_SWIN = {
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 2,
    "patch_size": 4,
    "image_size": 32,
}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2}
_STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1]}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 2},
    "granitemoehybrid": _MIXED,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 2},
    "recurrent_gemma": {"block_types": ("recurrent", "attention"), "num_hidden_layers": 2, "lru_width": 32},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "deepseek_v2": _EXPERTS,
    "dots1": {**_EXPERTS, "moe_intermediate_size": 16, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "hidden_size": 32},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_unified_assistant": {"num_kv_shared_layers": 0},
    "hrm_text": {"num_hidden_layers": 4, "num_layers_per_stack": 2, "H_cycles": 1, "L_cycles": 1},
    "hunyuan_v1_dense": {"head_dim": 8, **_HEADS},
    "hunyuan_v1_moe": {"head_dim": 8, **_HEADS},
    "ministral": {"head_dim": 8, **_HEADS},
    "nemotron": _HEADS,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "hidden_size": 32, "expand": 2, "n_groups": 1},
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "ngram_vocab_size_base": 97, "split_ngram_parts": 4,
    },
    "reformer": {
        "is_decoder": True, "axial_pos_embds": False, "hidden_size": 32, "attn_layers": ["local", "local"],
        "feed_forward_size": 48, "attention_head_size": 8,
    },
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 48},
    "xlstm": {"hidden_size": 32, "embedding_dim": 32, "num_heads": 4, "num_hidden_layers": 2, "num_blocks": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 4, "hidden_size": 32,
        "n_mamba_heads": 8, "mamba_d_state": 8, "num_attention_heads": 4, "intermediate_size": 48,
    },
    "esm": {"vocab_size": 96, "mask_token_id": 3, "pad_token_id": 1},
    "esmc": {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 96},
    "mpnet": {"pad_token_id": 1, "max_position_embeddings": 64},
    "perceiver": {
        "d_model": 32, "d_latents": 32, "num_latents": 4, "num_blocks": 1, "num_self_attends_per_block": 1,
        "num_self_attention_heads": 2, "num_cross_attention_heads": 2, "max_position_embeddings": 10,
    },
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "bailing_hybrid": {"layer_group_size": 2, "num_hidden_layers": 2, "first_k_dense_replace": 1, "head_dim": 8},
    "seamless_m4t": {"feature_projection_input_dim": 80},
    "seamless_m4t_v2": {"feature_projection_input_dim": 80},
    "wav2vec2-bert": {"vocab_size": 96, "feature_projection_input_dim": 80},
    "wav2vec2-conformer": {"vocab_size": 96},
    "sew": {"conv_dim": [16, 16], "conv_stride": [4, 4], "conv_kernel": [8, 8], "squeeze_factor": 2},
    "sew-d": {"conv_dim": [16, 16], "conv_stride": [4, 4], "conv_kernel": [8, 8], "squeeze_factor": 2},
    "kyutai_speech_to_text": {"audio_pad_token_id": 1, "codebook_vocab_size": 16},
    "bit": {**_STAGES, "embedding_size": 16, "num_groups": 4},
    "convnext": _STAGES,
    "convnextv2": _STAGES,
    "donut-swin": _SWIN,
    "swin": _SWIN,
    "swinv2": _SWIN,
    "efficientnet": {"hidden_dim": 128, "width_coefficient": 0.1, "depth_coefficient": 0.1, "image_size": 32},
    "levit": {
        "hidden_sizes": [16, 32, 32], "num_attention_heads": [2, 4, 4], "depths": [1, 1, 1], "key_dim": [8, 8, 8],
        "image_size": 64, "patch_size": 16,
    },
    "mobilevitv2": {"patch_size": 2, "image_size": 64},
    "siglip2": {},
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
}  # fmt: skip


def read(config: Any, name: str) -> Any:
    """A config's attribute; None where it has none, or another one for each layer."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def shrink(config: Any, kept: Collection[str] = ()) -> Any:
    """In place: what has a known name is made small, but for `kept`."""
    for name, value in SMALL.items():
        if name not in kept and isinstance(read(config, name), type(value)):
            try:
                setattr(config, name, value)
            except (AttributeError, NotImplementedError, TypeError, ValueError):
                continue
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        kinds = read(config, name)
        if isinstance(kinds, list) and kinds and name not in kept and "num_hidden_layers" not in kept:
            some = list(dict.fromkeys(kinds))[:3]
            count = max(2, len(some))
            try:
                setattr(config, name, (some * 2)[:count])
                config.num_hidden_layers = count
            except (AttributeError, NotImplementedError, TypeError, ValueError):
                continue
    for name in ("bos_token_id", "eos_token_id", "decoder_start_token_id"):
        if isinstance(read(config, name), int):
            setattr(config, name, 1)
    if read(config, "kv_lora_rank") and read(config, "num_key_value_heads"):
        config.num_key_value_heads = 4  # multi-head latent attention has as many
    if (
        "num_heads" not in kept
        and isinstance(read(config, "num_heads"), list)
        and isinstance(read(config, "depths"), list)
    ):
        config.num_heads = [2, 4]
    for name in getattr(config, "sub_configs", {}):
        inner = read(config, name)
        if inner is not None:
            shrink(inner, kept)
    return config


def bins(config: Any) -> int:
    """How many numbers a model takes for each moment of sound."""
    inner = [read(config, name) for name in getattr(config, "sub_configs", {})]
    for held in (config, *inner):
        for name in ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim"):
            if isinstance(read(held, name), int):
                return read(held, name)
    return 80
