"""What unique tokens save: rows that travel, as a part of those that would without."""

from math import comb


def expected_unique_share(experts: int, topk: int, ep: int, zero_experts: int = 0) -> float:
    """Rows that travel with --a2a-unique for each that would without, where every choice of experts is as likely.

    With ``rank`` they travel to ranks, with ``node`` to nodes. A token leaves one out if all its choices lie elsewhere:
    C(E - E/R, k) of the C(E, k) choices (the hypergeometric distribution).

    Args:
        experts: E, on all ranks.
        topk: k, choices of a token, those of zero experts among them.
        ep: R, ranks, or nodes, that share the experts.
        zero_experts: further ones to choose from, whose tokens do not travel.

    Raises:
        ValueError: where experts cannot be shared so, or not be chosen.
    """
    if ep < 1 or experts % ep or not 1 <= topk <= experts + zero_experts or zero_experts < 0:
        raise ValueError(
            f"{experts} experts on {ep} ranks, and {topk} choices of {experts + zero_experts}: ranks have the same "
            "number of experts, and a token chooses from 1 to all"
        )
    choices = experts + zero_experts
    touched = ep * (1 - comb(choices - experts // ep, topk) / comb(choices, topk))
    return touched / (topk * experts / choices)
