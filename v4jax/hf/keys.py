"""Which keys of a config.json are known, apart from the fields of `ModelConfig`."""

from v4jax import block_sizes

TRANSFORMERS_KEYS = frozenset(
    {"layer_types", "mlp_layer_types", "compress_rates", "rope_parameters", "partial_rotary_factor"}
)

# Official keys that say the same in every model; also written for a config that came from no file.
CONSTANT_KEYS = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "model_type": "deepseek_v4",
    "norm_topk_prob": True,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "use_cache": True,
}

# Nothing but these values is implemented.
IMPLEMENTED = {
    "model_type": ("deepseek_v4",),
    "num_key_value_heads": (1,),
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "norm_topk_prob": (True,),
    "topk_method": ("noaux_tc", None),
    "n_group": (1, None),
    "topk_group": (1, None),
    "first_k_dense_replace": (0, None),
    "moe_layer_freq": (1, None),
}
IMPLEMENTED_QUANTIZATION = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3", None),
    "scale_fmt": ("ue8m0", "float32", None),
    "activation_scheme": ("dynamic", None),
    "weight_block_size": ([block_sizes.FP8, block_sizes.FP8],),
}

# What training and serving tools leave in a config.json, and generation settings of old ones. They
# describe a tool's run, another kind of model, or how text is drawn, and no number of this model.
_OF_OTHER_TOOLS = frozenset(
    {
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_flash_attn_2_enabled",
        "add_cross_attention",
        "bad_words_ids",
        "base_model_name_or_path",
        "begin_suppress_tokens",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "keys_to_ignore_at_inference",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "model_max_length",
        "model_name",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "prefix",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "temperature",
        "tie_encoder_decoder",
        "top_k",
        "top_p",
        "typical_p",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
    }
)
# They change no number of the forward pass.
HARMLESS = _OF_OTHER_TOOLS | frozenset(
    {
        "_attn_implementation",
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "aux_loss_alpha",
        "chunk_size_feed_forward",
        "dtype",
        "ep_size",
        "finetuning_task",
        "id2label",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "seq_aux",
        "task_specific_params",
        "tokenizer_class",
        "torchscript",
        "transformers_version",
        "use_cache",
    }
)
