"""The common model tests of the installed transformers, on the exported classes of every architecture."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import transformers_tests
from test_hf_scmoe import EXACT, exported  # noqa: F401  (a fixture)
from training import ROOT

# Which tests skip themselves, and why: docs/checkpoints.md has this list too.
SKIPPED = {
    "an accelerator or deepspeed is not there": r"flash|flex|deepspeed|kernels|offload|model_parallelism|"
    r"device_context_manager|global_device|compile",
    "made of one model, of text, and a decoder": r"composite|subconfig|encoder_decoder|vision_axial_rope",
    "no weights have other names than in files": r"already_mapped_keys|reverse_loading_mapping",
    "experts are modules, as in files, and not stacked": r"batched_and_grouped|moe_models_record_router_logits",
    "no module for rotary angles, which a function gives": r"rope_scaling_frequencies",
    "a setting that this architecture does not have": r"rope_with_partial_rotation|sliding_window|keep_in_fp32",
    "they look for it in annotations or recorders": r"fp32_pad_left_output_attentions|specific_layers_hidden_states",
    "learned positions have a fixed number": r"resize_position_vector_embeddings",
}
# Which fail, and why.
FAILED = {
    "no architecture with a shortcut has less than two groups of blocks": r"num_layers_is_small",
    "the tests of generation are not in the source distribution": r"generation_tester_mixin_inheritance",
    "rope_type dynamic is refused": r"rope_scaling_from_config_1_dynamic",
}
BEYOND_THE_TABLE = {"there are no learned positions behind the last": r"rope_scaling_from_config_\d"}


def unlisted(outcomes: dict[str, tuple[str, str]], outcome: str, listed: dict[str, str]) -> dict[str, str]:
    """Tests with an outcome for which there is no reason, and what they say."""
    return {
        name: said[-2000:]
        for name, (found, said) in outcomes.items()
        if found == outcome and not any(re.search(pattern, name) for pattern in listed.values())
    }


@pytest.fixture(scope="module")
def tests_of_transformers(request) -> Path:
    return transformers_tests.fetched(request.config.cache.mkdir("transformers-tests"))


@pytest.mark.full
@pytest.mark.parametrize("case", EXACT)
def test_what_transformers_tests_of_its_own_models(exported, tests_of_transformers, tmp_path, case):  # noqa: F811
    _, folder, _ = exported(case)
    outcomes = transformers_tests.run(tests_of_transformers, folder, tmp_path)
    failing = FAILED | (BEYOND_THE_TABLE if case == "layer norm" else {})
    assert not unlisted(outcomes, "failed", failing)
    assert not unlisted(outcomes, "skipped", SKIPPED)
    for reason, pattern in failing.items():
        assert any(found == "failed" and re.search(pattern, name) for name, (found, _) in outcomes.items()), reason
    assert sum(found == "passed" for found, _ in outcomes.values()) >= 100


@pytest.mark.full
def test_a_model_that_forgets_its_weights_is_noticed(exported, tests_of_transformers, tmp_path):  # noqa: F811
    """Negative control of the test above: a router that nobody draws, a tensor that ranks would not share."""
    _, folder, _ = exported("pos2")
    wrong = tmp_path / "wrong"
    shutil.copytree(folder, wrong)
    for name, there, instead in (
        ("modeling_scmoe.py", "isinstance(module, Router)", "False"),
        ("configuration_scmoe.py", '"v_proj"', '"w_proj"'),
    ):
        text = (wrong / name).read_text()
        assert there in text
        (wrong / name).write_text(text.replace(there, instead))
    outcomes = transformers_tests.run(tests_of_transformers, wrong, tmp_path)
    failing = unlisted(outcomes, "failed", FAILED).keys()
    assert {"test_can_init_all_missing_weights", "test_tp_plan_matches_params"} <= failing


def test_what_does_not_apply_is_in_the_documents():
    text = (ROOT / "docs/checkpoints.md").read_text()
    assert [reason for reason in [*SKIPPED, *FAILED, *BEYOND_THE_TABLE] if reason not in text] == []
