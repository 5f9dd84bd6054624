"""Exported models generate the same in every way that transformers has: its tests of that are in no package."""

from __future__ import annotations

import pytest
import torch
from cases import cases
from test_hf_scmoe import EXACT, TOKENS, TOLERANCE, exported, loaded, logits_of  # noqa: F401  (a fixture among them)

PROMPT = TOKENS[:, :5]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
WAYS = {
    "a cache": {},
    "a cache of fixed size": {"cache_implementation": "static", "disable_compile": True},
    "a prompt in pieces": {"prefill_chunk_size": 2},
    "drafts from the prompt": {"prompt_lookup_num_tokens": 2},
}
CASES = cases(EXACT, ["longcat"])


def generated(model, prompt: torch.Tensor = PROMPT, **ways) -> torch.Tensor:
    return model.generate(prompt, **GREEDY | ways)


@pytest.mark.parametrize("case", CASES)
def test_every_way_generates_the_same(exported, case):  # noqa: F811
    _, folder, _ = exported(case)
    model = loaded(folder)
    expected = generated(model, use_cache=False)
    for name, way in WAYS.items():
        if "drafts" in name:  # one sequence at a time
            found = torch.cat([generated(model, row.unsqueeze(0), **way) for row in PROMPT])
        else:
            found = generated(model, **way)
        assert torch.equal(found, expected), name
    drafted = [generated(model, row.unsqueeze(0), assistant_model=loaded(folder)) for row in PROMPT]
    assert torch.equal(torch.cat(drafted), expected)
    embedded = model.generate(inputs_embeds=model.get_input_embeddings()(PROMPT), **GREEDY)
    assert torch.equal(embedded, expected[:, PROMPT.shape[1] :])


@pytest.mark.parametrize("case", CASES)
def test_a_cache_changes_neither_beams_nor_samples(exported, case):  # noqa: F811
    _, folder, _ = exported(case)
    model = loaded(folder)
    for way in ({"num_beams": 3}, {"do_sample": True, "temperature": 5.0}):
        torch.manual_seed(1)
        found = generated(model, **way)
        torch.manual_seed(1)
        assert torch.equal(generated(model, use_cache=False, **way), found)
    assert not torch.equal(generated(model, **way), found)  # drawn anew


@pytest.mark.parametrize("case", CASES)
def test_padding_on_the_left_changes_no_text(exported, case):  # noqa: F811
    """Positions are those that ``generate`` makes of the mask."""
    _, folder, _ = exported(case)
    model = loaded(folder)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), PROMPT), dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand(2, -1)
    expected = generated(model)
    assert torch.equal(generated(model, padded, attention_mask=mask)[:, 3:], expected)
    assert not torch.equal(generated(model, padded, attention_mask=torch.ones_like(mask))[:, 3:], expected)


@pytest.mark.parametrize("case", CASES)
def test_masks_positions_and_caches_of_callers(exported, case):  # noqa: F811
    _, folder, expected = exported(case)
    model = loaded(folder)
    causal = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    mask = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    torch.testing.assert_close(logits_of(model, attention_mask=mask), expected, rtol=0, atol=TOLERANCE)
    # Two sequences in one row, told apart by their positions; the second begins anew.
    row, positions = TOKENS.reshape(1, -1), torch.arange(12).repeat(2).unsqueeze(0)
    found = logits_of(model, row, position_ids=positions, use_cache=False).view_as(expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    with torch.no_grad():
        cache = model(TOKENS[:, :8]).past_key_values
        cache.crop(-3)
        found = model(TOKENS[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(found, expected[:, 5:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_losses_of_parts(exported, case):  # noqa: F811
    """Labels of -100 do not count; a trainer that accumulates gradients gives the number of what counts."""
    _, folder, expected = exported(case)
    model = loaded(folder)
    labels = TOKENS.clone()
    labels[:, :6] = -100
    loss = torch.nn.functional.cross_entropy(expected[:, 5:-1].flatten(0, 1), TOKENS[:, 6:].flatten())
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS, labels=labels).loss, loss, rtol=0, atol=TOLERANCE)
        of_all = model(TOKENS, labels=labels, num_items_in_batch=100).loss * 100
    torch.testing.assert_close(of_all, loss * labels[:, 6:].numel(), rtol=0, atol=100 * TOLERANCE)
