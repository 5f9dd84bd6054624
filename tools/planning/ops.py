"""The kernels of each op on one rank."""

from __future__ import annotations

from megatron_scmoe.contracts import TransferName
from planning.hardware import Machine
from planning.kernels import Clock, Kernel, Work
from planning.rows import BF16, computed, travelling, values
from planning.training import Dispatcher, Precision
from planning.workload import Attention, Embedding, GroupEnd, Mamba, Mlp, Moe, Output, Single, Workload

CHUNK = 128
"""Tokens that the state-space kernels compute as one matrix (Mamba-2, section 6)."""
UNIQUE_LAUNCHES = 14
"""Forward, beside those of tokens that go to each expert (docs/launches.md)."""
ALIGNED = {Precision.BF16: 1, Precision.FP8: 16, Precision.FP8_BLOCKWISE: 16, Precision.MXFP8: 32, Precision.NVFP4: 32}
"""Rows of an expert are padded to multiples of these."""


class Ops:
    """Kernels of the ops of one workload on one rank of a machine.

    Args:
        workload: whose sizes and layout count.
        machine: where it runs.
    """

    def __init__(self, workload: Workload, machine: Machine) -> None:
        self.workload, self.layout, self.training = workload, workload.layout, workload.training
        self.clock = Clock(machine, self.training.precision, self.training.grad_bytes)
        self.plain = Clock(machine, Precision.BF16, self.training.grad_bytes)
        self.tokens = workload.seq_length * workload.micro_batch / self.layout.cp
        """Of a micro-batch on one rank, those of its tensor parallel group together."""
        self.own_tokens = self.tokens / self.layout.tp if self.training.sequence_parallel else self.tokens
        """Where tensors are not cut by heads or widths."""

    def kernels(self, op: Single) -> list[Kernel]:  # noqa: PLR0911 (a case for each kind)
        """The kernels of an op, norm and residual included."""
        match op:
            case Attention():
                return self._latent_attention(op) if op.kv_latent or op.q_latent else self._attention(op)
            case Mamba():
                return self._mamba(op)
            case Mlp():
                return [self.norm("mlp"), *self.mlp(op, "mlp")]
            case Moe():
                return self.moe(op)
            case Embedding():
                return [Kernel("embedding", "table", self._passes(2, 1), self._passes(4, 2))]
            case Output():
                return self._output()
            case GroupEnd():
                return [Kernel("mlp", "add", self._passes(3, 1), self._passes(1, 1))]

    def norm(self, kind: str) -> Kernel:
        """A norm, and the addition to the residual stream behind the op."""
        return Kernel(kind, "norm", self._passes(5, 2), self._passes(7, 3))

    def mlp(self, op: Mlp, kind: str) -> list[Kernel]:
        """A dense MLP or shared expert without its norm."""
        tokens, width = self.tokens, op.width / self.layout.tp
        return [
            self.clock.linear(kind, "first", tokens, width * (1 + op.gated), self.workload.hidden),
            self._activation(kind, tokens * width, gated=op.gated, quantized=False),
            self.clock.linear(kind, "second", tokens, self.workload.hidden, width),
        ]

    def moe(self, op: Moe) -> list[Kernel]:
        """An MoE layer with its norm."""
        shared = self.mlp(op.shared, "shared expert") if op.shared else []
        return [self.norm("router"), self.route(op), *self.flight(op), *shared]

    def route(self, op: Moe) -> Kernel:
        """Choosing experts: scores in fp32, and some ten small kernels on [tokens, experts]."""
        tokens, experts = self.own_tokens, op.experts
        scores = self.plain.moving(tokens * (self.workload.hidden * 4 + experts * 4 * 8), 12)
        gradients = self.plain.moving(tokens * (self.workload.hidden * 8 + experts * 4 * 6), 10)
        return Kernel("router", "route", scores, gradients)

    def flight(self, op: Moe, chunks: int = 1) -> list[Kernel]:
        """What computes of one of ``chunks`` flights: packing, unpacking, experts, packing again, delivering."""
        tokens = self.own_tokens / chunks
        width = op.latent or self.workload.hidden
        rows = computed(op, tokens, self.training)
        pack, sort = self._permuting(op, tokens, rows, width)
        more = self.plain.moving(0, 0 if op.once is None else UNIQUE_LAUNCHES)
        down = [self.clock.linear("router", "encode", tokens, op.latent, self.workload.hidden)] if op.latent else []
        up = [self.clock.linear("router", "decode", tokens, self.workload.hidden, op.latent)] if op.latent else []
        there, there_back, back, back_again = (
            self._rounding(op, tokens, TransferName.of(kind, backward=way))
            for kind in ("dispatch", "combine")
            for way in (False, True)
        )
        return [
            *down,
            Kernel("permute", "encode", pack + more + there, pack + there_back),
            Kernel("permute", "unpack", sort + there, sort + there_back),
            *self.experts(op, rows * self.layout.etp, width),
            Kernel("permute", "repack", sort + back, sort + back_again),
            Kernel("permute", "decode", pack + back, pack.times(2) + back_again),
            *up,
        ]

    def _rounding(self, op: Moe, tokens: float, transfer: TransferName) -> Work:
        """Rows to codes where they leave, or back where they arrive: one kernel each, if the transfer is rounded."""
        if transfer not in op.rounded:
            return Work()
        hidden = self.workload.hidden
        each = (op.latent or hidden) * BF16 + values(op, hidden, transfer)
        return self.plain.moving(travelling(op, tokens, self.training) * each, 1)

    def experts(self, op: Moe, rows: float, width: float) -> list[Kernel]:
        """This rank's experts on ``rows`` rows of ``width``, balanced."""
        groups = op.experts / self.layout.ep
        rows = max(rows, groups)
        aligned = ALIGNED[self.training.precision]
        rows = groups * -(-rows / groups // aligned) * aligned
        middle = op.width / self.layout.etp
        fused = self.training.fused_experts
        return [
            self.clock.experts("first", rows, middle * (1 + op.gated), width, groups, fused=fused),
            self._activation("experts", rows * middle, gated=op.gated, quantized=fused),
            self.clock.experts("second", rows, width, middle, groups, fused=fused),
            *([self._biases(rows * middle * (1 + op.gated), rows * width, groups)] if op.bias else []),
        ]

    def _biases(self, first: float, second: float, groups: float) -> Kernel:
        """Biases of both layers, on so many elements: the first within its product, the second times a token's weight.

        Core adds the latter expert by expert (``TEGroupedMLP._apply_bias``): bias times weight in fp32, the sum in
        fp32, all experts' put together, and cast. None of these is fused. Bytes of an element forward: 4, 10, 8, 6.
        Backward: cast to fp32 (6) and back (6), for bias and weight a product and a sum each (12 and 12), and the
        gradients of all experts put together (4).
        """
        if self.training.fused_experts:
            both = self.plain.moving((first + second) * BF16, 2)
            return Kernel("experts", "bias", both, both)
        forward = self.plain.moving(first * BF16 + 28 * second, 1 + 2 * groups + 2)
        return Kernel("experts", "bias", forward, self.plain.moving(first * BF16 + 40 * second, 1 + 5 * groups + 2))

    def _permuting(self, op: Moe, tokens: float, rows: float, width: float) -> tuple[Work, Work]:
        """Packing tokens for their ranks (and as much to deliver), and sorting or spreading what arrives by expert."""
        move, local = self.plain.moving, op.experts // self.layout.ep
        if op.once is not None:
            sent = travelling(op, tokens, self.training)
            spread = move((sent + rows) * self.layout.etp * width * BF16, 2)
            return move((tokens + sent) * width * BF16, 4), spread
        if self.training.dispatcher is Dispatcher.ALLTOALL:
            sort = move(2 * rows * width * BF16, 2) if local > 1 and self.layout.ep > 1 else Work()
            return move((tokens + rows) * width * BF16, 4), sort
        return move(2 * tokens * width * BF16, 2), move((tokens + rows) * width * BF16, 2)

    def _activation(self, kind: str, elements: float, *, gated: bool, quantized: bool) -> Kernel:
        """``quantized``: within the product before it, so that nothing of its own is moved forward."""
        read = 1 + gated
        forward = Work() if quantized else self.plain.moving(elements * BF16 * (read + 1))
        return Kernel(
            kind, "act", forward, self.plain.moving(elements * BF16 * (2 * read + 1) * (0.5 if quantized else 1))
        )

    def _passes(self, count: float, kernels: int) -> Work:
        """Kernels that together read or write the residual stream ``count`` times."""
        return self.plain.moving(count * self.own_tokens * self.workload.hidden * BF16, kernels)

    def _core(self, op: Attention, query_dim: float, value_dim: float) -> Kernel:
        """Scores of what comes before each token. Heads of less than 128 take as long: exponentials bound them."""
        length = self.workload.seq_length
        seen = min(op.window, length) if op.window else length / 2
        heads = op.heads / self.layout.tp
        if not op.fused:
            return self._scores(op, heads, query_dim + value_dim)
        flops = 2 * self.tokens * heads * seen * (max(query_dim, 128) + max(value_dim, 128))
        core = self.clock.attending(flops)
        if self.training.fp8_attention:
            faster = self.clock.machine.hardware.bf16 / self.clock.machine.hardware.fp8
            core = core._replace(
                forward=core.forward.times((1 + faster) / 2), backward=core.backward.times((1 + faster) / 2)
            )
        return core

    def _scores(self, op: Attention, heads: float, dims: float) -> Kernel:
        """Scores in memory: written, scaled and masked, a softmax, dropout, read; as products in bf16."""
        length = min(op.window or self.workload.seq_length, self.workload.seq_length)
        scores = self.tokens * heads * length
        hardware, constants = self.clock.machine.hardware, self.clock.machine.constants
        product = Work(2 * scores * dims / (hardware.bf16 * constants.gemm), 2)
        forward = product + self.plain.moving(8 * scores * BF16, 3)
        return Kernel("attention", "core", forward, product.times(2) + self.plain.moving(12 * scores * BF16, 4))

    def _attention(self, op: Attention) -> list[Kernel]:
        hidden, tp, tokens = self.workload.hidden, self.layout.tp, self.tokens
        heads, pairs = op.heads / tp, max(op.kv_heads / tp, 1)
        query = heads * op.head_dim
        made = query * (1 + op.gated) + 2 * pairs * op.head_dim
        turned = self.plain.moving(2 * tokens * (query + pairs * op.head_dim) * BF16, 2)
        return [
            self.norm("attention"),
            self.clock.linear("attention", "qkv", tokens, made, hidden),
            Kernel("attention", "rope", turned, turned),
            self._core(op, op.head_dim, op.value_dim or op.head_dim),
            self.clock.linear("attention", "proj", tokens, hidden, heads * (op.value_dim or op.head_dim)),
        ]

    def _latent_attention(self, op: Attention) -> list[Kernel]:
        """Queries, keys and values from latents; the down projections are whole on each rank (Megatron's MLA)."""
        hidden, tokens, heads = self.workload.hidden, self.tokens, op.heads / self.layout.tp
        linear = self.clock.linear
        query, value = op.head_dim + op.rope_dim, op.value_dim or op.head_dim
        pairs = max(op.kv_heads / self.layout.tp, 1)
        # Queries are turned in place; keys and values are taken apart, and keys put together with their turned part.
        copied = 2 * heads * op.rope_dim + pairs * (2 * (op.head_dim + value) + op.rope_dim)
        turned = self.plain.moving(tokens * copied * BF16, 2)
        kernels = [self.norm("attention")]
        if op.q_latent:
            kernels.append(linear("attention", "down", self.own_tokens, op.q_latent, hidden))
            kernels.append(linear("attention", "up", tokens, heads * query, op.q_latent))
        else:
            kernels.append(linear("attention", "down", tokens, heads * query, hidden))
        if op.kv_latent:
            kernels.append(linear("attention", "down", self.own_tokens, op.kv_latent + op.rope_dim, hidden))
            kernels.append(linear("attention", "up", tokens, pairs * (op.head_dim + value), op.kv_latent))
        else:
            kernels.append(
                linear("attention", "down", tokens, pairs * (query if op.shared_kv else query + value), hidden)
            )
        kernels.append(Kernel("attention", "up", turned, turned))
        kernels.append(self._core(op, query, value))
        if op.out_latent:
            group = heads * value / op.out_groups
            kernels += [linear("attention", "proj", tokens, op.out_latent, group)] * op.out_groups
            kernels.append(linear("attention", "proj", tokens, hidden, op.out_latent * op.out_groups))
        else:
            kernels.append(linear("attention", "proj", tokens, hidden, heads * value))
        return kernels

    def _mamba(self, op: Mamba) -> list[Kernel]:
        """Mixer of Mamba-2: convolution, scan in chunks, gated norm; by bytes, the states of chunks in fp32."""
        tp, tokens = self.layout.tp, self.tokens
        inner = op.heads * op.head_dim / tp
        shared = 2 * op.groups * op.state / tp
        heads = op.heads / tp
        linear = self.clock.linear
        convolved = self.plain.moving(3 * tokens * (inner + shared) * BF16, 2)
        scanned = self.plain.moving(tokens * (8 * inner * BF16 + 3 * 4 * inner * op.state / CHUNK), 6)
        flops = tokens * inner * (4 * op.state + 2 * CHUNK)
        computed = Work(flops / (self.clock.machine.hardware.bf16 * self.clock.machine.constants.attention), 0)
        gated = self.plain.moving(4 * tokens * inner * BF16, 2)
        return [
            self.norm("mamba"),
            linear("mamba", "first", tokens, 2 * inner + shared + heads, self.workload.hidden),
            Kernel("mamba", "conv", convolved, convolved.times(2)),
            Kernel("mamba", "scan", scanned + computed, (scanned + computed).times(2.5)),
            Kernel("mamba", "gate", gated, gated.times(2)),
            linear("mamba", "second", tokens, self.workload.hidden, inner),
        ]

    def _output(self) -> list[Kernel]:
        """Logits in bf16 whatever the precision; cross entropy reads them some times, in fp32 once."""
        vocabulary = self.workload.vocabulary / self.layout.tp
        loss = self.plain.moving(self.tokens * vocabulary * (2 + 2), 3)
        return [
            self.norm("output"),
            self.plain.linear("output", "logits", self.tokens, vocabulary, self.workload.hidden),
            Kernel("output", "loss", loss, loss),
        ]
