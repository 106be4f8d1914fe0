"""Hunyuan (Tencent, arXiv 2411.02265): norms of q and k after their rotation, and a rope that is
stretched by a fixed alpha."""

from __future__ import annotations

from mpishard.config.families.family import Family
from mpishard.config.stored_names import StoredNames

HUNYUAN_V1_DENSE = Family(
    architecture="HunYuanDenseV1ForCausalLM",
    name="hunyuan_v1_dense",
    max_position_embeddings=2048,
    bos_id=1,
    eos_id=2,
    norm_eps=1e-5,
    qk_norm=True,
    qk_norm_after_rope=True,
    rope_alpha=True,
    stored_names=StoredNames(
        modules={
            "self_attn.q_norm": "self_attn.query_layernorm",
            "self_attn.k_norm": "self_attn.key_layernorm",
        }
    ),
    fixed={"norm_type": "rms", "position_embedding_xdrope": False, "use_rotary_pos_emb": True},
    # Of the published code: images, cross-layer attention that use_cla leaves out, training.
    ignored=frozenset(
        """
        anyres_pooling_size auto_map cla_share_factor class_num dense_list eod_token_id im_end_id
        im_newline_id im_start_id image_token_id mask_init_id moe_layer_num_skipped
        num_media_embeds org_vocab_size pad_id pool_type text_end_id text_start_id video_end_id
        video_start_id vit_input_resolution vit_mapping_type vit_norm_type vit_patch vit_token
        """.split()
    ),
)
