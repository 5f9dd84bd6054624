"""CUDA's kernels compute what the slow reference computes on the CPU, and the codec what it computes there.

One rank, fp32 (TF32 off) and bf16: losses and all gradients against tests/support/reference.py; top-2, whose sums by
index are atomic on a GPU, twice with the same bits; keys, clusters, means, restored rows and refined clusters of the
codec on the device against those on the CPU. In a dry run both are the CPU.

Mutants: the reference with one weight of an expert a percent larger; clusters of other keys.
"""

from __future__ import annotations

import checks
import device
import models
import reference
import torch
from models import DEVICE, Case
from torch import Tensor

from megatron_scmoe.codec import lloyd, lsh

Found = tuple[Tensor, dict[str, Tensor]]

FP32, BF16 = 2e-5, 5e-2
CASES = {
    "scmoe pos2": Case(),
    "scmoe pos1 cg2 top-2": Case(position=("pos1",), combine="cg2", topk=2),
    "scmoe pos3 add": Case(position=("pos3",), combine="add"),
    "a late landing": Case(span=2, landing=1),
    "dgmoe": Case(shortcut="dgmoe"),
    "longcat": Case(router="longcat", combine="add", topk=3, zero_experts=3),
    "two chunks": Case(chunks=2),
}
ROWS, HIDDEN, EXPERTS, HASHES, WIDTH = 512, 64, 4, 3, 4


def ours(case: Case) -> Found:
    """Losses and gradients on the device, brought to the CPU."""
    losses, gradients = models.losses_and_gradients(case)
    return losses.cpu().float(), {name: gradient.cpu().float() for name, gradient in gradients.items()}


def truth(case: Case, **changed: Tensor) -> Found:
    """The reference's, in fp32, with the parameters as ``case`` rounds them, but for those that are ``changed``."""
    config = case.reference_config()
    params = models.reference_parameters(config)
    params = {name: changed.get(name, value).to(case.dtype).float() for name, value in params.items()}
    return reference.loss_and_gradients(params, *models.batch(), config)


def assert_near(one: Found, other: Found, tolerance: float) -> None:
    """Largest difference of any tensor, relative to the largest value of the tensor."""
    assert one[1].keys() == other[1].keys()
    for name, mine, its in [("loss", one[0], other[0]), *((name, one[1][name], other[1][name]) for name in one[1])]:
        difference = ((mine - its).abs().max() / its.abs().max().clamp(min=1e-3)).item()
        assert difference < tolerance, f"{name}: {difference:.2g}"


def same_twice(case: Case) -> None:
    """The same bits in each run."""
    one, other = ours(case), ours(case)
    assert torch.equal(one[0], other[0])
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def wrong_weight(case: Case) -> None:
    """Mutant: one parameter of an expert a percent larger."""
    params = models.reference_parameters(case.reference_config())
    name = next(name for name in params if "local_experts" in name)
    assert_near(ours(case), truth(case, **{name: params[name] * 1.01}), FP32)


def rows() -> tuple[Tensor, Tensor]:
    """Rows that come in families, and how many go to each expert; on the CPU."""
    generator = torch.Generator().manual_seed(3)
    families = torch.randn(ROWS // 8, HIDDEN, generator=generator).repeat_interleave(8, dim=0)
    return families + 0.1 * torch.randn(ROWS, HIDDEN, generator=generator), torch.full((EXPERTS,), ROWS // EXPERTS)


def keys_agree() -> None:
    """But for rows between two axes, which rounding may turn."""
    here, _ = rows()
    hasher = lsh.Hasher(HIDDEN, hashes=HASHES, width=WIDTH, seed=1)
    on_cpu, on_device = (hasher.keys(here.to(place))[0].cpu() for place in ("cpu", DEVICE))
    share = (on_cpu == on_device).float().mean().item()
    assert share > 0.99, f"{share:.3f} of the keys"


def codec_agrees(*, wrong_keys: bool = False) -> None:
    """Clusters of the same keys, exactly; their means, restored rows and gradients, to fp32's rounding."""
    here, per_expert = rows()
    hasher = lsh.Hasher(HIDDEN, hashes=HASHES, width=WIDTH, seed=1)
    keys, sketches = hasher.keys(here)[0], hasher.sketches(here)
    found = []
    for place in ("cpu", DEVICE):
        moved = keys.flip(0) if wrong_keys and found else keys
        found.append(encoded(here.to(place), moved.to(place), sketches.to(place), per_expert.to(place)))
    for name in found[0]:
        mine, its = found[1][name].cpu(), found[0][name].cpu()
        assert mine.shape == its.shape, name
        if its.is_floating_point():
            assert torch.allclose(mine, its, rtol=1e-5, atol=1e-5), f"{name}: {(mine - its).abs().max():.2g}"
        else:
            assert torch.equal(mine, its), name


def encoded(rows: Tensor, keys: Tensor, sketches: Tensor, per_expert: Tensor) -> dict[str, Tensor]:
    """What the codec makes of rows on their device."""
    clusters = lsh.cluster(keys, per_expert, chunks=2)
    num_clusters = int((clusters.sizes > 0).sum())
    better = lloyd.refined(clusters, sketches, per_expert, num_clusters)
    leaf = rows.clone().requires_grad_()
    centroids = lsh.means(leaf, clusters, num_clusters)
    weights = torch.linspace(0.1, 1, len(rows), device=rows.device)
    restored = lsh.restore(centroids * 2, clusters, weights, (leaf, centroids))
    restored.sin().sum().backward()
    assert leaf.grad is not None
    return {
        "ids": clusters.ids,
        "sizes": clusters.sizes,
        "counts": clusters.per_expert,
        "refined ids": better.ids,
        "means": centroids.detach(),
        "restored": restored.detach(),
        "gradient": leaf.grad,
    }


def part(found: checks.Checks) -> None:
    """Models, then the codec, then the mutants."""
    device.prepare()
    with device.fake_ranks(1):
        for name, case in CASES.items():
            found.holds(name, lambda case=case: assert_near(ours(case), truth(case), FP32))
        bf16 = Case(dtype=torch.bfloat16)
        found.holds("bf16", lambda: assert_near(ours(bf16), truth(bf16), BF16))
        found.holds("top-2, twice the same", lambda: same_twice(Case(topk=2)))
        found.must_fail("a weight of an expert 1% larger", lambda: wrong_weight(Case()))
    found.holds("codec: keys", keys_agree)
    found.holds("codec: clusters, means, restored rows, refinement", codec_agrees)
    found.must_fail("codec: other keys", lambda: codec_agrees(wrong_keys=True))


if __name__ == "__main__":
    checks.run_part(part)
