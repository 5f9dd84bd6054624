"""Dense models, and stock MoE models, as ScMoE models to train on from (sparse upcycling, arXiv 2212.05055).

The last block of every group gets an MoE in the place of its MLP: the shared expert is that MLP, so are the experts,
and the router is drawn. Copies differ by noise, or by parts that are drawn anew (drop-upcycling, arXiv 2502.19261), or
not at all. Every tensor that is drawn comes from the seed and its name alone.
"""

from __future__ import annotations

import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checkpoints.disk.hf_folder import CONFIG, HFFolder
from checkpoints.disk.torch_dist import MegatronCheckpoint
from checkpoints.formats import Target
from checkpoints.mappings import scmoe_settings
from checkpoints.mappings.dense import dense_args
from checkpoints.mappings.links import expected_tensors, links, megatron_pieces
from checkpoints.mappings.megatron_settings import check_args
from checkpoints.mappings.norms import carries_moe, renamed_norms
from checkpoints.plan import Conversion, Piece, Read, as_it_is
from checkpoints.settings import check_layers
from checkpoints.tensors import CheckpointError, TensorInfo
from megatron_scmoe.config import MOE_EVERY_CHOICES

EXPERTS, TOPK = 8, 1  # unless something else is asked for

_COMPUTED = "frequencies of rotary positions are computed"
_TIED = "the output layer is the embedding"


class Recipe(NamedTuple):
    """How a tensor of a Megatron model comes from a source.

    Attributes:
        info: of the tensor.
        reads: what it is made of.
        make: makes it.
    """

    info: TensorInfo
    reads: tuple[Read, ...]
    make: Callable[..., Tensor] = as_it_is


@dataclass(frozen=True, slots=True, kw_only=True)
class Upcycling:
    """What the new model is to be.

    Attributes:
        position: pos1, pos2 or pos3.
        combine: add, cg1 or cg2; fresh gates weigh shared and routed experts alike.
        moe_every: blocks in a group.
        experts: of each MoE; one that is there already keeps its own, and its router.
        topk: experts of a token.
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
            f"a part is from 0 to 1: --drop-ratio {self.drop_ratio}": not 0 <= self.drop_ratio <= 1,
            f"a deviation is not negative: --expert-noise {self.noise}": self.noise < 0,
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
    recipes = _recipes(*megatron_pieces(source.infos, links(scmoe_settings.complete(args))))
    dropped = {name: _COMPUTED for name in source.infos if name.endswith(".rotary_emb.inv_freq")}
    if not args.untie_embeddings_and_output_weights and "lm_head.weight" in source.infos:
        dropped["lm_head.weight"] = _TIED
    return _upcycled(recipes, args, options, dropped=dropped)


def from_megatron(source: MegatronCheckpoint, options: Upcycling) -> Target:
    """A dense checkpoint of Megatron, or one of its shared-expert MoE, as an ScMoE checkpoint of the same spec.

    Raises:
        CheckpointError: for a checkpoint that has a shortcut already, or an MoE that is not in the groups' last blocks.
    """
    args = source.args
    if getattr(args, "shortcut", "none") != "none":
        raise CheckpointError(
            f"{source.folder} has a shortcut already: it is {args.shortcut}; train on with --shortcut-resume changed"
        )
    recipes = {name: Recipe(info, (Read(name),)) for name, info in source.infos.items()}
    return _upcycled(recipes, args, options, dropped=source.others)


def _recipes(pieces: list[Piece], whole: Mapping[str, TensorInfo]) -> dict[str, Recipe]:
    """Whole tensors from the pieces that make them up."""
    by_name: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_name.setdefault(piece.name, []).append(piece)
    return {
        name: Recipe(whole[name], tuple(read for piece in its for read in piece.reads), partial(_joined, pieces=its))
        for name, its in by_name.items()
    }


def _joined(*read: Tensor, pieces: list[Piece]) -> Tensor:
    tensors = iter(read)
    return torch.cat([piece.make(*islice(tensors, len(piece.reads))) for piece in pieces])


def _upcycled(
    recipes: Mapping[str, Recipe], args: Namespace, options: Upcycling, *, dropped: Mapping[str, str]
) -> Target:
    options.check(args.num_layers)
    if args.add_bias_linear:
        raise CheckpointError("experts have no biases, and the linears of this checkpoint have; no way known")
    moe_blocks = range(options.moe_every - 1, args.num_layers, options.moe_every)
    then_moe = [block for block in range(args.num_layers) if carries_moe(args, block)]
    if then_moe and then_moe != list(moe_blocks):
        fitting = [n for n in MOE_EVERY_CHOICES if then_moe == list(range(n - 1, args.num_layers, n))]
        fix = f"use --moe-every {fitting[0]}" if fitting else "no way known: groups have theirs in their last block"
        raise CheckpointError(
            f"an MoE stays where it is: the checkpoint has one in the blocks {then_moe}, and --moe-every "
            f"{options.moe_every} wants them in {list(moe_blocks)}; {fix}"
        )
    if then_moe:
        _check_experts_stay(args, options)
    if then_moe and not args.moe_shared_expert_intermediate_size:
        raise CheckpointError("scmoe always runs a shared expert, and the checkpoint's MoE has none; no way known")
    new_args = _args(args, options, stock_moe=bool(then_moe))
    renamed = renamed_norms(args, Namespace(**new_args))
    made = {renamed.get(name, name): recipe for name, recipe in recipes.items()}
    pieces: list[Piece] = []
    for name, recipe in made.items():
        if then_moe or _mlp_block(name) not in moe_blocks:
            pieces.append(Piece(name=name, info=recipe.info, reads=recipe.reads, make=recipe.make))
        else:
            pieces.extend(_experts(name, recipe, options, gated=args.swiglu))
    for block in moe_blocks:
        for name, shape in _fresh(block, new_args, options).items():
            if name not in made:
                make = partial(_drawn, name=name, shape=shape, std=new_args["init_method_std"], seed=options.seed)
                pieces.append(Piece(name=name, info=TensorInfo(shape, torch.float32), reads=(), make=make))
    expected = expected_tensors(Namespace(**new_args), {piece.name: piece.info for piece in pieces})
    return Target(
        conversion=Conversion(pieces=tuple(pieces), expected=expected, dropped=dropped), args=new_args, files={}
    )


def _check_experts_stay(args: Namespace, options: Upcycling) -> None:
    """Refuse what is asked of experts that are there already, and are taken as they are."""
    for flag, asked, there in (
        ("--experts", options.experts, (EXPERTS, args.num_experts)),
        ("--topk", options.topk, (TOPK, args.moe_router_topk)),
        ("--expert-noise", options.noise, (0,)),
        ("--drop-ratio", options.drop_ratio, (0,)),
    ):
        if asked not in there:
            raise CheckpointError(
                f"the checkpoint has experts already, {args.num_experts} of them and {args.moe_router_topk} for each "
                f"token, which stay as they are: {flag} is {asked}; drop it"
            )


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


def _mlp_block(name: str) -> int | None:
    """The block whose MLP's linear it is; None for other tensors."""
    parts = name.split(".")
    is_linear = parts[:2] == ["decoder", "layers"] and parts[3:4] == ["mlp"] and parts[-1] == "weight"
    return int(parts[2]) if is_linear and parts[4] in ("linear_fc1", "linear_fc2") else None


