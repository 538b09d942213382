"""The command line: `calserve --help`. Commands only; what they do is elsewhere."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service import __version__
from service.errors import CalserveError, InvalidRequest, Refused
from service.settings import HELP, Settings
from service.store.files import write_whole

DEFAULT_ADDRESS = "127.0.0.1:8001"
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exit code 2 for what the user can mend, with one line that says what."""
    parsed = _parser().parse_args(arguments)
    try:
        parsed.command(parsed)
    except CalserveError as error:
        sys.exit(_fail(error.message))
    except BrokenPipeError:
        sys.exit(1)


def serve(arguments: argparse.Namespace) -> None:
    from service.app import serve as run

    settings = Settings.from_sources(vars(arguments), os.environ)
    logging.basicConfig(level=settings.log_level.upper(), format=_LOG_FORMAT, stream=sys.stderr)
    asyncio.run(run(settings))


def inspect(arguments: argparse.Namespace) -> None:
    from service.console import inspection_table
    from service.inference.repository import ModelFolder, folders

    folder_or_file = Path(arguments.model)
    if folder_or_file.is_file():
        import onnx

        from calibrators import inspect_model

        try:
            Console().print(inspection_table(folder_or_file.name, inspect_model(onnx.load(str(folder_or_file)))))
        except ValueError as error:
            raise Refused(str(error)) from error
        return
    root = Path(arguments.model_repository)
    chosen = [path for path in folders(root) if path.name == arguments.model]
    if not chosen:
        raise Refused(f"{arguments.model!r} is neither a file nor a model of {root}")
    folder = ModelFolder.read(chosen[0])
    for version in folder.versions():
        proto, _ = folder.read_model(version)
        try:
            Console().print(inspection_table(f"{folder.name}/{version}", folder.inspect(proto)))
        except ValueError as error:
            raise Refused(str(error)) from error


def models(arguments: argparse.Namespace) -> None:
    from service.console import models_table

    with _client(arguments) as client:
        Console().print(models_table(client.models()))


def kinds(arguments: argparse.Namespace) -> None:
    import calibrators

    del arguments
    table = Table(show_header=False, box=None, padding=(0, 2))
    for kind in calibrators.kinds():
        table.add_row(f"[bold]{kind}[/]", escape((calibrators.create(kind).__doc__ or "").partition("\n")[0]))
    Console().print(table)


def fit(arguments: argparse.Namespace) -> None:
    from service.console import evaluation_table, ranking_table

    data = _load_rows(arguments.data)
    with _client(arguments) as client:
        revision = client.fit(
            arguments.model,
            arguments.kind,
            **data,
            held_out_fraction=arguments.held_out_fraction,
            seed=arguments.seed,
            **dict(map(_parameter, arguments.param)),
        )
        console = Console()
        for note in revision.notes:
            console.print(f"[yellow]note:[/] {escape(note)}")
        if revision.ranking:
            console.print(ranking_table(revision.ranking))
        if revision.held_out:
            console.print(evaluation_table("held out", revision.revision, revision.held_out))
        console.print(f"fitted [bold]{revision.revision}[/] on {revision.row_count} rows")
        if arguments.activate:
            client.activate(arguments.model, revision.revision)
            console.print(f"[bold]{revision.revision}[/] is active")
        else:
            console.print(f"make it serve: calserve activate {arguments.model} {revision.revision}")


def evaluate(arguments: argparse.Namespace) -> None:
    from service.console import evaluation_table

    data = _load_rows(arguments.data)
    data.pop("sample_weight", None)
    with _client(arguments) as client:
        evaluation = client.evaluate(arguments.model, arguments.revision or "", **data, seed=arguments.seed)
        Console().print(evaluation_table(arguments.model, arguments.revision or "the active revision", evaluation))


def revisions(arguments: argparse.Namespace) -> None:
    from service.console import revisions_table

    with _client(arguments) as client:
        Console().print(revisions_table(client.list(arguments.model)))


def activate(arguments: argparse.Namespace) -> None:
    with _client(arguments) as client:
        before = client.activate(arguments.model, arguments.revision)
    Console().print(f"[bold]{arguments.revision}[/] is active, before {before}")


def rollback(arguments: argparse.Namespace) -> None:
    with _client(arguments) as client:
        Console().print(f"[bold]{client.rollback(arguments.model)}[/] is active")


def export(arguments: argparse.Namespace) -> None:
    with _client(arguments) as client:
        model = client.export(arguments.model, arguments.revision or "")
    write_whole(arguments.out, model)
    Console().print(f"{arguments.out}: {len(model)} bytes; its output 'probabilities' is calibrated")


def report(arguments: argparse.Namespace) -> None:
    from service.report import html

    rows = _load_rows(arguments.data)
    rows.pop("sample_weight", None)
    try:
        with _client(arguments) as client:
            page = html(client, arguments.model, **rows)
    except ImportError as error:  # of matplotlib, naming the extra that brings it
        raise Refused(str(error)) from error
    write_whole(arguments.out, page.encode())
    Console().print(f"{arguments.out}: open it in a browser; it needs no network")


