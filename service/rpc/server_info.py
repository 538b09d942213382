"""The Open Inference Protocol's and Triton's questions about the server and its models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from service import __version__
from service.errors import NotReady
from service.inference.repository import Repository
from service.inference.statistics import Statistics
from service.rpc.health import READY, Health
from service.rpc.methods import Call
from service.rpc.wire import inference

PLATFORM = "onnxruntime_onnx"
EXTENSIONS = ("classification", "model_configuration", "statistics", "logging")
"""What every server advertises."""


@dataclass(frozen=True)
class ServerInfo:
    """The part of inference.GRPCInferenceService that tells what there is.

    Attributes
    ----------
    extensions : what is advertised: exactly what works
    """

    repository: Repository
    health: Health
    extensions: Sequence[str]

    async def server_live(self, request: Any, call: Call) -> Any:
        return inference.ServerLiveResponse(live=True)

    async def server_ready(self, request: Any, call: Call) -> Any:
        return inference.ServerReadyResponse(ready=self.health.serving(READY))

    async def model_ready(self, request: Any, call: Call) -> Any:
        try:
            model = self.repository.get(request.name, request.version)
        except NotReady:
            return inference.ModelReadyResponse(ready=False)
        return inference.ModelReadyResponse(ready=self.health.serving(model.name))

    async def server_metadata(self, request: Any, call: Call) -> Any:
        return inference.ServerMetadataResponse(name="calserve", version=__version__, extensions=self.extensions)

    async def model_metadata(self, request: Any, call: Call) -> Any:
        model = self.repository.get(request.name, request.version)
        response = inference.ModelMetadataResponse(
            name=model.name, versions=self.repository.versions(model.name), platform=PLATFORM
        )
        for specs, messages in ((model.inputs, response.inputs), (model.outputs, response.outputs)):
            for spec in specs:
                messages.add(name=spec.name, datatype=spec.datatype, shape=spec.shape)
        return response

    async def model_config(self, request: Any, call: Call) -> Any:
        model = self.repository.get(request.name, request.version)
        response = inference.ModelConfigResponse(config=model.config)
        config = response.config
        config.name, config.platform, config.backend = model.name, PLATFORM, "onnxruntime"
        for specs, field in ((model.inputs, "input"), (model.outputs, "output")):
            config.ClearField(field)
            for spec in specs:
                dims = spec.shape[1:] if model.max_batch_size else spec.shape
                getattr(config, field).add(name=spec.name, data_type=f"TYPE_{_config_word(spec.datatype)}", dims=dims)
        return response

    async def model_statistics(self, request: Any, call: Call) -> Any:
        if request.name:
            self.repository.get(request.name, request.version)
        response = inference.ModelStatisticsResponse()
        for model in self.repository.models():
            if request.name in ("", model.name) and request.version in ("", model.version):
                _fill_statistics(response.model_stats.add(name=model.name, version=model.version), model.statistics)
        return response


def _config_word(datatype: str) -> str:
    return "STRING" if datatype == "BYTES" else datatype


def _fill_statistics(message: Any, statistics: Statistics) -> None:
    message.last_inference = statistics.last_ms
    message.inference_count, message.execution_count = statistics.rows, statistics.executions
    totals = message.inference_stats
    for target, duration in (
        (totals.success, statistics.success),
        (totals.fail, statistics.fail),
        (totals.queue, statistics.queue),
        (totals.compute_infer, statistics.infer),
    ):
        target.count, target.ns = duration.count, duration.ns
    # Joining and dividing rows is part of a run's time. perf_analyzer wants the three counted alike.
    totals.compute_input.count = totals.compute_output.count = totals.compute_infer.count
    for rows, duration in sorted(statistics.batches.items()):
        batch = message.batch_stats.add(batch_size=rows)
        batch.compute_infer.count, batch.compute_infer.ns = duration.count, duration.ns
