"""The supported model families, one file each, by the name of their architecture."""

from __future__ import annotations

from mpishard.config.families.arcee import ARCEE
from mpishard.config.families.bloom import BLOOM
from mpishard.config.families.cohere import COHERE
from mpishard.config.families.cohere2 import COHERE2
from mpishard.config.families.deepseek_v2 import DEEPSEEK_V2
from mpishard.config.families.deepseek_v3 import DEEPSEEK_V3
from mpishard.config.families.dots1 import DOTS1
from mpishard.config.families.ernie4_5 import ERNIE4_5
from mpishard.config.families.ernie4_5_moe import ERNIE4_5_MOE
from mpishard.config.families.exaone4 import EXAONE4
from mpishard.config.families.falcon import FALCON
from mpishard.config.families.family import Family
from mpishard.config.families.gemma import GEMMA
from mpishard.config.families.gemma2 import GEMMA2
from mpishard.config.families.gemma3 import GEMMA3
from mpishard.config.families.glm import GLM
from mpishard.config.families.glm4 import GLM4
from mpishard.config.families.glm4_moe import GLM4_MOE
from mpishard.config.families.gpt2 import GPT2
from mpishard.config.families.gpt_bigcode import GPT_BIGCODE
from mpishard.config.families.gpt_neox import GPT_NEOX
from mpishard.config.families.gpt_oss import GPT_OSS
from mpishard.config.families.gptj import GPTJ
from mpishard.config.families.granite import GRANITE
from mpishard.config.families.granitemoe import GRANITEMOE
from mpishard.config.families.granitemoeshared import GRANITEMOESHARED
from mpishard.config.families.hunyuan_v1_dense import HUNYUAN_V1_DENSE
from mpishard.config.families.hunyuan_v1_moe import HUNYUAN_V1_MOE
from mpishard.config.families.internlm2 import INTERNLM2
from mpishard.config.families.llama import LLAMA
from mpishard.config.families.llama4 import LLAMA4
from mpishard.config.families.mimo import MIMO
from mpishard.config.families.minimax_m2 import MINIMAX_M2
from mpishard.config.families.ministral3 import MINISTRAL3
from mpishard.config.families.mistral import MISTRAL
from mpishard.config.families.mixtral import MIXTRAL
from mpishard.config.families.mpt import MPT
from mpishard.config.families.nemotron import NEMOTRON
from mpishard.config.families.olmo import OLMO
from mpishard.config.families.olmo2 import OLMO2
from mpishard.config.families.olmo3 import OLMO3
from mpishard.config.families.olmoe import OLMOE
from mpishard.config.families.opt import OPT
from mpishard.config.families.phi import PHI
from mpishard.config.families.phi3 import PHI3
from mpishard.config.families.phimoe import PHIMOE
from mpishard.config.families.qwen2 import QWEN2
from mpishard.config.families.qwen2_moe import QWEN2_MOE
from mpishard.config.families.qwen3 import QWEN3
from mpishard.config.families.qwen3_moe import QWEN3_MOE
from mpishard.config.families.qwen3_next import QWEN3_NEXT
from mpishard.config.families.seed_oss import SEED_OSS
from mpishard.config.families.smollm3 import SMOLLM3
from mpishard.config.families.stablelm import STABLELM
from mpishard.config.families.starcoder2 import STARCODER2
from mpishard.config.families.switch_transformers import SWITCH_TRANSFORMERS

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        *(LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, OLMO2, OLMO3),
        *(GRANITE, SMOLLM3, SEED_OSS, MINISTRAL3, EXAONE4, PHI3, GLM, GLM4, ARCEE),
        *(HUNYUAN_V1_DENSE, ERNIE4_5, MIMO, INTERNLM2),
        *(GPT2, GPT_BIGCODE, OPT, BLOOM, MPT, FALCON, STARCODER2, OLMO),
        *(GPT_NEOX, GPTJ, PHI, STABLELM, COHERE, COHERE2, NEMOTRON),
        *(MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, GPT_OSS, DEEPSEEK_V2, DEEPSEEK_V3),
        *(DOTS1, GLM4_MOE, MINIMAX_M2, GRANITEMOE, GRANITEMOESHARED, HUNYUAN_V1_MOE),
        *(ERNIE4_5_MOE, PHIMOE, LLAMA4, QWEN3_NEXT, SWITCH_TRANSFORMERS),
    )
}
