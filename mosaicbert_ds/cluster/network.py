"""Seconds on the wire: collectives over nodes of GPUs, and what DeepSpeed sends in a step at each ZeRO stage.

A ring moves (p - 1) / p of the data through every link in p - 1 hops; an all-reduce is two such passes, a
reduce-scatter and an all-gather (Patarasuk and Yuan, 2009). Its latency grows with p. NCCL's double binary
tree moves all of the data twice, in 2 log2(nodes) hops between nodes (Sanders, Speck and Traeff, 2009), and
NCCL takes whichever is faster. Rings of one node's GPUs leave it through different NICs, so a node's NICs
count together.
"""

import math
from dataclasses import dataclass
from typing import Literal

# Share of the backward pass's compute that a DeepSpeed overlap hides communication behind: buckets are sent
# while the layers below are still computing, and the last one has nothing left to hide behind.
_HIDEABLE = 2 / 3  # of forward + backward, the backward is two thirds


@dataclass(frozen=True, kw_only=True)
class Link:
    """What one GPU (inside a node) or one node (between nodes) sends, and how long the first byte takes."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, kw_only=True)
class Network:
    """`nodes` x `gpus_per_node` ranks. tree: whether the library has tree all-reduce (NCCL has, gloo not)."""

    nodes: int
    gpus_per_node: int
    inside: Link
    between: Link
    tree: bool = True

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    def ring_pass_s(self, num_bytes: float) -> float:
        """A reduce-scatter or an all-gather of `num_bytes` in total."""
        ranks = self.world_size
        if ranks == 1:
            return 0.0
        hops_between = self.nodes if self.nodes > 1 else 0
        # Every edge of the ring is passed by a piece in turn; one edge fewer than there are.
        hops_s = hops_between * self.between.latency_s + (ranks - hops_between) * self.inside.latency_s
        return (ranks - 1) / ranks * (num_bytes / self._bytes_per_s() + hops_s)

    def all_reduce_s(self, num_bytes: float) -> float:
        ring_s = 2 * self.ring_pass_s(num_bytes)
        if not self.tree or self.nodes == 1:
            return ring_s
        hops_s = math.log2(self.nodes) * self.between.latency_s
        hops_s += (self.gpus_per_node - 1) * self.inside.latency_s
        return min(ring_s, 2 * (num_bytes / self._bytes_per_s() + hops_s))

    def _bytes_per_s(self) -> float:
        """Of the slowest edge: what all rings together carry through it."""
        alone = [self.inside.bytes_per_s] if self.gpus_per_node > 1 else []
        return min(alone + ([self.between.bytes_per_s] if self.nodes > 1 else []))


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One kind of collective in an optimizer step: `times` calls that carry `num_bytes` each."""

    collective: Literal["all-reduce", "reduce-scatter", "all-gather"]
    num_bytes: float
    times: int
    overlaps: bool = False

    def seconds(self, network: Network) -> float:
        one = network.all_reduce_s if self.collective == "all-reduce" else network.ring_pass_s
        return self.times * one(self.num_bytes)


def transfers_of_a_step(
    parameters: int, stage: int, accumulation: int, bf16: bool, bucket: int, overlap: bool
) -> list[Transfer]:
    """What DeepSpeed 0.19 sends in an optimizer step of this package's engine.

    bucket: elements that a gradient bucket holds. Gradients of stages 0 and 1 are all-reduced in fp32 once a
    step, those of stages 2 and 3 in every micro batch; stages 1 and 2 then gather the weights. Stage 2
    all-reduces too: DeepSpeed reduces buckets whose elements belong to several ranks whole.
    """
    half = 2 if bf16 else 4  # bytes of a weight as the model computes with it

    def in_buckets(collective: str, element: int, times: int, overlaps: bool) -> Transfer:
        buckets = math.ceil(parameters / bucket)
        return Transfer(
            collective=collective,  # type: ignore[arg-type]
            num_bytes=element * parameters / buckets,
            times=buckets * times,
            overlaps=overlaps,
        )

    if stage == 0:
        return [in_buckets("all-reduce", 4, 1, False)]
    if stage == 1:
        return [in_buckets("all-reduce", 4, 1, False), in_buckets("all-gather", half, 1, False)]
    if stage == 2:
        return [
            in_buckets("all-reduce", 4, accumulation, overlap),
            in_buckets("all-gather", half, 1, False),
        ]
    return [
        in_buckets("all-gather", half, 2 * accumulation, overlap),  # before forward and before backward
        in_buckets("reduce-scatter", half, accumulation, overlap),
    ]


def exposed_s(transfers: list[Transfer], network: Network, compute_s: float) -> float:
    """Seconds of a step that the GPUs wait for the network, beside `compute_s` of computing."""
    hidden_s = sum(transfer.seconds(network) for transfer in transfers if transfer.overlaps)
    open_s = sum(transfer.seconds(network) for transfer in transfers if not transfer.overlaps)
    return open_s + max(hidden_s - _HIDEABLE * compute_s, 0.0)
