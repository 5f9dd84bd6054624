"""Dense models, and stock MoE models, as ScMoE models to train on from (sparse upcycling, arXiv 2212.05055).

The last block of every group gets an MoE in the place of its MLP: the shared expert is that MLP, so are the experts,
and the router is drawn. Copies differ by noise, or by parts that are drawn anew (drop-upcycling, arXiv 2502.19261), or
not at all. Every tensor that is drawn comes from the seed and its name alone.
"""

from __future__ import annotations

import re
import zlib
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from checkpoints.disk.hf_folder import CONFIG, HFFolder
from checkpoints.disk.torch_dist import MegatronCheckpoint
from checkpoints.mappings.dense import dense_args
from checkpoints.mappings.layers import carries_moe
from checkpoints.mappings.links import expected_tensors, links, megatron_pieces
from checkpoints.mappings.megatron_settings import check_args, complete
from checkpoints.mappings.norms import renamed_norms
from checkpoints.plan import Conversion, Piece, Read, Target
from checkpoints.settings import check_layers
from checkpoints.tensors import CheckpointError, TensorInfo
from megatron_scmoe.config import MOE_EVERY_CHOICES

EXPERTS, TOPK = 8, 1  # unless something else is asked for

# Tensors that no dense model has; a stock MoE has some of them.
_FRESH = (".mlp.router.weight", ".mlp.shared_experts.gate_weight", ".combine_gate.weight")
_COMPUTED = "frequencies of rotary positions are computed"
_TIED = "the output layer is the embedding"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_COMPARED_ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Upcycling:
    """What the new model is to be.

    Attributes:
        combine: fresh gates weigh shared and routed experts alike.
        experts: of each MoE; one that is there already keeps its own, and its router.
        noise: standard deviation of what is added to each expert's weights, as a part of that of the weights.
        drop_ratio: part of each expert's inner dimension that is drawn anew, with the weights' mean and deviation.
        seed: of everything drawn.
    """

    position: str = "pos2"
    combine: str = "cg1"
    moe_every: int = 2
    experts: int = EXPERTS
    topk: int = TOPK
    noise: float = 0.0
    drop_ratio: float = 0.0
    seed: int = 1234

    def check(self, num_layers: int) -> None:
        """Raise CheckpointError where a model of ``num_layers`` blocks cannot become this."""
        rules = {
            f"groups must be whole: {num_layers} blocks and --moe-every {self.moe_every}": num_layers % self.moe_every,
            f"pos2 and pos3 read a block before the last one: --position {self.position} and --moe-every 1": (
                self.moe_every == 1 and self.position != "pos1"
            ),
            f"a token has experts to choose from: --topk {self.topk} and --experts {self.experts}": (
                not 1 <= self.topk <= self.experts
            ),
        }
        for rule, broken in rules.items():
            if broken:
                raise CheckpointError(f"{rule}; change one of them")


def from_hf_dense(source: HFFolder, options: Upcycling) -> Target:
    """A dense Hugging Face model (Llama and its relatives) as an ScMoE checkpoint of the local spec."""
    origin = str(source.folder / CONFIG)
    args = Namespace(**dense_args(source.config, origin))
    check_layers(origin, source.config, "num_hidden_layers", source.infos)
    check_args(origin, args, source.infos)
    if not args.untie_embeddings_and_output_weights and _has_its_own_head(source):
        args.untie_embeddings_and_output_weights = True  # as transformers loads it, whatever the configuration says
    pieces, _ = megatron_pieces(source.infos, links(complete(args)))
    dropped = {name: _COMPUTED for name in source.infos if name.endswith(".rotary_emb.inv_freq")}
    if not args.untie_embeddings_and_output_weights and _HEAD in source.infos:
        dropped[_HEAD] = _TIED
    return _upcycled(pieces, args, options, dropped)


