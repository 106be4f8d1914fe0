"""Fields of ``config.json`` that mpishard refuses, and fields that it ignores.

A field in neither table that no reader asks for is refused, too: see `Fields.reject_unknown`.
"""

from __future__ import annotations

# What a field asks for, and the value, besides null, with which it changes nothing.
UNSUPPORTED_FIELDS: dict[str, tuple[str, object]] = {
    "auto_map": ("code of its own", {}),
    "per_layer_config": ("layers that differ from each other", {}),
    "pruned_heads": ("pruned heads", {}),
    "is_encoder_decoder": ("an encoder", False),
    "add_cross_attention": ("cross-attention", False),
    "is_causal": ("attention to later tokens", True),
    "use_bidirectional_attention": ("attention to later tokens", False),
    "activation": ("another feed-forward network", "swiglu"),
    "alibi": ("ALiBi position biases", False),
    "partial_rotary_factor": ("a rotation of part of each head", 1),
    "rope_interleaved": ("a rotation of interleaved pairs", False),
    "mrope_section": ("multimodal rope", None),
    "use_mrope": ("multimodal rope", False),
    "attention_chunk_size": ("chunked attention", None),
    "dual_chunk_attention_config": ("dual chunk attention", None),
    "attn_logit_softcapping": ("soft-capped attention scores", None),
    "final_logit_softcapping": ("soft-capped logits", None),
    "logits_soft_cap": ("soft-capped logits", None),
    "attention_multiplier": ("another scale of the attention scores", None),
    "query_pre_attn_scalar": ("another scale of the attention scores", None),
    "embedding_multiplier": ("scaled embeddings", 1),
    "residual_multiplier": ("scaled residuals", 1),
    "logits_scaling": ("scaled logits", 1),
    "logit_scale": ("scaled logits", 1),
    "clip_qkv": ("clipped queries, keys and values", None),
    "qk_layernorm": ("norms of queries and keys", False),
    "use_qk_norm": ("norms of queries and keys", False),
    "num_experts": ("a mixture of experts", 0),
    "num_experts_per_tok": ("a mixture of experts", 0),
    "num_local_experts": ("a mixture of experts", 0),
    "n_routed_experts": ("a mixture of experts", 0),
    "moe_intermediate_size": ("a mixture of experts", 0),
    "num_nextn_predict_layers": ("layers that predict several tokens", 0),
}

# Fields of published checkpoints that do not change the logits: bookkeeping, switches between equal
# kernels, training, classifiers, defaults for generation. pretraining_tp is one of them, because it
# only splits the matrix products of old versions of transformers.
IGNORED_FIELDS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _experts_implementation_internal _flash_attn_2_enabled _name_or_path attn_implementation
    chunk_size_feed_forward cross_attention_hidden_size document_attention dtype ep_size
    experts_implementation internal_version is_decoder is_llama_config max_sequence_length
    model_max_length name_or_path padding_side pretraining_tp return_dict seq_length
    tie_encoder_decoder tie_last_hidden_states tokenizer_class tokenizer_model_max_length
    torch_dtype torchscript transformers.js_config
    transformers_version unsloth_fixed unsloth_optimized unsloth_version use_bfloat16 use_cache
    use_flash_attention use_flash_attn use_sdpa

    attention_dropout attention_probs_dropout_prob attn_dropout attn_pdrop aux_loss_alpha
    classifier_dropout classifier_dropout_prob embd_pdrop gradient_checkpointing hidden_dropout
    hidden_dropout_prob initializer_range neftune_noise_alpha output_router_logits resid_dropout
    resid_pdrop router_aux_loss_coef router_jitter_noise seq_aux tf_legacy_loss

    finetuning_task id2label label2id num_labels output_attentions output_hidden_states prefix
    problem_type task_specific_params

    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty length_penalty max_length
    max_new_tokens min_length min_p no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_scores remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
    """.split()
)
