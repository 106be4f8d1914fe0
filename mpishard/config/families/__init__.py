"""The supported model families, one file each, by the name of their architecture."""

from __future__ import annotations

from mpishard.config.families.deepseek_v2 import DEEPSEEK_V2
from mpishard.config.families.deepseek_v3 import DEEPSEEK_V3
from mpishard.config.families.family import Family
from mpishard.config.families.gemma2 import GEMMA2
from mpishard.config.families.gpt_oss import GPT_OSS
from mpishard.config.families.llama import LLAMA
from mpishard.config.families.mistral import MISTRAL
from mpishard.config.families.mixtral import MIXTRAL
from mpishard.config.families.olmoe import OLMOE
from mpishard.config.families.qwen2 import QWEN2
from mpishard.config.families.qwen2_moe import QWEN2_MOE
from mpishard.config.families.qwen3 import QWEN3
from mpishard.config.families.qwen3_moe import QWEN3_MOE

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        *(LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2),
        *(MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, GPT_OSS, DEEPSEEK_V2, DEEPSEEK_V3),
    )
}
