"""The wire: names and numbers as everybody else has them, and stubs that are not stale."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from calserve import open_inference
from google.protobuf.descriptor import Descriptor

ROOT = Path(__file__).parent.parent
MESSAGES = sorted(
    message for file in open_inference.messages.files.file for message in (m.name for m in file.message_type)
)


def fields(message: Descriptor) -> dict[str, tuple[int, int, str]]:
    """Every field, of nested messages too: name -> (number, wire type, name of the message type)."""
    own = {
        f"{message.name}.{field.name}": (
            field.number,
            field.type,
            field.message_type.full_name if field.message_type else "",
        )
        for field in message.fields
    }
    for nested in message.nested_types:
        own |= fields(nested)
    return own


@pytest.mark.parametrize("name", MESSAGES)
def test_our_messages_have_the_names_and_numbers_of_tritonclient(name: str) -> None:
    from tritonclient.grpc import model_config_pb2, service_pb2

    theirs = getattr(service_pb2, name, None) or getattr(model_config_pb2, name)
    ours = open_inference.messages.pool.FindMessageTypeByName(f"inference.{name}")
    assert fields(ours).items() <= fields(theirs.DESCRIPTOR).items()


def test_our_methods_have_the_types_of_tritonclient() -> None:
    from tritonclient.grpc import service_pb2

    theirs = {m.name: m for m in service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods}
    for method in open_inference.SERVICE.methods:
        assert method.input_type.full_name == theirs[method.name].input_type.full_name
        assert method.output_type.full_name == theirs[method.name].output_type.full_name


def test_a_process_may_import_tritonclient_and_our_client_in_either_order() -> None:
    import subprocess
    import sys

    both = ("import tritonclient.grpc", "import service.client")
    for first, second in (both, both[::-1]):
        code = f"{first}; {second}; from calserve.open_inference import messages as m; print(m.ModelInferRequest(id='7').id)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "7\n"


def test_the_generated_stubs_are_those_of_the_protos_today(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("build_protos", ROOT / "protos" / "build.py")
    assert spec and spec.loader
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    build.generate(tmp_path)
    generated = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert generated
    for path in generated:
        assert (ROOT / "protos" / path).read_bytes() == (tmp_path / path).read_bytes(), (
            f"{path} is stale: install again"
        )
