"""Package `inference` (the Open Inference Protocol) as message classes, in a descriptor pool of its own.

tritonclient registers the same message names in the default pool of the process; in a private pool both live side by
side. `messages.ModelInferRequest` is a class like any generated one.
"""

from importlib.resources import files
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import ServiceDescriptor


class Messages:
    """The message classes of one private pool, by their names in package `inference`."""

    def __init__(self, serialized: bytes) -> None:
        self.pool = descriptor_pool.DescriptorPool()
        self.files = descriptor_pb2.FileDescriptorSet.FromString(serialized)
        for file in self.files.file:
            self.pool.AddSerializedFile(file.SerializeToString())

    def __getattr__(self, name: str) -> Any:
        try:
            message = message_factory.GetMessageClass(self.pool.FindMessageTypeByName(f"inference.{name}"))
        except KeyError:
            raise AttributeError(f"package inference has no message {name}") from None
        setattr(self, name, message)
        return message


messages = Messages(files("calserve").joinpath("inference.binpb").read_bytes())
SERVICE: ServiceDescriptor = messages.pool.FindServiceByName("inference.GRPCInferenceService")
