"""The reference of every ratio: a plain grpc.aio server of one model, as most people would write it.

    python -m benchmarks.serving_reference MODEL.onnx NAME PORT [TLS.key TLS.crt]

It parses with protobuf, runs onnxruntime with one thread, and replies. No batching, no calibration, no checks.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime as ort

from service.rpc.wire import inference

SERVICE = "inference.GRPCInferenceService"
NO_LIMIT = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Reference:
    def __init__(self, path: str, name: str) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._name = name

    async def infer(self, request: Any, _: grpc.aio.ServicerContext) -> Any:
        feeds = {
            tensor.name: np.frombuffer(raw, np.float32).reshape(tensor.shape)
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        response = inference.ModelInferResponse(model_name=self._name, model_version="1", id=request.id)
        for name, array in zip(self._outputs, self._session.run(self._outputs, feeds), strict=True):
            response.outputs.add(name=name, datatype="FP32", shape=array.shape)
            response.raw_output_contents.append(array.tobytes())
        return response

    async def stream(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        async for request in requests:
            yield inference.ModelStreamInferResponse(infer_response=await self.infer(request, context))

    def handler(self) -> grpc.GenericRpcHandler:
        kinds = {
            "request_deserializer": inference.ModelInferRequest.FromString,
            "response_serializer": lambda message: message.SerializeToString(),
        }
        methods = {
            "ModelInfer": grpc.unary_unary_rpc_method_handler(self.infer, **kinds),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self.stream, **kinds),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)


async def serve(path: str, name: str, port: str, *tls: bytes) -> None:
    server = grpc.aio.server(options=NO_LIMIT)
    server.add_generic_rpc_handlers((Reference(path, name).handler(),))
    if tls:
        server.add_secure_port(f"127.0.0.1:{port}", grpc.ssl_server_credentials([tls]))
    else:
        server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:4], *(Path(file).read_bytes() for file in sys.argv[4:])))