def _has_its_own_head(source: HFFolder) -> bool:
    """Whether an output layer is stored that is not the embedding, in a model that says that they are tied."""
    head, embedding = source.infos.get(_HEAD), source.infos.get(_EMBEDDING)
    if head is None or embedding is None:
        return False
    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        return True
    starts = range(0, head.num_rows, _COMPARED_ROWS)
    parts = ((start, min(start + _COMPARED_ROWS, head.num_rows)) for start in starts)
    return not all(torch.equal(source.read(_HEAD, *part), source.read(_EMBEDDING, *part)) for part in parts)


def from_megatron(source: MegatronCheckpoint, options: Upcycling) -> Target:
    """A dense checkpoint of Megatron, or one of its shared-expert MoE, as an ScMoE checkpoint of the same spec.

    One that has a shortcut already is refused, and an MoE that is not in the groups' last blocks.
    """
    args = source.args
    if getattr(args, "shortcut", "none") != "none":
        raise CheckpointError(
            f"{source.folder} has a shortcut already: it is {args.shortcut}; train on with --shortcut-resume changed"
        )
    pieces = [Piece(name=name, info=info, reads=(Read(name),)) for name, info in source.infos.items()]
    return _upcycled(pieces, args, options, source.others)


def _upcycled(there: list[Piece], args: Namespace, options: Upcycling, dropped: Mapping[str, str]) -> Target:
    """What becomes of the model of ``args``, whose tensors ``there`` are whole, one after the other."""
    options.check(args.num_layers)
    if args.add_bias_linear:
        raise CheckpointError("experts have no biases, and the linears of this checkpoint have; no way known")
    moe_blocks = range(options.moe_every - 1, args.num_layers, options.moe_every)
    then_moe = [block for block in range(args.num_layers) if carries_moe(args, block)]
    if then_moe:
        _check_stays(args, options, then_moe, list(moe_blocks))
    elif predictions := getattr(args, "mtp_num_layers", None):
        raise CheckpointError(
            "a prediction layer is a block like the last one, which gets experts, and a dense model's have MLPs: "
            f"the checkpoint has --mtp-num-layers {predictions}; no way known"
        )
    new_args = _args(args, options, stock_moe=bool(then_moe))
    renamed = renamed_norms(complete(args), complete(Namespace(**new_args)))
    made: dict[str, list[Piece]] = {}
    for piece in there:
        made.setdefault(name := renamed.get(piece.name, piece.name), []).append(replace(piece, name=name))
    pieces: list[Piece] = []
    for name, parts in made.items():
        mlp = re.fullmatch(r"decoder\.layers\.(\d+)\.mlp\.linear_fc[12]\.weight", name)
        is_copied = not then_moe and mlp is not None and int(mlp[1]) in moe_blocks
        pieces.extend(_experts(name, parts, options, gated=args.swiglu) if is_copied else parts)
    expected = expected_tensors(Namespace(**new_args), {piece.name: piece.info for piece in pieces})
    for name, info in expected.items():
        if name.endswith(_FRESH) and name not in made:
            draw = partial(_drawn, name=name, shape=info.shape, std=new_args["init_method_std"], seed=options.seed)
            pieces.append(Piece(name=name, info=info, reads=(), make=draw))
    return Target(conversion=Conversion(pieces=tuple(pieces), expected=expected, dropped=dropped), args=new_args)


def _check_stays(args: Namespace, options: Upcycling, there: list[int], wanted: list[int]) -> None:
    """Refuse an MoE that is in other blocks than are wanted, or without what it needs; it is taken as it is."""
    if there != wanted:
        fitting = [n for n in MOE_EVERY_CHOICES if there == list(range(n - 1, args.num_layers, n))]
        fix = f"use --moe-every {fitting[0]}" if fitting else "no way known: groups have theirs in their last block"
        raise CheckpointError(
            f"an MoE stays where it is: the checkpoint has one in the blocks {there}, and --moe-every "
            f"{options.moe_every} wants them in {wanted}; {fix}"
        )
    for flag, asked, known in (
        ("--experts", options.experts, (EXPERTS, args.num_experts)),
        ("--topk", options.topk, (TOPK, args.moe_router_topk)),
        ("--expert-noise", options.noise, (0,)),
        ("--drop-ratio", options.drop_ratio, (0,)),
    ):
        if asked not in known:
            raise CheckpointError(
                f"the checkpoint has experts already, {args.num_experts} of them and {args.moe_router_topk} for each "
                f"token, which stay as they are: {flag} is {asked}; drop it"
            )
    if not args.moe_shared_expert_intermediate_size:
        raise CheckpointError("scmoe always runs a shared expert, and the checkpoint's MoE has none; no way known")


