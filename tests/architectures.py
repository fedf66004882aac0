"""Tiny random checkpoints of every causal language model that the installed transformers knows."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.conftest import byte_tokenizer

LAYERS = 4
VOCAB = 260  # the 257 tokens of the byte tokenizer, and three that stand for images and sound and are in no text
DEFAULT = object()  # leaves a field to its config class

# What makes a model small, under all the names that configs have for it.
NAMES: list[tuple[int, str]] = [
    (VOCAB, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks"),
    (1, "encoder_layers num_encoder_layers depth"),
    (
        64,
        "hidden_size n_embd d_model dim emb_dim embedding_dim embedding_size word_embed_proj_dim input_embedding_size "
        "output_embedding_size hidden_size_global backbone_hidden_size out_hidden_size",
    ),
    (
        96,
        "intermediate_size intermediate_size_mlp dense_intermediate_size n_inner ffn_dim decoder_ffn_dim "
        "encoder_ffn_dim ffn_hidden_size dim_ff dff d_inner feed_forward_size mlp_dim",
    ),
    (
        4,
        "num_attention_heads attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads",
    ),
    (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads"),
    (16, "head_dim attention_head_dim swa_head_dim dim_head kv_channels"),
    (8, "rotary_dim"),
    (128, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length"),
    (
        8,
        "sliding_window sliding_window_size attention_window_size attention_chunk_size local_attention "
        "local_attention_window_len window_size keep_window_size local_attn_chunk_length lsh_attn_chunk_length",
    ),
    # mixtures of experts
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num"),
    (2, "num_experts_per_tok moe_topk moe_k top_k_experts"),
    (1, "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group"),
    (1, "first_k_dense_replace num_dense_layers"),
    (
        32,
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
        "moe_shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size",
    ),
    # latent and indexed attention
    (32, "q_lora_rank"),
    (16, "kv_lora_rank qk_nope_head_dim v_head_dim index_head_dim indexer_head_dim indexer_budget"),
    (8, "qk_rope_head_dim o_lora_rank"),
    (4, "index_topk indexer_compress_ratio"),
    (2, "index_n_heads indexer_n_heads"),
    (1, "indexer_kv_heads"),
    # linear attention and state spaces
    (16, "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_head_dim mamba_d_head mamba_headdim"),
    (2, "linear_num_key_heads"),
    (4, "linear_num_value_heads linear_num_heads"),
    (8, "mamba_n_heads mamba_num_heads n_mamba_heads mamba_chunk_size chunk_size block_size"),
    (16, "mamba_d_state state_size ssm_state_size"),
    # images and sound
    (28, "image_size crop_size"),
    (14, "patch_size"),
    (VOCAB - 1, "image_token_id image_token_index"),
    (VOCAB - 2, "video_token_id vision_start_token_id boi_token_id boi_token_index"),
    (VOCAB - 3, "audio_token_id vision_end_token_id eoi_token_id eoi_token_index boa_token_id eoa_token_index"),
    # tokens
    (0, "pad_token_id"),
    (256, "bos_token_id eos_token_id"),
]
SIZES: dict[str, Any] = {name: size for size, names in NAMES for name in names.split()} | {"is_decoder": True}

SLIDING = ["sliding_attention", "full_attention"] * 2
LINEAR = ["linear_attention", "full_attention"] * 2
DENSE_SPARSE = ["dense", "sparse"] * 2
# What single types, or parts of them, need besides: sizes that fit together, and layers of all their kinds.
OVERRIDES: dict[str, dict[str, Any]] = {
    **{kind: {"layer_types": SLIDING} for kind in ("gemma3_text", "kolibri1", "ministral")},
    **{kind: {"use_sliding_window": True, "max_window_layers": 2} for kind in ("dots1", "qwen2", "qwen2_moe", "qwen3")},
    **{kind: {"layer_types": LINEAR} for kind in ("kimi_linear", "minimax")},
    **{kind: {"layer_types": ["conv", "full_attention"] * 2} for kind in ("lfm2", "lfm2_moe")},
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 300},
    "cohere2_moe": {"first_k_dense_replace": 1},
    "cohere_compass_text": {
        "layer_types": SLIDING,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in SLIDING},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v3": {"n_routed_experts": 8, "n_group": 2},
    "deepseek_v4": {
        "layer_types": ["sliding_attention", "compressed_sparse_attention"] + ["heavily_compressed_attention"] * 2
    },
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64, "downsample_hidden_size": 8},
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64, "mlp_layer_types": DENSE_SPARSE},
    "emu3": {"vocabulary_map": {"<image>": VOCAB - 1}},
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "attn_resolutions": [1], "codebook_size": 16},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "layer_types": SLIDING + SLIDING[:2],
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 4,
    },
    "gemma4_text": {
        "num_hidden_layers": 6,
        "layer_types": SLIDING + SLIDING[:2],
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
        "global_head_dim": 32,
    },
    "gemma4_text:moe": {
        "layer_types": SLIDING,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 32,
        "enable_moe_block": True,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
    "gemma4_assistant.text_config": {
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
    },
    "gemma4_vision": {"position_embedding_size": 64},
    "gemma4_unified_text": {"layer_types": SLIDING, "global_head_dim": 32},
    "gemma4_unified_vision": {"mm_embed_dim": 64, "mm_posemb_size": 16, "output_proj_dims": 64, "patch_size": 4},
    "glm_moe_dsa": {"indexer_types": ["full", "shared"] * 2},
    "got_ocr2_vision": {"output_channels": 16, "global_attn_indexes": [1, 3]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hrm_text": {"num_hidden_layers": 8, "num_layers_per_stack": 4},
    "inkling2_text": {"layer_types": ["hybrid_sliding", "hybrid"] * 2},
    "inkling_text": {"layer_types": ["hybrid_sliding", "hybrid"] * 2, "mlp_layer_types": DENSE_SPARSE},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "laguna": {"layer_types": SLIDING, "num_attention_heads_per_layer": [4, 8] * 2},
    "llama4_text": {"interleave_moe_layer_step": 2, "no_rope_layers": [1, 0, 1, 0]},
    "llama4_vision_model": {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "mellum": {"layer_types": SLIDING, "mlp_layer_types": DENSE_SPARSE},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "mlp_layer_types": DENSE_SPARSE,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "mllama_text_model": {"cross_attention_layers": [1]},
    "mllama_vision_model": {"intermediate_layers_indices": [0, 1], "num_global_layers": 1, "vision_output_dim": 192},
    "phi4_multimodal_audio": {
        "nemo_conv_channels": 16,
        "ext_pw_out_channel": 64,
        "depthwise_separable_out_channel": 64,
    },
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [1],
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 100,
        "split_ngram_parts": 4,
        "make_ngram_vocab_size_divisible_by": 8,
    },
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"] * 2, "num_buckets": 4, "hash_seed": 0},
    "roc_bert": {"shape_vocab_size": 32, "shape_embed_dim": 16, "pronunciation_embed_dim": 16},
    "smollm3": {"layer_types": SLIDING, "use_sliding_window": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention"] * 2 + ["hybrid", "linear_attention"] * 2,
        "num_key_value_heads": 4,
        "attention_head_dim": DEFAULT,
        "num_logits_to_keep": 0,
    },
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "hybrid"] * 3,
        "num_key_value_heads": 4,
        "attention_head_dim": DEFAULT,
        "head_dim": DEFAULT,
        "num_mem_blocks": 2,
        "adapter_rank": 4,
        "use_shared_attention_adapter": True,
        "use_mem_rope": True,
        "num_logits_to_keep": 0,
    },
    "zaya": {"num_experts_per_tok": 1},
}
# What no tiny random model can be made of, or none that runs on its own, and why.
UNBUILDABLE: dict[str, str] = {
    "emu3": "transformers looks for the weights of the causal model under other names than it saves them",
    "gemma3n": "its images need the packages timm and pillow",
    "gemma4_assistant": "runs only on the keys and values of the model that it assists",
    "gemma4_unified_assistant": "runs only on the keys and values of the model that it assists",
    "musicgen": "transformers makes the causal model from another config than the mapping's",
    "musicgen_melody": "transformers makes the causal model from another config than the mapping's",
}
REPRESENTATIVE = (
    "llama",
    "qwen3",
    "gemma3_text",
    "gemma3",
    "gemma3n_text",
    "gpt2",
    "opt",
    "bloom",
    "falcon",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    "llama4_text",
    "jamba",
    "dbrx",
    "jetmoe",
    "zamba2",
    "hrm_text",
)
VARIANTS = ("gemma4_text:moe",)
TYPES = [t for t in (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS) if t.split(":")[0] in CONFIG_MAPPING]


def config_of(model_type: str) -> PreTrainedConfig:
    """A small config of a model type, or of a variant of it (`type:variant`)."""
    config_class = CONFIG_MAPPING[model_type.split(":")[0]]
    return config_class(**_arguments(config_class, model_type))


def _arguments(config_class: type[PreTrainedConfig], model_type: str) -> dict[str, Any]:
    """What a config is made with so that it and its parts are small."""
    known = {field.name for field in fields(config_class)}
    chosen = {name: size for name, size in SIZES.items() if name in known}
    if "kv_lora_rank" in known:  # latent attention has sizes of its own for heads
        chosen |= {"num_key_value_heads": 4, "head_dim": DEFAULT}
    for name, part in (getattr(config_class, "sub_configs_defaults", None) or {}).items():
        part_class = CONFIG_MAPPING[part.model_type] if part.config_class is AutoConfig else part.config_class
        chosen[name] = {"model_type": part.model_type, **_arguments(part_class, part.model_type)}
        chosen[name] |= OVERRIDES.get(f"{model_type}.{name}", {})
    older = (
        {} if hasattr(config_class, "sub_configs_defaults") else config_class.sub_configs
    )  # before transformers 5.20
    for name, part_class in older.items():
        if part_class is AutoConfig:
            continue
        chosen[name] = {"model_type": part_class.model_type, **_arguments(part_class, part_class.model_type)}
        chosen[name] |= OVERRIDES.get(f"{model_type}.{name}", {})
    chosen |= OVERRIDES.get(model_type, {})
    return {name: value for name, value in chosen.items() if value is not DEFAULT}


def model_of(model_type: str) -> PreTrainedModel:
    """A small fp32 model as it is published, so with its eyes and ears where they are kept beside the language model.

    Weights are wide enough that every layer matters; no norm is one and no bias zero.
    """
    torch.manual_seed(0)
    config = config_of(model_type)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if model.config.model_type != config.model_type:
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            if tensor.ndim >= 2 and tensor.is_floating_point() and not any(tensor is table for table in tables):
                tensor.normal_(std=0.2)
            elif tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor), alpha=0.05)
            tensor._is_hf_initialized = True
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()  # from_pretrained sets some values anew, whatever is on disk: the same now
    return model.eval()


def save(model_type: str, folder: Path) -> Path:
    """Save a small random model and the byte tokenizer."""
    model_of(model_type).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
