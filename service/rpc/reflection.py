"""Server reflection, v1 and v1alpha (the messages are the same bytes): what grpcurl and its like ask first."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from service.rpc.methods import Call, Method, methods_of
from service.rpc.wire import file_descriptors

_SERVICE = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
_NOT_FOUND, _UNIMPLEMENTED = 5, 12


class Reflection:
    """Answers from a pool of its own, which holds the files of every service this server speaks."""

    SERVICES = ("grpc.reflection.v1.ServerReflection", _SERVICE.full_name)

    def __init__(self, services: Iterable[str]) -> None:
        self._services = sorted(services)
        self._pool = descriptor_pool.DescriptorPool()
        for module in (health_pb2, reflection_pb2):
            self._pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
        for file in (*file_descriptors(), _reflection_v1()):
            self._pool.AddSerializedFile(file.SerializeToString())

    def methods(self) -> list[Method]:
        return [method for name in self.SERVICES for method in methods_of(_SERVICE, self, name=name)]

    async def server_reflection_info(
        self, requests: AsyncIterator[reflection_pb2.ServerReflectionRequest], call: Call
    ) -> AsyncIterator[reflection_pb2.ServerReflectionResponse]:
        async for request in requests:
            response = reflection_pb2.ServerReflectionResponse(valid_host=request.host, original_request=request)
            self._answer(request, response)
            yield response

    def _answer(
        self, request: reflection_pb2.ServerReflectionRequest, response: reflection_pb2.ServerReflectionResponse
    ) -> None:
        asked = request.WhichOneof("message_request")
        try:
            match asked:
                case "list_services":
                    for name in self._services:
                        response.list_services_response.service.add(name=name)
                case "file_by_filename":
                    self._add_file(response, self._pool.FindFileByName(request.file_by_filename))
                case "file_containing_symbol":
                    self._add_file(response, self._pool.FindFileContainingSymbol(request.file_containing_symbol))
                case _:  # proto2 extensions: there are none
                    _refuse(response, _UNIMPLEMENTED, f"{asked} is not supported")
        except KeyError:
            _refuse(response, _NOT_FOUND, "no such file or symbol")

    def _add_file(self, response: reflection_pb2.ServerReflectionResponse, file: FileDescriptor) -> None:
        """The file and everything it imports."""
        waiting, seen = [file], set()
        while waiting:
            current = waiting.pop()
            if current.name not in seen:
                seen.add(current.name)
                response.file_descriptor_response.file_descriptor_proto.append(current.serialized_pb)
                waiting.extend(current.dependencies)


def _reflection_v1() -> descriptor_pb2.FileDescriptorProto:
    """The file of grpc.reflection.v1, which grpcio-reflection lacks: v1alpha under its later name."""
    file = descriptor_pb2.FileDescriptorProto.FromString(reflection_pb2.DESCRIPTOR.serialized_pb)
    text = text_format.MessageToString(file).replace("reflection.v1alpha", "reflection.v1")
    return text_format.Parse(text.replace("reflection/v1alpha", "reflection/v1"), descriptor_pb2.FileDescriptorProto())


def _refuse(response: reflection_pb2.ServerReflectionResponse, code: int, message: str) -> None:
    response.error_response.error_code = code
    response.error_response.error_message = message
