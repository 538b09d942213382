"""Which device is taken, how it is used, and what happens when it is gone: decided against a GPU that is made up."""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tritonclient.grpc as triton

from service import errors
from service.cores import threads_per_run, usable_cores
from service.inference import host_memory
from service.inference.device_loss import DeviceLoss, Failure, failure_of
from service.inference.host_memory import HostBuffers
from service.inference.session import Device, Session
from tests.service import models
from tests.service.conftest import RunningServer, settings_for
from tests.service.gpu import CPU, CUDA, LOST, TENSORRT, FakeGpu
from tests.service.test_health import NOT_SERVING, SERVING, check, page

MODEL = models.classifier().SerializeToString()
ROWS = {"x": np.ones((2, models.N_FEATURES), np.float32)}


def scores(session: Session) -> np.ndarray:
    return session.run(["scores"], ROWS)[0]


# what is taken


@pytest.mark.parametrize("wanted", ["auto", "cuda", "cuda:1"])
def test_cuda_is_taken_where_it_works(gpu: FakeGpu, wanted: str) -> None:
    device = Device.choose(wanted, 3)
    assert (device.provider, device.index, device.threads) == (CUDA, int(wanted == "cuda:1"), 3)
    assert device.bound
    assert device.pinned
    assert not device.graphs


def test_auto_takes_the_cpu_where_the_package_lists_a_gpu_that_does_not_work(gpu: FakeGpu) -> None:
    gpu.works = False
    assert Device.choose("auto", 1).provider == CPU


@pytest.mark.parametrize("wanted", ["cuda", "cuda:0", "tensorrt", "tensorrt:2"])
@pytest.mark.parametrize("there", [[CPU], [TENSORRT, CUDA, CPU]], ids=["not built in", "does not work"])
def test_a_gpu_that_is_asked_for_and_absent_is_refused(gpu: FakeGpu, wanted: str, there: list[str]) -> None:
    gpu.providers, gpu.works = there, False
    with pytest.raises(errors.Refused, match=f"device '{wanted}' was asked for"):
        Device.choose(wanted, 1)


def test_tensorrt_is_taken_only_when_asked_for_and_leaves_to_cuda_what_it_cannot_compute(gpu: FakeGpu) -> None:
    device = Device.choose("tensorrt:1", 1, fp16=True, memory_limit_bytes=1 << 30)
    assert device.providers() == [
        (TENSORRT, {"device_id": "1", "trt_max_workspace_size": str(1 << 30), "trt_fp16_enable": "1"}),
        (CUDA, {"device_id": "1"}),
        (CPU, {}),
    ]


def test_the_memory_limit_and_graphs_are_told_to_cuda(gpu: FakeGpu) -> None:
    options = Device.choose("cuda", 1, memory_limit_bytes=1 << 30, cuda_graphs=True).options
    assert options["gpu_mem_limit"] == str(1 << 30)
    assert options["arena_extend_strategy"] == "kSameAsRequested"
    assert options["enable_cuda_graph"] == "1"
    assert "gpu_mem_limit" not in Device.choose("cuda", 1).options


@pytest.mark.parametrize(
    ("device", "extra"),
    [("cpu", "cuda_graphs"), ("tensorrt", "cuda_graphs"), ("cpu", "fp16"), ("cuda", "fp16")],
)
def test_what_only_another_provider_has_is_refused(gpu: FakeGpu, device: str, extra: str) -> None:
    with pytest.raises(errors.Refused, match=f"{extra} was asked for"):
        Device.choose(device, 1, **{extra: True})


def test_the_cpu_is_told_neither_a_limit_nor_to_bind(gpu: FakeGpu) -> None:
    device = Device.choose("cpu", 2, memory_limit_bytes=1 << 30)
    assert device == Device(CPU, {}, 2)
    assert gpu.opened == []


# how a session is opened


def test_a_model_that_the_runtime_opens_on_the_cpu_alone_is_refused_on_a_gpu(gpu: FakeGpu) -> None:
    device = Device.choose("cuda", 1)
    gpu.works = False
    with pytest.raises(errors.Refused, match="only on CPUExecutionProvider"):
        Session(MODEL, device)


