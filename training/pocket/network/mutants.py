"""Two wrong rotations of the indexer, and the loss that makes Pocket notice them.

Pocket is there to show a wrong indexer, so it must not find a distant key by luck when the rotation is
wrong. Owns the mutants (a half-split pairing; rotating the last dimensions) and the hinge that pushes what
the attention wants from far away below the average score of a mutated indexer. The right scores are
trained apart, by distillation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from training.pocket.network.parts import rotate

FAR, FIRST_TOKENS, FEWEST_KEYS, SMALLEST_MASS, MARGIN = 64, 8, 300, 0.02, 0.3


def half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs dimension i with i + width / 2 in place of its neighbour."""
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :]], -1)


def last_dimensions(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the last dimensions in place of the first."""
    keep = x.shape[-1] - 2 * cos.shape[-1]
    return torch.cat([x[..., :keep], rotate(x[..., keep:], cos, sin)], -1)


MUTANTS = (half_split, last_dimensions)


def far_target(teacher: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The attention's distribution over distant positions, and the rows on which it counts."""
    places = torch.arange(teacher.shape[-1], device=rows.device)
    far = ((rows.unsqueeze(-1) - places) > FAR) & (places > FIRST_TOKENS)
    target = teacher * far
    mass = target.sum(-1, keepdim=True)
    return target / (mass + 1e-9), (mass.squeeze(-1) > SMALLEST_MASS) & (rows > FEWEST_KEYS)


def notice_loss(scores: Tensor, teacher: Tensor, rows: Tensor) -> Tensor:
    """How far above the average, less a margin, scores [B, S, T] lift what is wanted from far away."""
    target, counts = far_target(teacher, rows)
    earlier = torch.arange(scores.shape[-1], device=rows.device) <= rows.unsqueeze(-1)
    number = earlier.sum(-1)
    kept = scores * earlier
    mean = kept.sum(-1) / number
    variance = (kept.square().sum(-1) / number - mean.square()).clamp(min=1e-6)
    lift = ((target * scores).sum(-1) - mean) / variance.sqrt()
    return (F.relu(lift + MARGIN) * counts).sum() / counts.sum().clamp(min=1)