def delete(arguments: argparse.Namespace) -> None:
    with _client(arguments) as client:
        client.delete(arguments.model, arguments.revision)
    Console().print(f"{arguments.revision} is deleted")


def _client(arguments: argparse.Namespace) -> Any:
    from service.client import Client

    return Client(arguments.address)


def _load_rows(path: str) -> dict[str, Any]:
    """A calibration set from .npz: `labels`, then `logits` or the model's inputs by name, perhaps `sample_weight`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path}: an .npz file of arrays is wanted ({error})") from error
    if "labels" not in arrays:
        raise InvalidRequest(f"{path} has no array 'labels'; it has: {', '.join(arrays) or 'none'}")
    rows = {name: arrays.pop(name) for name in ("labels", "logits", "sample_weight") if name in arrays}
    return rows if "logits" in rows else {**rows, "inputs": arrays}


def _parameter(text: str) -> tuple[str, Any]:
    """`name=value`, the value as JSON where it is JSON, else as text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise InvalidRequest(f"a parameter is written name=value, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _fail(message: str) -> int:
    Console(stderr=True).print(f"[bold red]calserve:[/] {escape(message)}", highlight=False)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="calserve", description="Honest probabilities for deployed ONNX classifiers.")
    parser.add_argument("--version", action="version", version=f"calserve {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_serving_commands, _fitting_commands, _choosing_commands, _sharing_commands):
        add(commands)
    return parser


def _serving_commands(commands: Any) -> None:
    command = _add(commands, "serve", serve, "serve a model repository over gRPC")
    for setting in fields(Settings):
        required = setting.default is MISSING
        default = "" if required or setting.default is None else f" (default: {setting.default})"
        command.add_argument(
            f"--{setting.name.replace('_', '-')}",
            type=_setting_type(setting.type),
            required=required and f"CALSERVE_{setting.name.upper()}" not in os.environ,
            help=HELP[setting.name] + default,
        )
    text = "say where a model's logits and features are, and why (needs no server)"
    command = _add(commands, "inspect", inspect, text)
    command.add_argument("model", help="a .onnx file, or a model's name in the repository")
    command.add_argument("--model-repository", default=".", help="folder of models (default: this folder)")
    _add_client(commands, "models", models, "list the models that the server serves")


def _fitting_commands(commands: Any) -> None:
    _add(commands, "kinds", kinds, "list the kinds of calibrators (needs no server)")
    command = _add_client(commands, "fit", fit, "fit a calibrator on labelled rows; makes a revision", "model")
    command.add_argument("--kind", required=True, help="see `calserve kinds`; auto: compare them and take the best")
    _add_data(command)
    text = "a parameter of the kind; repeatable"
    command.add_argument("--param", action="append", default=[], metavar="NAME=VALUE", help=text)
    text = "of the rows, for the scores (default: 0.2)"
    command.add_argument("--held-out-fraction", type=float, default=0.2, help=text)
    command.add_argument("--activate", action="store_true", help="make the revision serve at once")
    command = _add_client(commands, "evaluate", evaluate, "score a revision on labelled rows", "model")
    command.add_argument("--revision", help="default: the active one")
    _add_data(command)


def _choosing_commands(commands: Any) -> None:
    _add_client(commands, "revisions", revisions, "list the revisions of a model", "model")
    text = "make a revision serve; 'none': the model's own probabilities"
    _add_client(commands, "activate", activate, text, "model", "revision")
    _add_client(commands, "rollback", rollback, "make serve what served before", "model")
    _add_client(commands, "delete", delete, "forget a revision", "model", "revision")


def _sharing_commands(commands: Any) -> None:
    command = _add_client(commands, "export", export, "write model and calibrator as one plain ONNX file", "model")
    command.add_argument("--revision", help="default: the active one; 'none': the model's own probabilities")
    command.add_argument("--out", type=Path, required=True, help="the file to write")
    command = _add_client(commands, "report", report, "judge all revisions on labelled rows, as an HTML page", "model")
    _add_data(command)
    command.add_argument("--out", type=Path, required=True, help="the file to write")


def _add(commands: Any, name: str, command: Callable[..., None], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=command)
    return parser


def _add_client(
    commands: Any, name: str, command: Callable[..., None], text: str, *positional: str
) -> argparse.ArgumentParser:
    parser = _add(commands, name, command, text)
    for argument in positional:
        parser.add_argument(argument)
    parser.add_argument("--address", default=DEFAULT_ADDRESS, help=f"the server (default: {DEFAULT_ADDRESS})")
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help=".npz with `labels`, and `logits` or the model's inputs by name")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the intervals (default: 0)")


def _setting_type(annotation: Any) -> type:
    return {"int": int, "float": float, "Path": Path, "Path | None": Path}.get(str(annotation), str)
