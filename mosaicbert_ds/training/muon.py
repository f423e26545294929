"""Muon: momentum whose matrix is made orthogonal, for the hidden layers' matrices.

    m <- momentum m + (1 - momentum) g        u = momentum m + (1 - momentum) g        (Nesterov)
    w <- (1 - lr_t / lr_peak x weight_decay) w - lr_t x 0.2 sqrt(max(rows, columns)) x orthogonal(u)

`orthogonal` sets the singular values of u to about 1 by five steps of a Newton-Schulz iteration. The factor
gives the update the root mean square of AdamW's, 0.2, so that both take rates of one size. Sources:
https://kellerjordan.github.io/posts/muon/ and arXiv 2502.16982.

An update needs the whole matrix, ZeRO cuts matrices into parts. Where every rank holds the summed gradients
(ZeRO 0, and 1 in bf16) the update is written over them, and reaches the weights by the way that gradients go.
Momenta are not cut up: every rank holds all of them, and a checkpoint takes the main rank's.

DeepSpeed has a Muon of its own. It stays aside because each start compiles it (27 s on a CPU core, out of a
run of minutes), ZeRO 0 and 1 go different ways in it, each matrix is iterated alone, and stacked ones as one.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

# Of the iteration x <- a x + (b (x x') + c (x x')^2) x, as tuned by Muon's author for five steps.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
_RMS = 0.2
# Matrices that are several in one: queries, keys and values; gate and value.
_STACKED = {"Wqkv.weight": 3, "gated_layers.weight": 2}


def is_muons(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon updates the parameter: a matrix of a hidden layer. Embeddings, the tied decoder, the head
    and all vectors are AdamW's."""
    return ".layer." in name and parameter.ndim == 2


class Muon:
    """Momenta of the matrices `gradients`, which are fp32 (rows, columns) by parameter, summed over ranks.

    `momenta`: likewise. `names`: of the parameters.
    """

    def __init__(
        self, momentum: float, names: dict[nn.Parameter, str], gradients: dict[nn.Parameter, Tensor]
    ):
        self._momentum, self._gradients = momentum, gradients
        self.momenta = {parameter: torch.zeros_like(gradient) for parameter, gradient in gradients.items()}
        # Matrices of one shape are one batch: a dozen launches for a dozen layers.
        self._alike: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for parameter, name in names.items():
            stacked = _STACKED.get(".".join(name.split(".")[-2:]), 1)
            rows, columns = gradients[parameter].shape
            self._alike[(stacked, rows // stacked, columns)].append(parameter)

    @torch.no_grad()
    def gradients_to_updates(self) -> None:
        """Take this step's gradients into the momenta, and write the updates over them."""
        for (stacked, rows, columns), parameters in self._alike.items():
            gradients = [self._gradients[parameter] for parameter in parameters]
            momenta = [self.momenta[parameter] for parameter in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - self._momentum)
            torch._foreach_lerp_(gradients, momenta, self._momentum)
            updates = orthogonal(torch.stack(gradients).view(-1, rows, columns))
            updates = updates * (_RMS * math.sqrt(max(rows, columns)))
            torch._foreach_copy_(gradients, list(updates.reshape(-1, stacked * rows, columns).unbind()))


def orthogonal(matrices: Tensor) -> Tensor:
    """The matrices nearest to fp32 `matrices` (n, rows, columns) with singular values of about 1.

    In bf16 on a GPU, in fp32 on a CPU. A matrix of zeros stays one.
    """
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-30)  # no singular value above 1
    x = x.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return (x.mT if is_tall else x).float()