def _args(args: Namespace, options: Upcycling, *, stock_moe: bool) -> dict[str, Any]:
    experts = {
        "num_experts": options.experts,
        "moe_router_topk": options.topk,
        "moe_ffn_hidden_size": args.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": args.ffn_hidden_size,
        "moe_router_pre_softmax": True,
        "moe_token_dispatcher_type": "alltoall",
    }
    pattern = ([0] * (options.moe_every - 1) + [1]) * (args.num_layers // options.moe_every)
    return {
        "init_method_std": 0.02,
        **vars(args),
        **({} if stock_moe else experts),
        "moe_layer_freq": 1 if options.moe_every == 1 else pattern,
        "moe_shared_expert_gate": options.combine == "cg1",
        "shortcut": "scmoe",
        "shortcut_position": [options.position],
        "shortcut_combine": options.combine,
        "moe_every": options.moe_every,
    }


def _experts(name: str, parts: list[Piece], options: Upcycling, *, gated: bool) -> Iterator[Piece]:
    """A linear of the dense MLP, in parts, as that of the shared expert, and then of every routed expert."""
    prefix, linear = name.split(".mlp.")
    yield from (replace(part, name=f"{prefix}.mlp.shared_experts.{linear}") for part in parts)
    whole = parts[0].info.with_rows(sum(part.info.num_rows for part in parts))
    for expert in range(options.experts):
        yield Piece(
            name=f"{prefix}.mlp.experts.experts.{linear}",
            info=TensorInfo((1, *whole.shape), whole.dtype),
            reads=tuple(read for part in parts for read in part.reads),
            make=partial(_expert, parts=parts, name=f"{prefix} {expert}", linear=linear, gated=gated, options=options),
            row=expert,
        )


def _expert(*read: Tensor, parts: list[Piece], name: str, linear: str, gated: bool, options: Upcycling) -> Tensor:
    tensors = iter(read)
    weight = torch.cat([part.make(*islice(tensors, len(part.reads))) for part in parts])
    if options.drop_ratio:
        # Columns stand for the inner dimension: those of the second linear, the rows of the first one, where a gate and
        # its up projection lie behind one another. Both linears of an expert draw the same ones anew.
        first = linear.startswith("linear_fc1")
        columns = (weight.T if first else weight).clone()
        values = _normal(columns, f"{name} {linear} drop", options.seed)
        halves = 2 if first and gated else 1
        inner = columns.shape[1] // halves
        dropped = torch.randperm(inner, generator=_generator(name, options.seed))[: round(options.drop_ratio * inner)]
        for half in range(halves):
            columns[:, half * inner + dropped] = values[:, half * inner + dropped]
        weight = (columns.T if first else columns).contiguous()
    if options.noise:
        drawn = _normal(weight, f"{name} {linear} noise", options.seed, mean=0.0)
        weight = weight + (options.noise * drawn).to(weight.dtype)
    return weight.unsqueeze(0)


def _normal(weight: Tensor, name: str, seed: int, *, mean: float | None = None) -> Tensor:
    """Normal numbers like ``weight``: its shape, dtype and deviation, and its mean unless another is given."""
    wide = weight.float()
    drawn = torch.randn(weight.shape, generator=_generator(name, seed))
    return (drawn * wide.std() + (wide.mean() if mean is None else mean)).to(weight.dtype)


def _generator(name: str, seed: int) -> torch.Generator:
    # Of a seed torch's CPU generator takes 32 bits, so both have to be in them.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def _drawn(*, name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """A router's weight, drawn; a gate's, zero, which weighs both sides alike."""
    if not name.endswith("router.weight"):
        return torch.zeros(shape)
    return std * torch.randn(shape, generator=_generator(name, seed))