def test_a_model_that_cannot_be_captured_is_served_without_graphs_and_that_is_logged(
    gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.refusal = "This session cannot use the graph capture feature as requested by the user"
    session = Session(MODEL, Device.choose("cuda", 1, cuda_graphs=True))
    assert "enable_cuda_graph" not in gpu.last_opened[1]
    assert "CUDA graphs are off" in caplog.text
    session.warm_up(["scores"], ROWS)
    assert gpu.graph_ids == [""]


def test_a_gpu_session_binds_its_runs(gpu: FakeGpu) -> None:
    on_gpu = Session(MODEL, Device.choose("cuda", 1))
    np.testing.assert_array_equal(scores(on_gpu), scores(Session(MODEL, Device.choose("cpu", 1))))
    assert on_gpu.provider == CUDA
    assert len(gpu.graph_ids) == 1


# what a failed run says


@pytest.mark.parametrize(
    "text",
    [
        LOST,
        "CUDA failure 100: no CUDA-capable device is detected ; GPU=0",
        "CUDA failure 46: all CUDA-capable devices are busy or unavailable ; GPU=0",
        "CUDA failure 719: unspecified launch failure ; GPU=0",
        "CUDA failure 999: unknown error ; GPU=0",
        "CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED ; GPU=0",
        "CUBLAS failure 14: the library's text ; GPU=0",
        "CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED ; GPU=0",
        "CUDNN_FE failure 4000: internal ; GPU=0",
        "Non-zero status code returned while running Gemm node. Status Message: CUBLAS_STATUS_NOT_INITIALIZED",
        "TensorRT EP execution context enqueue failed.",
        "the device was lost",
    ],
)
def test_an_error_after_which_no_call_succeeds_is_the_devices(text: str) -> None:
    assert failure_of(text, on_cpu=False) is Failure.DEVICE
    assert failure_of(text, on_cpu=True) is Failure.INPUT


@pytest.mark.parametrize(
    "text",
    [
        "CUDA failure 2: out of memory ; GPU=0",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0",
        "CUDNN failure 4004: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED ; GPU=0",
        "bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 1073741824",
    ],
)
def test_an_error_for_want_of_memory_is_that(text: str) -> None:
    assert failure_of(text, on_cpu=False) is failure_of(text, on_cpu=True) is Failure.MEMORY


@pytest.mark.parametrize(
    "text",
    [
        "CUDA failure 1: invalid argument ; GPU=0",
        "CUDA failure 9: invalid configuration argument ; GPU=0",
        "CUBLAS failure 7: CUBLAS_STATUS_INVALID_VALUE ; GPU=0",
        "CUDNN failure 2000: CUDNN_STATUS_BAD_PARAM ; GPU=0",
        "Got invalid dimensions for input: x",
        "Non-zero status code returned while running Gather node. Name:'lost'",
    ],
)
def test_any_other_error_is_the_inputs(text: str) -> None:
    assert failure_of(text, on_cpu=False) is Failure.INPUT


def test_a_run_that_finds_no_memory_may_be_tried_again_and_loses_no_device(gpu: FakeGpu) -> None:
    device = Device.choose("cuda", 1)
    session = Session(MODEL, device)
    gpu.failure = "CUDA failure 2: out of memory ; GPU=0 ; hostname=host"
    with pytest.raises(errors.Overloaded, match="not enough memory"):
        scores(session)
    gpu.failure = ""
    assert session.provider == CUDA
    assert device.usable
    assert scores(session).shape == (2, models.N_CLASSES)


# what follows a loss


def test_by_default_a_model_on_a_lost_device_is_not_ready_and_the_device_is_left_alone(
    gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    device = Device.choose("cuda", 1)
    session = Session(MODEL, device)
    gpu.failure = LOST
    for _ in range(3):
        with pytest.raises(errors.NotReady, match="device that this model runs on is lost") as caught:
            scores(session)
        assert caught.value.detail_reason == "DEVICE_LOST"
    assert len(gpu.graph_ids) == 1
    assert not device.usable
    (told,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert told.startswith(f"{CUDA} lost its device, its models are not served until a restart: CUDA failure 700")
    assert "/src" not in told


def test_with_policy_cpu_the_run_that_failed_is_made_again_there_and_the_session_stays(gpu: FakeGpu) -> None:
    device = Device.choose("cuda", 2, loss=DeviceLoss("cpu"))
    session = Session(MODEL, device)
    before, on_gpu = scores(session), session._loaded
    gpu.failure = LOST
    for _ in range(3):
        np.testing.assert_array_equal(scores(session), before)
    assert session.provider == CPU
    assert device.usable
    assert device.loss.wrecks == [on_gpu]
    assert [providers[0][0] for providers in gpu.opened] == [CUDA, CUDA, CPU]  # the probe, the session, the fallback
    assert len(gpu.graph_ids) == 2


def test_runs_that_fail_together_rebuild_the_session_once_and_all_are_answered(gpu: FakeGpu) -> None:
    session = Session(MODEL, Device.choose("cuda", 1, loss=DeviceLoss("cpu")))
    expected = scores(session)
    gpu.failure = LOST
    together = threading.Barrier(8)

    def one(_: int) -> np.ndarray:
        together.wait(timeout=10)
        return scores(session)

    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(one, range(8)):
            np.testing.assert_array_equal(got, expected)
    assert sum(providers[0][0] == CPU for providers in gpu.opened) == 1


def test_a_loss_met_by_one_model_is_known_to_all_and_to_those_loaded_later(gpu: FakeGpu) -> None:
    device = Device.choose("cuda", 1, loss=DeviceLoss("cpu"))
    one, other = Session(MODEL, device), Session(MODEL, device)
    gpu.failure = LOST
    scores(one)
    scores(other)
    assert other.provider == Session(MODEL, device).provider == CPU
    assert len(gpu.graph_ids) == 1  # no run of `other` was tried on the device


def test_a_model_cannot_be_loaded_on_a_lost_device_unless_the_cpu_takes_over(gpu: FakeGpu) -> None:
    device = Device.choose("cuda", 1)
    device.loss.report(CUDA, LOST)
    with pytest.raises(errors.NotReady):
        Session(MODEL, device)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(errors.Refused, match="device_lost must be one of not_ready, cpu"):
        DeviceLoss("retry")


# the same, seen from outside


@pytest.fixture
def gpu_root(tmp_path: Path) -> Path:
    models.write(tmp_path / "models", "mlp", models.classifier())
    return tmp_path / "models"


@pytest.fixture
def gpu_server(request: pytest.FixtureRequest, gpu: FakeGpu, gpu_root: Path) -> Iterator[RunningServer]:
    server = RunningServer(replace(settings_for(gpu_root), device="cuda", device_lost=request.param))
    yield server
    server.stop()


def infer(server: RunningServer) -> tuple[np.ndarray, str]:
    tensor = triton.InferInput("x", ROWS["x"].shape, "FP32")
    tensor.set_data_from_numpy(ROWS["x"])
    client = triton.InferenceServerClient(server.address)
    try:
        result = client.infer("mlp", [tensor])
        return result.as_numpy("probabilities"), result.get_response().parameters["provider"].string_param
    finally:
        client.close()


def within_two_seconds(is_so: Callable[[], bool]) -> bool:
    end = time.monotonic() + 2
    while not (so := is_so()) and time.monotonic() < end:
        pass
    return so


@pytest.mark.parametrize("gpu_server", ["cpu"], indirect=True)
def test_with_policy_cpu_no_call_fails_and_answer_and_metrics_name_the_provider(
    gpu: FakeGpu, gpu_server: RunningServer
) -> None:
    before, provider = infer(gpu_server)
    assert provider == CUDA
    assert "calserve_device_lost 0.0" in page(gpu_server, "/metrics")[1]
    gpu.failure = LOST
    after, provider = infer(gpu_server)
    assert provider == CPU
    np.testing.assert_array_equal(before, after)
    metrics = page(gpu_server, "/metrics")[1]
    assert "calserve_device_lost 1.0" in metrics
    assert f'model="mlp",provider="{CPU}"' in metrics
    assert check(gpu_server.address, "ready") == check(gpu_server.address, "mlp") == SERVING


@pytest.mark.parametrize("gpu_server", ["not_ready"], indirect=True)
def test_by_default_calls_are_unavailable_and_health_says_so_within_two_seconds(
    gpu: FakeGpu, gpu_server: RunningServer
) -> None:
    assert check(gpu_server.address, "mlp") == SERVING
    gpu.failure = LOST
    with pytest.raises(triton.InferenceServerException, match="device that this model runs on is lost") as caught:
        infer(gpu_server)
    assert caught.value.status() == "StatusCode.UNAVAILABLE"
    assert within_two_seconds(lambda: check(gpu_server.address, "mlp") == NOT_SERVING)
    assert check(gpu_server.address, "ready") == NOT_SERVING
    assert page(gpu_server, "/health/ready")[0] == 503
    assert "calserve_device_lost 1.0" in page(gpu_server, "/metrics")[1]
    assert check(gpu_server.address, "") == SERVING


def test_a_server_that_is_asked_for_a_gpu_it_has_not_says_so_and_ends(tmp_path: Path) -> None:
    models.write(tmp_path / "models", "mlp", models.classifier())
    command = [sys.executable, "-m", "service", "serve", "--model-repository", str(tmp_path / "models"), "--port", "0"]
    done = subprocess.run([*command, "--device", "cuda"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "no usable CUDA device" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


# what passes through the host


class FakeCudaRuntime:
    """Allocates as the driver would, from the process's own heap."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.devices, self.blocks, self.freed = status, [], {}, 0

    def cudaSetDevice(self, index: int) -> int:  # noqa: N802
        self.devices.append(index)
        return 0

    def cudaHostAlloc(self, pointer: SimpleNamespace, size: ctypes.c_size_t, flags: int) -> int:  # noqa: N802
        assert flags == 1  # pinned for every context of the process
        block = ctypes.create_string_buffer(size.value)
        self.blocks[ctypes.addressof(block)] = block
        pointer._obj.value = ctypes.addressof(block)
        return self.status

    def cudaFreeHost(self, address: ctypes.c_void_p) -> int:  # noqa: N802
        self.blocks.pop(address.value)
        self.freed += 1
        return 0


def test_pinned_buffers_belong_to_their_device_grow_and_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeCudaRuntime()
    monkeypatch.setattr(host_memory, "cuda_runtime", lambda: runtime)
    buffers = HostBuffers(3)
    given = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(buffers.copy("x", given.T), given.T)
    small = buffers.view("x", (1, 2), np.dtype(np.int16)).ctypes.data
    assert small in runtime.blocks
    buffers.view("x", (100,), np.dtype(np.float64))
    assert (runtime.devices, runtime.freed, len(runtime.blocks)) == ([3, 3], 1, 1)
    assert small not in runtime.blocks


@pytest.mark.parametrize("runtime", [None, FakeCudaRuntime(status=2)], ids=["absent", "refuses"])
def test_without_pinned_memory_batches_pass_through_plain_memory(
    monkeypatch: pytest.MonkeyPatch, runtime: FakeCudaRuntime | None
) -> None:
    monkeypatch.setattr(host_memory, "cuda_runtime", lambda: runtime)
    given = np.arange(6)
    np.testing.assert_array_equal(HostBuffers(0).copy("x", given), given)


def test_a_library_that_is_not_there_is_no_cuda_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "CUDA_RUNTIMES", ("libnothing.so.1",))
    assert host_memory.cuda_runtime() is None


# threads


@pytest.mark.parametrize(
    ("cores", "models_", "replicas", "threads"),
    [(16, 1, 1, 16), (16, 3, 1, 5), (16, 3, 2, 2), (2, 4, 1, 1), (8, 0, 1, 8)],
)
def test_models_and_replicas_share_the_cores(cores: int, models_: int, replicas: int, threads: int) -> None:
    assert threads_per_run(cores, models=models_, replicas=replicas) == threads


def test_a_containers_quota_bounds_the_cores(tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    cores = usable_cores(quota)
    assert cores >= 1
    quota.write_text("max 100000\n")
    assert usable_cores(quota) == cores
    quota.write_text("50000 100000\n")
    assert usable_cores(quota) == 1
    quota.write_text(f"{100000 * (cores + 5)} 100000\n")
    assert usable_cores(quota) == cores


def test_device_threads_and_what_they_are_shared_by_are_said_at_the_start(
    gpu: FakeGpu, gpu_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        RunningServer(replace(settings_for(gpu_root), device="cuda", threads=0, replicas=10_000)).stop()
    assert f"models run on {CUDA}" in caplog.text
    assert "1 threads a run" in caplog.text
    assert "1 models, 10000 replicas" in caplog.text
