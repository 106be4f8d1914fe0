"""Published configurations: which are read, which are refused, and by what sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "dev"))

from tabulate_configs import TABLE, configs, verdict  # noqa: E402

CONFIGS = configs()
LINES = TABLE.read_text().splitlines()

# Architectures that are not implemented, and are not meant to be.
OTHERS = """
    BaichuanForCausalLM ChatGLMModel CodeGenForCausalLM DeepseekV32ForCausalLM DeepseekV4ForCausalLM
    Gemma4ForConditionalGeneration GlmMoeDsaForCausalLM JambaForCausalLM
    KimiK3ForConditionalGeneration MiMoV2FlashForCausalLM MiniCPM3ForCausalLM MiniCPMForCausalLM
    MllamaForConditionalGeneration MolmoForCausalLM NemotronHForCausalLM Phi4MMForCausalLM
    QWenLMHeadModel Qwen3_5ForConditionalGeneration Qwen3_5MoeForConditionalGeneration
    Step3p7FlashForCausalLM
""".split()


@pytest.mark.parametrize("name, line", list(zip(CONFIGS, LINES, strict=True)), ids=list(CONFIGS))
def test_the_table(name, line):
    """If a family comes, ``scripts/dev/tabulate_configs.py`` remakes the table."""
    assert f"{name}: {': '.join(verdict(CONFIGS[name]))}" == line


def test_a_configuration_is_refused_for_its_family_alone():
    refused = set()
    for name, raw in CONFIGS.items():
        result, sentence = verdict(raw)
        if result == "refused":
            architecture = raw["architectures"][0]
            named = f'architectures = ["{architecture}"] is not implemented; the README lists those'
            assert named in sentence, (name, sentence)
            refused.add(architecture)
    assert refused == set(OTHERS)
