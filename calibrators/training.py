"""What the kinds that train a small network share: distinct rows, layers, and gradient descent that does no harm.

torch is imported by a fit alone. A network's first layers start as He, Zhang, Ren, Sun, "Delving Deep into Rectifiers",
ICCV 2015, start them; Adam (Kingma, Ba, ICLR 2015) takes all rows at once, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from calibrators.numerics import Array

MIN_ROWS, MAX_ROWS, MAX_LOGITS = 100, 20_000, 4_000_000
LEARNING_RATE, MAX_EPOCHS, PATIENCE = 0.005, 1000, 50


def import_torch(kind: str) -> Any:
    """torch, or an ImportError that names the extra."""
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"{kind} trains with torch: pip install 'calserve[torch]'") from error
    return torch


def distinct(rows: Array, weight: Array) -> tuple[Array, Array]:
    """Where each distinct row of (n_samples, n_columns) first stands, in the order of their bytes; sums of weights."""
    rows = rows + 0.0  # makes -0.0 into 0.0, which has other bytes
    keys = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()
    _, first, index = np.unique(keys, return_index=True, return_inverse=True)
    return first, np.bincount(index, weights=weight)


def drawn(n_samples: int, n_numbers: int, rng: np.random.Generator) -> Array:
    """Rows that train the network, in random order: all, or MAX_ROWS, or fewer where a row holds many numbers."""
    return rng.permutation(n_samples)[: min(MAX_ROWS, max(MIN_ROWS, MAX_LOGITS // n_numbers))]


def hidden_layer(inputs: int, outputs: int, rng: np.random.Generator) -> list[Array]:
    """Weights and biases with which a ReLU layer starts."""
    return [rng.normal(scale=np.sqrt(2 / inputs), size=(inputs, outputs)), np.zeros(outputs)]


def affine(x: Array, weight: Array, bias: Array) -> Array:
    """x W + b, summed in one order: a matrix product's rounding depends on how many rows stand beside a row."""
    total = x[:, :1] * weight[0]
    for i in range(1, len(weight)):
        total += x[:, i : i + 1] * weight[i]
    result: Array = total + bias
    return result


def descend(
    torch: Any, layers: list[Array], training_loss: Callable[[list[Any]], Any], held_loss: Callable[[list[Any]], Any]
) -> tuple[list[Array], float]:
    """The layers of the epoch with the least held-out loss, the start among them, and that loss's fall."""
    current = [torch.tensor(layer, requires_grad=True) for layer in layers]
    optimiser = torch.optim.Adam(current, lr=LEARNING_RATE)
    with torch.no_grad():
        first = least = float(held_loss(current))
    best_epoch = 0
    for epoch in range(1, MAX_EPOCHS + 1):
        optimiser.zero_grad()
        training_loss(current).backward()
        optimiser.step()
        with torch.no_grad():
            value = float(held_loss(current))
        if value < least:
            least, best_epoch = value, epoch
            layers = [layer.detach().numpy().copy() for layer in current]
        elif epoch - best_epoch >= PATIENCE:
            break
    return layers, first - least
