"""The report of a model on a server: which revisions, rows and names it is made of."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from calibrators.metrics import log_loss
from service import errors
from service.client import Client
from service.report import html
from tests.service import models
from tests.service.conftest import RunningServer, settings_for

X, LOGITS, LABELS = models.labelled_rows(800, seed=3)
FIT, TEST = slice(0, 500), slice(500, 800)


def words(page: str) -> str:
    """The text of a page, without its scripts and markup."""
    without_scripts = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", without_scripts)).split())


def test_the_report_judges_every_revision_and_shows_what_auto_compared(client: Client) -> None:
    first = client.fit("mlp", "auto", logits=LOGITS[FIT], labels=LABELS[FIT], candidates=["platt"])
    second = client.fit("mlp", "temperature", logits=LOGITS[FIT], labels=LABELS[FIT])
    client.activate("mlp", second.revision)
    page = html(client, "mlp", labels=LABELS[TEST], inputs={"x": X[TEST]})
    text = words(page)
    assert "Fitted on 500 labelled rows, judged on 300 others." in text
    assert f"{second.revision} serving" in text
    for revision in (first, second):
        after = client.calibrator("mlp", revision.revision).predict_proba(client.logits("mlp", X[TEST]))
        assert f"{log_loss(after, LABELS[TEST]):.4f}" in text
    assert f"What auto compared for {first.revision}" in text
    for candidate in first.ranking:
        assert f"{candidate.kind} {candidate.scores['log_loss']}" in text


def test_without_auto_there_is_no_ranking_and_classes_of_no_name_have_their_number(client: Client) -> None:
    client.fit("mlp", "temperature", logits=LOGITS[FIT], labels=LABELS[FIT])
    text = words(html(client, "mlp", labels=LABELS[TEST], logits=LOGITS[TEST]))
    assert "What auto compared" not in text
    assert "class 3" in text
    assert "No calibrator is serving." in text


def test_a_class_is_called_by_its_name_which_is_never_markup(tmp_path: Path) -> None:
    names = "<script>\nbee\ncat\ndog\n"
    models.write(tmp_path / "m", "mlp", models.classifier(), labels_txt=names, calserve_toml='labels = "labels.txt"\n')
    server = RunningServer(settings_for(tmp_path / "m"))
    try:
        with Client(server.address, show_progress=False) as client:
            client.fit("mlp", "temperature", logits=LOGITS[FIT], labels=LABELS[FIT])
            page = html(client, "mlp", labels=LABELS[TEST], logits=LOGITS[TEST])
    finally:
        server.stop()
    assert all(f"<h3>{name}</h3>" in page for name in ("&lt;script&gt;", "bee", "cat", "dog"))


def test_rows_of_one_class_have_no_best_temperature_and_still_a_report(client: Client) -> None:
    client.fit("mlp", "temperature", logits=LOGITS[FIT], labels=LABELS[FIT])
    text = words(html(client, "mlp", labels=np.zeros(300, dtype=int), logits=LOGITS[TEST]))
    assert "Log loss over temperature" not in text
    assert "judged on 300 others" in text


@pytest.mark.parametrize("randomised", [False, True])
def test_the_sets_of_the_revision_that_serves_are_judged(client: Client, randomised: bool) -> None:
    params = {"score": "aps", "randomised": randomised, "confidence_level": 0.85}
    revision = client.fit("mlp", "split_conformal", logits=LOGITS[FIT], labels=LABELS[FIT], **params)
    heading = "Sets of answers that hold the right one"
    assert heading not in words(html(client, "mlp", labels=LABELS[TEST], logits=LOGITS[TEST]))
    client.activate("mlp", revision.revision)
    text = words(html(client, "mlp", labels=LABELS[TEST], logits=LOGITS[TEST]))
    assert heading in text
    assert "asked for 85 %, the label is held by" in text
    assert revision.held_out is not None
    held = revision.held_out.after["set_coverage"]
    assert 0.7 < held.low < held.value < held.high < 1
    assert 1 < revision.held_out.after["mean_set_size"].value < 4


def test_a_model_without_revisions_and_rows_of_no_use_are_refused(client: Client) -> None:
    with pytest.raises(errors.NotFound, match="no revisions to report on"):
        html(client, "mlp", labels=LABELS, logits=LOGITS)
    with pytest.raises(errors.InvalidRequest, match="either logits or inputs"):
        html(client, "mlp", labels=LABELS)
    with pytest.raises(errors.InvalidRequest, match="y must"):
        html(client, "mlp", labels=LABELS[:3], logits=LOGITS)
