"""The GPU benchmark runs where there is no GPU: on the CPU when told so, and on one that is made up."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from benchmarks import gpu as benchmark
from service.inference.session import Device, Session
from service.inference.warmup import made_up
from tests.service.gpu import FakeGpu

QUICK = ["--models", "mlp", "--batches", "1,3", "--seconds", "0.01"]


def lines(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """The table's cells."""
    table = [line.strip("│").split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row] for row in table]


def test_on_the_cpu_it_measures_both_ways_through_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--provider", "cpu", *QUICK])
    rows = lines(capsys)
    assert [row[:4] for row in rows] == [
        ["cpu", "mlp", memory, batch] for memory in ("pageable", "staged") for batch in ("1", "3")
    ]
    assert all(float(fused) > 0 and float(unfused) > 0 for _, _, _, _, fused, unfused, *_ in rows)


def test_on_a_gpu_it_measures_every_provider_and_kind_of_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = FakeGpu(monkeypatch)
    benchmark.main(QUICK)
    assert [(row[0], row[2]) for row in lines(capsys)[::2]] == [
        ("cuda", "pageable"),
        ("cuda", "pinned"),
        ("cuda", "pinned, CUDA graph"),
        ("tensorrt", "pageable"),
        ("tensorrt", "pinned"),
    ]
    assert {"1", "2"} <= set(gpu.graph_ids)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(SystemExit, match="no usable device of cuda,tensorrt here"):
        benchmark.main(QUICK)


@pytest.mark.parametrize(
    ("model", "classes"), [(benchmark.mlp, 10), (benchmark.head, 1000), (lambda: benchmark.resnet18(width=2), 10)]
)
def test_its_models_give_logits_that_are_not_all_alike(model: object, classes: int) -> None:
    proto, n_classes = model()  # type: ignore[operator]
    session = Session(proto.SerializeToString(), Device.choose("cpu", 1))
    (logits,) = session.run(["logits"], made_up(session.inputs, 3))
    assert logits.shape == (3, classes)
    assert n_classes == classes
    assert np.isfinite(logits).all()
    assert logits.std() > 0.01
