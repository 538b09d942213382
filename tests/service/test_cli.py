"""The command line, as its user types it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from service import cli
from service.errors import Refused
from service.settings import HELP, Settings
from tests.service import models
from tests.service.conftest import RunningServer

X, LOGITS, LABELS = models.labelled_rows(500, seed=1)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    cli.main(arguments)
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_the_main_job_from_fit_to_roll_back(
    server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ("--address", server.address)
    np.savez(tmp_path / "logits.npz", logits=LOGITS, labels=LABELS)
    np.savez(tmp_path / "inputs.npz", x=X, labels=LABELS)
    fitted = run(capsys, "fit", "mlp", "--kind", "temperature", "--data", str(tmp_path / "logits.npz"), *at)
    assert "fitted temperature-1 on 500 rows" in fitted
    assert "log loss" in fitted
    run(capsys, "fit", "mlp", "--kind", "temperature", "--data", str(tmp_path / "inputs.npz"), "--activate", *at)
    assert "temperature-2" in run(capsys, "models", *at)
    listed = run(capsys, "revisions", "mlp", *at)
    assert listed.index("temperature-2") < listed.index("temperature-1")
    assert "active, before temperature-2" in run(capsys, "activate", "mlp", "temperature-1", *at)
    assert "temperature-2 is active" in run(capsys, "rollback", "mlp", *at)
    assert "the model itself" in run(capsys, "evaluate", "mlp", "--data", str(tmp_path / "logits.npz"), *at)
    page = tmp_path / "report.html"
    run(capsys, "report", "mlp", "--data", str(tmp_path / "inputs.npz"), "--out", str(page), *at)
    assert "temperature-2" in page.read_text()
    assert "Plotly.react" in page.read_text()
    exported = tmp_path / "calibrated.onnx"
    run(capsys, "export", "mlp", "--out", str(exported), *at)
    assert {output.name for output in onnx.load(str(exported)).graph.output} >= {"scores", "probabilities"}
    run(capsys, "activate", "mlp", "none", *at)
    run(capsys, "activate", "mlp", "none", *at)
    assert "temperature-1 is deleted" in run(capsys, "delete", "mlp", "temperature-1", *at)


def test_a_report_without_plotly_names_the_extra_that_brings_it(
    server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = ("--address", server.address)
    np.savez(tmp_path / "logits.npz", logits=LOGITS, labels=LABELS)
    run(capsys, "fit", "mlp", "--kind", "temperature", "--data", str(tmp_path / "logits.npz"), *at)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    page = tmp_path / "report.html"
    text = refused(capsys, "report", "mlp", "--data", str(tmp_path / "logits.npz"), "--out", str(page), *at)
    assert "calserve[plots]" in text
    assert not page.exists()


def test_inspect_says_what_was_found_and_why(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_name = run(capsys, "inspect", "mlp", "--model-repository", str(root))
    by_file = run(capsys, "inspect", str(root / "mlp" / "1" / "model.onnx"))
    for text in (by_name, by_file):
        assert "z (logits)" in text
        assert "Softmax" in text
        assert "of 80 products a row" in text
        assert "8,000" in text  # of the hidden layer, for a reference of 1,000 rows


def test_kinds_lists_every_kind_with_its_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    listed = run(capsys, "kinds")
    assert all(kind in listed for kind in ("identity", "temperature", "platt", "isotonic"))


def test_no_server_is_a_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert "calserve:" in refused(capsys, "models", "--address", "127.0.0.1:1")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "an .npz file of arrays is wanted"),
        ({"logits": LOGITS}, "has no array 'labels'"),
        ({"logits": np.array([{}]), "labels": LABELS}, "an .npz file of arrays is wanted"),
    ],
)
def test_a_data_file_that_cannot_be_used_is_refused(
    server: RunningServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: dict[str, np.ndarray] | None,
    text: str,
) -> None:
    if content is not None:
        np.savez(tmp_path / "data.npz", **content)
    data = ("--data", str(tmp_path / "data.npz"), "--address", server.address)
    assert text in refused(capsys, "fit", "mlp", "--kind", "temperature", *data)


def test_parameters_are_json_where_they_are_json_and_text_elsewhere() -> None:
    texts = ["n=3", "a=0.5", "b=true", "method=one_vs_rest", 's="3"']
    assert dict(map(cli._parameter, texts)) == {"n": 3, "a": 0.5, "b": True, "method": "one_vs_rest", "s": "3"}


def test_flags_go_before_the_environment_and_the_environment_before_defaults(tmp_path: Path) -> None:
    environment = {"CALSERVE_PORT": "9", "CALSERVE_DATA_DIR": str(tmp_path), "PATH": "/bin"}
    settings = Settings.from_sources({"model_repository": tmp_path, "port": 10, "device": None}, environment)
    assert (settings.port, settings.device, settings.data_dir) == (10, "auto", tmp_path)


@pytest.mark.parametrize(
    ("flags", "environment", "text"),
    [
        ({}, {"CALSERVE_PROT": "9"}, "unknown setting CALSERVE_PROT"),
        ({}, {"CALSERVE_PORT": "nine"}, "setting port must be a int, got 'nine'"),
        ({"port": 70000}, {}, r"port must be in 0..65535, got 70000"),
        ({"fit_seconds": 0.0}, {}, "fit_seconds must be positive"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(flags: dict[str, object], environment: dict[str, str], text: str) -> None:
    with pytest.raises(Refused, match=text):
        Settings.from_sources({"model_repository": Path("models"), **flags}, environment)


def test_every_setting_has_its_help_text() -> None:
    assert HELP.keys() == Settings.__dataclass_fields__.keys()


def test_the_store_is_beside_the_repository_by_default(tmp_path: Path) -> None:
    assert Settings(tmp_path / "models").store == tmp_path / "models.calserve"


def test_every_command_of_the_readme_exists(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    blocks = "\n".join(readme.split("```")[1::2])
    commands = {line.split()[1] for line in blocks.splitlines() if line.startswith("calserve ")}
    assert {"serve", "inspect", "fit", "revisions", "activate", "rollback"} <= commands
    for command in commands:
        with pytest.raises(SystemExit) as caught:
            cli.main([command, "--help"])
        assert caught.value.code == 0
