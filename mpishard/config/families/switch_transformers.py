"""Switch Transformers (Fedus et al. 2021, arXiv 2101.03961): T5's encoder and decoder (arXiv
1910.10683), with a top-1 mixture of experts of limited capacity in some layers of both."""

from __future__ import annotations

from mpishard.config.families.family import Family, MoEFamily
from mpishard.config.model_config import ExpertNames, LayerNormNames, PerExpertNames, StackedNames
from mpishard.config.stored_names import StoredNames


def _experts(layer: str) -> ExpertNames:
    """The names of a layer's experts, which lie below `layer`."""
    expert = f"{layer}.mlp.experts.expert_{{}}"
    router = f"{layer}.mlp.router.classifier"
    return ExpertNames(
        separate=PerExpertNames(
            router=f"{router}.weight", up=f"{expert}.wi.weight", down=f"{expert}.wo.weight"
        ),
        stacked=StackedNames(router=f"{router}.weight", router_bias=f"{router}.bias"),
    )


def _names(stack: str, feed_forward: str, unused: tuple[str, ...]) -> StoredNames:
    """The names of a stack, whose blocks have the feed-forward network below `feed_forward`."""
    projections = {
        f"{module}.{part}_proj": f"{stored}.{part}"
        for module, stored in (
            ("self_attn", "layer.0.SelfAttention"),
            ("cross_attn", "layer.1.EncDecAttention"),
        )
        for part in "qkvo"
    }
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias"
    return StoredNames(
        prefixes=("",),
        layers=f"{stack}.block",
        modules={
            "model.embed_tokens": "shared",
            "model.norm": f"{stack}.final_layer_norm",
            "model.relative_bias": f"{stack}.{bias}",
            "input_layernorm": "layer.0.layer_norm",
            "cross_attention_layernorm": "layer.1.layer_norm",
            "post_attention_layernorm": f"{feed_forward}.layer_norm",
            "mlp.up_proj": f"{feed_forward}.mlp.wi",
            "mlp.down_proj": f"{feed_forward}.mlp.wo",
            **projections,
        },
        unused=unused,
    )


SWITCH_TRANSFORMERS = Family(
    architecture="SwitchTransformersForConditionalGeneration",
    name="switch_transformers",
    spellings={
        "hidden_size": ("d_model", "hidden_size"),
        "head_dim": ("d_kv",),
        "intermediate_size": ("d_ff",),
        "num_hidden_layers": ("num_layers", "num_hidden_layers"),
        "num_attention_heads": ("num_heads", "num_attention_heads"),
        "max_position_embeddings": ("n_positions",),
        "rms_norm_eps": ("layer_norm_epsilon",),
    },
    max_position_embeddings=512,  # no weight limits it: T5 was trained on so many
    head_dim=64,
    eos_id=1,
    tied=True,
    qkv_bias=False,
    attention_scale=1.0,
    encoder=True,
    positions="relative",
    gated_mlp=False,
    activation_field="dense_act_fn",
    activation="relu",
    norms=LayerNormNames(cross="cross_attention_layernorm"),
    moe=MoEFamily(
        ffn="intermediate_size",
        names=_experts("layer.2"),
        dense="between sparse steps",
        top_k=1,
        capacity=True,
        normalized=False,
    ),
    stored_names=_names(
        "decoder",
        "layer.2",
        unused=(
            "decoder.embed_tokens.",
            "encoder.embed_tokens.",
            "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.",
        ),
    ),
    encoder_stored_names=_names("encoder", "layer.1", unused=()),
    encoder_moe_names=_experts("layer.1"),
    # How it was trained; transformers routes with one router, whatever router_type says.
    ignored=frozenset(
        """
        add_router_probs dropout_rate feed_forward_proj initializer_factor
        output_past router_ignore_padding_tokens router_z_loss_coef
        """.split()
    ),
    fixed={
        "add_cross_attention": False,
        "batch_prioritized_routing": False,
        "is_gated_act": False,
        "num_selected_experts": 1,
        "router_dtype": "float32",
        "router_type": "tokens_masked",
        "tie_word_embeddings": True,  # else each stack has an embedding of its own
    },
)
