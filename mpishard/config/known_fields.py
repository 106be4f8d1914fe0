"""The fields that transformers knows, by the model_type of the configuration class.

Made by ``scripts/dev/list_known_fields.py`` from transformers 5.24.0. A field of these that no
reader asks for could change the logits, whatever its value: see `Fields.reject_unknown`.
"""

from __future__ import annotations


def _by_class(table: str) -> dict[str, frozenset[str]]:
    lines = table.replace("\n        ", " ").strip().splitlines()
    parts = (line.partition(":") for line in lines)
    return {name.strip(): frozenset(fields.split()) for name, _, fields in parts}


# Fields that most classes have.
COMMON_FIELDS = frozenset(
    """
    architectures attention_dropout chunk_size_feed_forward dtype hidden_act hidden_size id2label
    initializer_range intermediate_size is_encoder_decoder label2id max_position_embeddings
    num_attention_heads num_hidden_layers num_key_value_heads output_hidden_states problem_type
    return_dict rms_norm_eps rope_parameters tie_word_embeddings transformers_version use_cache
    vocab_size
    """.split()
)

KNOWN_FIELDS = _by_class(
    """
    llama: attention_bias head_dim mlp_bias pretraining_tp
    mistral: head_dim sliding_window
    qwen2: layer_types max_window_layers sliding_window use_sliding_window
    qwen3: attention_bias head_dim layer_types max_window_layers sliding_window use_sliding_window
    gemma2: attention_bias attn_logit_softcapping final_logit_softcapping head_dim hidden_activation
        layer_types query_pre_attn_scalar sliding_window use_bidirectional_attention
    mixtral: head_dim num_experts num_experts_per_tok num_local_experts output_router_logits
        router_aux_loss_coef router_jitter_noise sliding_window
    qwen2_moe: decoder_sparse_step layer_types max_window_layers mlp_only_layers
        moe_intermediate_size norm_topk_prob num_experts num_experts_per_tok output_router_logits
        qkv_bias router_aux_loss_coef shared_expert_intermediate_size sliding_window
        use_sliding_window
    qwen3_moe: attention_bias decoder_sparse_step mlp_only_layers moe_intermediate_size
        norm_topk_prob num_experts num_experts_per_tok num_local_experts output_router_logits
        router_aux_loss_coef sliding_window use_sliding_window
    olmoe: attention_bias clip_qkv norm_topk_prob num_experts num_experts_per_tok num_local_experts
        output_router_logits router_aux_loss_coef
    gpt_oss: attention_bias head_dim layer_types num_experts num_experts_per_tok num_local_experts
        output_router_logits router_aux_loss_coef sliding_window swiglu_alpha swiglu_limit
    deepseek_v2: attention_bias first_k_dense_replace head_dim kv_lora_rank mlp_bias
        moe_intermediate_size n_group n_routed_experts n_shared_experts norm_topk_prob num_experts
        num_experts_per_tok output_router_logits pretraining_tp q_lora_rank qk_nope_head_dim
        qk_rope_head_dim routed_scaling_factor topk_group topk_method v_head_dim
    deepseek_v3: attention_bias first_k_dense_replace kv_lora_rank moe_intermediate_size n_group
        n_routed_experts n_shared_experts norm_topk_prob num_experts_per_tok num_local_experts
        num_mtp_layers num_nextn_predict_layers output_router_logits pretraining_tp q_lora_rank
        qk_nope_head_dim qk_rope_head_dim rope_interleave routed_scaling_factor topk_group
        v_head_dim
    gemma: attention_bias head_dim use_bidirectional_attention
    gemma3_text: attention_bias attn_logit_softcapping final_logit_softcapping head_dim
        hidden_activation layer_types query_pre_attn_scalar sliding_window
        use_bidirectional_attention
    phi3: embd_pdrop original_max_position_embeddings resid_pdrop sliding_window
    olmo2: attention_bias
    olmo3: attention_bias layer_types sliding_window
    granite: attention_bias attention_multiplier embedding_multiplier logits_scaling mlp_bias
        residual_multiplier
    granitemoe: attention_bias attention_multiplier embedding_multiplier logits_scaling
        num_experts_per_tok num_local_experts output_router_logits residual_multiplier
        router_aux_loss_coef
    granitemoeshared: attention_bias attention_multiplier embedding_multiplier logits_scaling
        num_experts_per_tok num_local_experts output_router_logits residual_multiplier
        router_aux_loss_coef shared_intermediate_size
    glm: attention_bias head_dim
    glm4: attention_bias head_dim
    glm4_moe: attention_bias first_k_dense_replace moe_intermediate_size n_group n_routed_experts
        n_shared_experts norm_topk_prob num_experts_per_tok num_local_experts num_mtp_layers
        num_nextn_predict_layers output_router_logits routed_scaling_factor topk_group use_qk_norm
    smollm3: attention_bias layer_types mlp_bias no_rope_layer_interval no_rope_layers
        sliding_window use_sliding_window
    exaone4: layer_types sliding_window sliding_window_pattern
    cohere: attention_bias layer_norm_eps logit_scale use_qk_norm
    cohere2: attention_bias layer_norm_eps layer_types logit_scale sliding_window
    seed_oss: attention_bias attention_out_bias head_dim mlp_bias pretraining_tp residual_dropout
    ministral3: head_dim sliding_window
    ernie4_5: head_dim use_bias
    ernie4_5_moe: moe_intermediate_size moe_k moe_layer_end_index moe_layer_interval
        moe_layer_start_index moe_norm_min moe_num_experts moe_num_shared_experts num_experts
        num_experts_per_tok output_router_logits router_aux_loss_coef use_bias
    dots1: attention_bias first_k_dense_replace layer_types max_window_layers moe_intermediate_size
        n_group n_routed_experts n_shared_experts norm_topk_prob num_experts_per_tok
        num_local_experts output_router_logits routed_scaling_factor sliding_window topk_group
    minimax_m2: head_dim num_experts num_experts_per_tok num_local_experts output_router_logits
        router_aux_loss_coef router_jitter_noise
    hunyuan_v1_dense: attention_bias head_dim pretraining_tp
    hunyuan_v1_moe: attention_bias head_dim moe_topk num_experts num_experts_per_tok
        num_local_experts output_router_logits pretraining_tp
    phimoe: attention_bias input_jitter_noise lm_head_bias num_experts_per_tok num_local_experts
        output_router_logits router_aux_loss_coef router_jitter_noise sliding_window
    arcee: attention_bias head_dim mlp_bias
    nemotron: attention_bias head_dim mlp_bias norm_eps
    gpt2: activation_function add_cross_attention attn_pdrop embd_pdrop layer_norm_epsilon n_embd
        n_head n_inner n_layer n_positions reorder_and_upcast_attn resid_pdrop
        scale_attn_by_inverse_layer_idx scale_attn_weights summary_activation summary_first_dropout
        summary_proj_to_labels summary_type summary_use_proj
    gpt_neox: attention_bias classifier_dropout hidden_dropout is_decoder layer_norm_eps
        use_parallel_residual
    gptj: activation_function attn_pdrop embd_pdrop layer_norm_epsilon n_embd n_head n_inner n_layer
        n_positions resid_pdrop rotary_dim
    phi: embd_pdrop layer_norm_eps qk_layernorm resid_pdrop
    opt: _remove_final_layer_norm activation_function do_layer_norm_before dropout enable_bias
        ffn_dim init_std layer_norm_elementwise_affine layerdrop word_embed_proj_dim
    bloom: apply_residual_connection_post_layernorm hidden_dropout layer_norm_epsilon n_head n_layer
        pretraining_tp slow_but_exact
    mpt: attn_config d_model emb_pdrop embedding_fraction expansion_ratio init_device
        layer_norm_epsilon learned_pos_emb logit_scale max_seq_len n_heads n_layers no_bias
        norm_type resid_pdrop
    falcon: activation alibi bias ffn_hidden_size hidden_dropout layer_norm_epsilon multi_query
        new_decoder_architecture num_kv_heads num_ln_in_parallel_attn parallel_attn
    starcoder2: embedding_dropout norm_epsilon residual_dropout sliding_window use_bias
    gpt_bigcode: activation_function add_cross_attention attention_softmax_in_fp32 attn_pdrop
        embd_pdrop layer_norm_epsilon multi_query n_embd n_head n_inner n_layer n_positions
        resid_pdrop scale_attention_softmax_in_fp32 scale_attn_weights
    stablelm: hidden_dropout layer_norm_eps qk_layernorm use_parallel_residual use_qkv_bias
    olmo: attention_bias clip_qkv
    llama4_text: attention_bias attention_chunk_size attn_scale attn_temperature_tuning floor_scale
        head_dim interleave_moe_layer_step intermediate_size_mlp layer_types moe_layers
        no_rope_layer_interval no_rope_layers num_experts_per_tok num_local_experts
        output_router_logits router_aux_loss_coef router_jitter_noise use_qk_norm
    qwen3_next: attention_bias decoder_sparse_step head_dim layer_types linear_conv_kernel_dim
        linear_key_head_dim linear_num_key_heads linear_num_value_heads linear_value_head_dim
        mlp_only_layers moe_intermediate_size norm_topk_prob num_experts num_experts_per_tok
        output_router_logits router_aux_loss_coef shared_expert_intermediate_size
    switch_transformers: add_cross_attention add_router_probs d_ff d_kv d_model dense_act_fn
        dropout_rate expert_capacity initializer_factor is_decoder layer_norm_epsilon
        num_decoder_layers num_experts num_heads num_layers num_sparse_decoder_layers
        num_sparse_encoder_layers relative_attention_max_distance relative_attention_num_buckets
        router_aux_loss_coef router_bias router_dtype router_ignore_padding_tokens
        router_jitter_noise router_z_loss_coef
    qwen2_vl_text: layer_types max_window_layers sliding_window use_sliding_window
    qwen2_5_vl_text: layer_types max_window_layers sliding_window use_sliding_window
    qwen3_vl_text: attention_bias head_dim
    qwen3_vl_moe_text: attention_bias decoder_sparse_step head_dim mlp_only_layers
        moe_intermediate_size num_experts num_experts_per_tok num_local_experts output_router_logits
        router_aux_loss_coef
    """
)