def _experts(name: str, recipe: Recipe, options: Upcycling, *, gated: bool) -> Iterator[Piece]:
    """A linear of the dense MLP as that of the shared expert, and then of every routed expert."""
    prefix, linear = name.split(".mlp.")
    shared = f"{prefix}.mlp.shared_experts.{linear}"
    yield Piece(name=shared, info=recipe.info, reads=recipe.reads, make=recipe.make)
    for expert in range(options.experts):
        yield Piece(
            name=f"{prefix}.mlp.experts.experts.{linear}",
            info=TensorInfo((1, *recipe.info.shape), recipe.info.dtype),
            reads=recipe.reads,
            make=partial(
                _expert, make=recipe.make, name=f"{prefix} {expert}", linear=linear, gated=gated, options=options
            ),
            row=expert,
        )


def _expert(
    *parts: Tensor, make: Callable[..., Tensor], name: str, linear: str, gated: bool, options: Upcycling
) -> Tensor:
    weight = make(*parts)
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


def _fresh(block: int, args: Mapping[str, Any], options: Upcycling) -> dict[str, tuple[int, ...]]:
    """Tensors that no dense model has; a stock MoE has some of them."""
    hidden, prefix = args["hidden_size"], f"decoder.layers.{block}."
    shapes: dict[str, tuple[int, ...]] = {prefix + "mlp.router.weight": (args["num_experts"], hidden)}
    if options.combine == "cg1":
        shapes[prefix + "mlp.shared_experts.gate_weight"] = (1, hidden)
    if options.combine == "cg2":
        shapes[prefix + "combine_gate.weight"] = (2, hidden)
    return shapes


def _drawn(*, name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """A router's weight, drawn; a gate's, zero, which weighs both sides alike."""
    if not name.endswith("router.weight"):
        return torch.zeros(shape)
    return std * torch.randn(shape, generator=_generator(name, seed))
