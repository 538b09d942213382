"""A published number that no kind gives by itself, on recorded logits, by the procedure as published.

Elsewhere: the scores of the CIFAR-10 ResNet-50 before and after temperature scaling in test_metrics.py, its temperature
in test_temperature.py, its ETS weights in test_ensemble_temperature.py, its vector scaling in test_linear_maps.py.
docs/benchmarks.md says which numbers the recorded logits cannot give.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calibrators.metrics import expected_calibration_error
from calibrators.numerics import softmax

Array = NDArray[Any]
CENTRES = (torch.arange(15) + 0.5) / 15


def gap(logits: torch.Tensor) -> torch.Tensor:
    first, second = logits.topk(2, dim=1).values.T
    return (first - second)[:, None]


def soft_binned_error(confidence: torch.Tensor, correct: torch.Tensor) -> torch.Tensor:
    membership = torch.softmax(-((confidence[:, None] - CENTRES) ** 2) / (2 * 0.05**2), dim=1)
    return ((correct - confidence) @ membership).abs().sum() / len(confidence)


def smart(logits: torch.Tensor, y: torch.Tensor, seed: int) -> Any:
    """The fitted T: logits -> (n_samples, 1). The network says T itself and learns from all rows, with nothing held out:
    2000 epochs at most, 200 without a fall at most."""
    torch.manual_seed(seed)
    linear, relu = torch.nn.Linear, torch.nn.ReLU
    network = torch.nn.Sequential(linear(1, 16), relu(), linear(16, 16), relu(), linear(16, 1))
    mean, deviation = gap(logits).mean(), gap(logits).std()
    optimiser = torch.optim.Adam(network.parameters(), lr=0.005)
    least, best, since = np.inf, network.state_dict(), 0

    def temperature(z: torch.Tensor) -> torch.Tensor:
        said: torch.Tensor = torch.nn.functional.softplus(network((gap(z) - mean) / deviation)) + 0.1
        return said

    for _ in range(2000):
        p = torch.softmax(logits / temperature(logits), dim=1)
        confidence, predicted = p.max(dim=1)
        loss = soft_binned_error(confidence, (predicted == y).float())
        since += 1
        if loss.item() < least:
            least, since = loss.item(), 0
            best = {name: value.clone() for name, value in network.state_dict().items()}
        if since > 200:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    network.load_state_dict(best)
    return temperature


def test_smart_as_published_has_its_published_error_on_a_cifar10_resnet50(shared_data: Path) -> None:
    """Guo et al. 2025 say .764 %. Seeds 0 to 4 gave .67 to .85 here, in a few seconds each, with a log loss of .197 to
    .210 (one temperature: .204); kind `adaptive_temperature` holds rows out so as to do no harm and ends at .98 to 1.15.
    """
    fit, held = (np.load(shared_data / "cifar10_resnet50_ce" / f"{part}.npz") for part in ("val", "test"))
    temperature = smart(torch.tensor(fit["logits"]), torch.tensor(fit["labels"]), seed=3)
    with torch.no_grad():
        served = softmax(held["logits"] / temperature(torch.tensor(held["logits"])).numpy())
    assert 0.0060 < expected_calibration_error(served, held["labels"]) < 0.0095
