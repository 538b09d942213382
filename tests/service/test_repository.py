"""Triton's layout on disk: config.pbtxt, calserve.toml, versions, and what is said of folders that cannot be served."""

from __future__ import annotations

from pathlib import Path

import pytest

from service import errors
from service.inference.repository import Repository
from service.inference.session import Device
from tests.service import models

CPU = Device.choose("cpu", 1)


def load(root: Path) -> Repository:
    repository = Repository(root, CPU)
    repository.load_all()
    repository.loaded = True
    return repository


def failure(root: Path, name: str = "mlp") -> str:
    return load(root).failures[name]


def test_a_triton_repository_works_as_it_is(tmp_path: Path) -> None:
    config = """
        name: "mlp" platform: "onnxruntime_onnx" max_batch_size: 8
        input [{ name: "x" data_type: TYPE_FP32 dims: [6] }]
        output [{ name: "scores" data_type: TYPE_FP32 dims: [4] label_filename: "labels.txt" }]
        instance_group [{ count: 2 kind: KIND_CPU }] dynamic_batching { max_queue_delay_microseconds: 100 }
    """
    models.write(tmp_path, "mlp", models.classifier(), config_pbtxt=config, labels_txt="a\nb\nc\nd\n")
    model = load(tmp_path).get("mlp")
    assert model.max_batch_size == 8
    assert model.class_names == ("a", "b", "c", "d")
    assert model.n_classes == 4


@pytest.mark.parametrize(
    ("policy", "versions"),
    [
        ("", ["11"]),
        ("version_policy { latest { num_versions: 2 } }", ["2", "11"]),
        ("version_policy { all {} }", ["1", "2", "11"]),
        ("version_policy { specific { versions: [2] } }", ["2"]),
    ],
)
def test_the_version_policy_chooses_by_number(tmp_path: Path, policy: str, versions: list[str]) -> None:
    for version in (1, 2, 11):
        models.write(tmp_path, "mlp", models.classifier(seed=version), version=version)
    (tmp_path / "mlp" / "config.pbtxt").write_text(policy)
    (tmp_path / "mlp" / "notes").mkdir()
    repository = load(tmp_path)
    assert repository.versions("mlp") == versions
    assert repository.get("mlp").version == versions[-1]
    assert repository.get("mlp", versions[0]).version == versions[0]


def test_calserve_toml_names_the_tensors(tmp_path: Path) -> None:
    models.write(tmp_path, "mlp", models.classifier(), calserve_toml='logits = "z"\nfeatures = "h0"\n')
    inspection = load(tmp_path).get("mlp").inspection
    assert inspection is not None
    assert (inspection.logits.tensor, inspection.features) == ("z", "h0")


REFUSED = {
    "no version": ({}, r"no version folder that its policy selects \(found none\)"),
    "other name": ({"config_pbtxt": 'name: "cnn"'}, r"config.pbtxt of model 'mlp' names another model, 'cnn'"),
    "bad text": ({"config_pbtxt": "input ["}, r"config.pbtxt of model 'mlp'"),
    "unknown input": ({"config_pbtxt": 'input [{ name: "y" }]'}, r"no input 'y'; it has: x"),
    "wrong type": ({"config_pbtxt": 'input [{ name: "x" data_type: TYPE_INT64 dims: [-1, 6] }]'}, r"input 'x' is FP32, not INT64"),
    "wrong dims": ({"config_pbtxt": 'input [{ name: "x" data_type: TYPE_FP32 dims: [6] }]'}, r"has shape \[-1, 6\], the declared dims are \[6\]"),
    "no such file": ({"config_pbtxt": 'default_model_filename: "net.onnx"'}, r"has no file 'net.onnx'"),
    "file elsewhere": ({"config_pbtxt": 'default_model_filename: "../../x"'}, r"has no file '\.\./\.\./x'"),
    "unknown key": ({"calserve_toml": 'lgits = "z"'}, r"'lgits' = 'z'; known keys.*logits"),
    "not a string": ({"calserve_toml": "logits = 3"}, r"'logits' = 3; known keys"),
    "unknown tensor": ({"calserve_toml": 'logits = "zz"'}, r"calserve.toml of model 'mlp': .*zz"),
    "labels elsewhere": ({"calserve_toml": 'labels = "../labels.txt"'}, r"no labels file '\.\./labels.txt'"),
    "labels of another length": ({"calserve_toml": 'labels = "l.txt"', "l_txt": "a\nb\n"}, r"has 4 classes, its labels file 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_cannot_be_served_is_named_with_the_reason(tmp_path: Path, case: str) -> None:
    files, reason = REFUSED[case]
    folder = models.write(tmp_path, "mlp", models.classifier(), **files)
    if case == "no version":
        folder.rename(folder.with_name("one"))
    repository = load(tmp_path)
    with pytest.raises(errors.NotReady, match=reason):
        repository.get("mlp")
    assert str(tmp_path) not in repository.failures["mlp"]


@pytest.mark.parametrize("text", [b"\xff\n" * 4, b"a\nb\nc\n\xff"])
def test_labels_that_are_no_text_are_the_failure_of_one_model_and_not_of_the_server(
    tmp_path: Path, text: bytes
) -> None:
    models.write(tmp_path, "mlp", models.classifier(), calserve_toml='labels = "l.txt"')
    models.write(tmp_path, "other", models.classifier())
    (tmp_path / "mlp" / "l.txt").write_bytes(text)
    assert "is not UTF-8 text" in failure(tmp_path)
    assert load(tmp_path).get("other").is_classifier


def test_a_file_that_cannot_be_read_is_the_failure_of_one_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.write(tmp_path, "mlp", models.classifier())
    models.write(tmp_path, "other", models.classifier())
    read_bytes = Path.read_bytes

    def forbidden(path: Path) -> bytes:
        if "mlp" in path.parts:
            raise PermissionError(13, "no", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    repository = load(tmp_path)
    assert repository.failures == {"mlp": "the files of model 'mlp' cannot be read: Permission denied"}
    assert repository.get("other").is_classifier


def test_a_classifier_that_no_calibrator_can_join_is_served_as_it_is(tmp_path: Path) -> None:
    """Its operator set is older than the calibrators' nodes need."""
    proto = models.classifier()
    proto.opset_import[0].version = 8
    models.write(tmp_path, "mlp", proto)
    model = load(tmp_path).get("mlp")
    assert not model.is_classifier
    assert [spec.name for spec in model.outputs] == ["scores"]


def test_external_data_is_refused(tmp_path: Path) -> None:
    """A model must not read files that are not itself: its weights are pointed at /etc/hostname."""
    proto = models.classifier()
    weight = proto.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = 1
    weight.external_data.add(key="location", value="/etc/hostname")
    models.write(tmp_path, "mlp", proto)
    assert "cannot load the model" in failure(tmp_path)
    assert "/etc" not in failure(tmp_path)


def test_a_missing_repository_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(errors.Refused, match="not a directory"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_is_refused_where_there_is_none(device: str) -> None:
    with pytest.raises(errors.Refused, match="no usable CUDA device"):
        Device.choose(device, 1)


@pytest.mark.parametrize("device", ["gpu", "cpu:1", "cuda:x", ""])
def test_a_device_that_does_not_exist_is_refused(device: str) -> None:
    with pytest.raises(errors.Refused, match="device must be auto, cpu, cuda"):
        Device.choose(device, 1)


def test_auto_takes_the_cpu_where_there_is_no_gpu() -> None:
    assert Device.choose("auto", 1).provider == "CPUExecutionProvider"
