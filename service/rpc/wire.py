"""The messages on the wire and the services they make up: what fronts, handlers and the client share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import grpc
from calserve import open_inference
from calserve.v1 import (
    calibrator_service_pb2,
    feedback_service_pb2,
    monitor_service_pb2,
    online_service_pb2,
    resources_pb2,
    shadow_service_pb2,
)
from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

inference = open_inference.messages
INFERENCE_SERVICE = open_inference.SERVICE
HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"]
CALIBRATOR_SERVICE = calibrator_service_pb2.DESCRIPTOR.services_by_name["CalibratorService"]
FEEDBACK_SERVICE = feedback_service_pb2.DESCRIPTOR.services_by_name["FeedbackService"]
MONITOR_SERVICE = monitor_service_pb2.DESCRIPTOR.services_by_name["MonitorService"]
ONLINE_SERVICE = online_service_pb2.DESCRIPTOR.services_by_name["OnlineService"]
SHADOW_SERVICE = shadow_service_pb2.DESCRIPTOR.services_by_name["ShadowService"]


def method_path(method: MethodDescriptor) -> str:
    """The HTTP/2 path of a method: /package.Service/Method."""
    return f"/{method.containing_service.full_name}/{method.name}"


class Stub:
    """A client's view of a service: one callable a method, from its descriptor; `metadata` goes with every call."""

    def __init__(self, channel: grpc.Channel, service: ServiceDescriptor, metadata: Sequence[Any] = ()) -> None:
        for method in service.methods:
            call = _callable(channel, method)
            setattr(self, method.name, partial(call, metadata=metadata) if metadata else call)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"the service has no method {name}")


def file_descriptors() -> Iterator[descriptor_pb2.FileDescriptorProto]:
    """Every file of the project's protos with what it imports, each after its imports."""
    yield from inference.files.file
    seen: set[str] = set()

    def with_imports(file: FileDescriptor) -> Iterator[descriptor_pb2.FileDescriptorProto]:
        for imported in file.dependencies:
            yield from with_imports(imported)
        if file.name not in seen:
            seen.add(file.name)
            yield descriptor_pb2.FileDescriptorProto.FromString(file.serialized_pb)

    own = (
        resources_pb2,
        calibrator_service_pb2,
        feedback_service_pb2,
        monitor_service_pb2,
        online_service_pb2,
        shadow_service_pb2,
    )
    for module in own:
        yield from with_imports(module.DESCRIPTOR)


def _callable(channel: grpc.Channel, method: MethodDescriptor) -> Any:
    arity = {
        (False, False): channel.unary_unary,
        (True, False): channel.stream_unary,
        (False, True): channel.unary_stream,
        (True, True): channel.stream_stream,
    }[method.client_streaming, method.server_streaming]
    answer = message_factory.GetMessageClass(method.output_type)
    return arity(method_path(method), request_serializer=_serialize, response_deserializer=answer.FromString)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()