# Of the classes that have a text_config.
WRAPPER_FIELDS = _by_class(
    """
    gemma3: boi_token_index eoi_token_index image_token_index mm_tokens_per_image text_config
        vision_config
    internvl: downsample_ratio image_seq_length projector_hidden_act text_config vision_config
        vision_feature_layer vision_feature_select_strategy
    kimi_k25: projection_hidden_size projection_layer_norm_eps text_config vision_config
    llama4: boi_token_index eoi_token_index image_token_index text_config vision_config
    llava: image_seq_length image_token_index multimodal_projector_bias projector_hidden_act
        text_config vision_config vision_feature_layer vision_feature_select_strategy
    llava_next: image_grid_pinpoints image_seq_length image_token_index multimodal_projector_bias
        projector_hidden_act text_config vision_config vision_feature_layer
        vision_feature_select_strategy
    mistral3: image_token_index multimodal_projector_bias projector_hidden_act spatial_merge_size
        text_config vision_config vision_feature_layer
    qwen2_vl: text_config vision_config
    qwen2_5_vl: text_config vision_config
    qwen3_vl: text_config vision_config
    qwen3_vl_moe: text_config vision_config
    """
)

# What a text_config may omit: its hidden_size, intermediate_size, num_hidden_layers,
# num_attention_heads and vocab_size.
DEFAULT_SIZES: dict[str, tuple[int, ...]] = {
    "llama": (4096, 11008, 32, 32, 32000),
    "mistral": (4096, 14336, 32, 32, 32000),
    "gemma3_text": (2304, 9216, 26, 8, 262208),
    "llama4_text": (5120, 8192, 48, 40, 202048),
    "qwen2": (4096, 22016, 32, 32, 151936),
    "qwen3": (4096, 22016, 32, 32, 151936),
}
