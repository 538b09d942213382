"""The command line: `calserve --help`. Commands only; what they do is elsewhere."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service import __version__
from service.errors import CalserveError, Damaged, InvalidRequest, Refused
from service.settings import HELP, Settings
from service.store.files import write_whole
from service.supervisor import Member, supervise

DEFAULT_ADDRESS = "127.0.0.1:8001"
DATA_HELP = ".npz with `labels`, and `logits` or the model's inputs by name"
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exit code 2 for what the user can mend, 3 for a damaged store, with one line that says what."""
    parsed = _parser().parse_args(arguments)
    try:
        parsed.command(parsed)
    except CalserveError as error:
        sys.exit(_fail(error))
    except BrokenPipeError:
        sys.exit(1)


def serve(arguments: argparse.Namespace) -> None:
    settings = Settings.from_sources(vars(arguments), os.environ)
    logging.basicConfig(level=settings.log_level.upper(), format=_LOG_FORMAT, stream=sys.stderr)
    if settings.workers > 1:
        supervise(settings, _worker)
    from service.app import serve as run  # after the settings: a refusal of one should not wait for the imports

    uvloop.run(run(settings))


def _worker(settings: Settings, member: Member, supervisor: Connection) -> None:
    """What each process of `--workers N` does."""
    from service.app import serve as run

    logging.basicConfig(
        level=settings.log_level.upper(), format=f"worker {member.index} {_LOG_FORMAT}", stream=sys.stderr
    )
    os.environ.pop("NOTIFY_SOCKET", None)  # the supervisor speaks for all
    try:
        uvloop.run(run(settings, member, supervisor))
    except CalserveError as error:
        sys.exit(_fail(error))


def inspect(arguments: argparse.Namespace) -> None:
    from service.console import inspection_table, layers_table
    from service.inference.repository import ModelFolder, folders

    folder_or_file = Path(arguments.model)
    if folder_or_file.is_file():
        import onnx

        from calibrators import inspect_model

        try:
            model = onnx.load(str(folder_or_file))
            inspection = inspect_model(model)
            Console().print(inspection_table(folder_or_file.name, inspection), layers_table(model, inspection))
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
            inspection = folder.inspect(proto)
            Console().print(inspection_table(f"{folder.name}/{version}", inspection), layers_table(proto, inspection))
        except ValueError as error:
            raise Refused(str(error)) from error


def passthrough(arguments: argparse.Namespace) -> None:
    from service.passthrough import write

    try:
        labels = arguments.labels.read_bytes() if arguments.labels else b""
    except OSError as error:
        raise InvalidRequest(f"{arguments.labels}: {os.strerror(error.errno or 0)}") from error
    root = arguments.model_repository
    written = write(
        root, arguments.name, arguments.classes, log_probabilities=arguments.log_probabilities, labels=labels
    )
    Console().print(f"{arguments.name} is in {root}; its input is {written!r}, [rows, {arguments.classes}]")


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


def token_add(arguments: argparse.Namespace) -> None:
    from service.rpc.tokens import add

    roles, models = (text.split(",") for text in (arguments.roles, arguments.models))
    token = add(arguments.file, arguments.name, roles, models, arguments.days)
    Console(stderr=True).print(f"shown once, kept nowhere; {arguments.file} holds its hash:")
    sys.stdout.write(f"{token}\n")  # alone on standard output, for a secret store to read


def token_list(arguments: argparse.Namespace) -> None:
    from service.console import tokens_table
    from service.rpc.tokens import read

    Console().print(tokens_table(read(arguments.file)))


def token_revoke(arguments: argparse.Namespace) -> None:
    from service.rpc.tokens import revoke

    revoke(arguments.file, arguments.name)
    Console().print(f"{arguments.name} is revoked: servers refuse it in a few seconds, on open streams too")


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

    if arguments.since:
        with _client(arguments) as client:
            page = client.page(arguments.model, arguments.since)
    else:
        rows = _load_rows(arguments.data)
        rows.pop("sample_weight", None)
        try:
            with _client(arguments) as client:
                page = html(client, arguments.model, **rows)
        except ImportError as error:  # of plotly, naming the extra that brings it
            raise Refused(str(error)) from error
    write_whole(arguments.out, page.encode())
    Console().print(f"{arguments.out}: open it in a browser; it needs no network")


def label(arguments: argparse.Namespace) -> None:
    from service.console import counts_table
    from service.journal_files import send_labels

    with _client(arguments) as client:
        Console().print(counts_table("label", send_labels(client, arguments.model, arguments.csv)))


def online_show(arguments: argparse.Namespace) -> None:
    from service.console import online_tables

    with _client(arguments) as client:
        Console().print(*online_tables(client.online_state(arguments.model)))


def online_rollback(arguments: argparse.Namespace) -> None:
    with _client(arguments) as client:
        state = client.roll_back_online_state(arguments.model, arguments.state)
    Console().print(f"state {state.serving} of [bold]{state.revision}[/] serves; learning goes on from it")


def online_suspend(arguments: argparse.Namespace) -> None:
    with _client(arguments) as client:
        state = client.suspend_learning(arguments.model)
    Console().print(f"[bold]{state.revision}[/] learns nothing; its state {state.serving} serves")


def online_resume(arguments: argparse.Namespace) -> None:
    with _client(arguments) as client:
        state = client.resume_learning(arguments.model, skip_waiting=arguments.skip_waiting)
    Console().print(f"[bold]{state.revision}[/] learns again")


def online_replay(arguments: argparse.Namespace) -> None:
    with _client(arguments) as client:
        replay = client.replay_learning(arguments.model)
    came = (
        f"{replay.learned} labels in {replay.steps} steps{f' after state {replay.since}' if replay.since else ''} came"
    )
    if not replay.equal:
        raise Damaged(f"{came} to another state than the one stored")
    Console().print(f"{came} to the same state, bit for bit")


def shadow_start(arguments: argparse.Namespace) -> None:
    with _client(arguments) as client:
        shadow = client.start_shadow(
            arguments.model,
            arguments.revision,
            policy=arguments.policy,
            level=arguments.level,
            least_labels=arguments.least_labels,
            share=arguments.share,
        )
    how = f"run on a share of {shadow.share:g}" if shadow.share else "computed from the logits that are kept"
    Console().print(f"[bold]{shadow.revision}[/] is in shadow beside {shadow.champion}, {how}")


def shadow_list(arguments: argparse.Namespace) -> None:
    from service.console import shadows_table

    with _client(arguments) as client:
        Console().print(shadows_table(client.shadows(arguments.model)))


def shadow_show(arguments: argparse.Namespace) -> None:
    from service.console import shadow_table

    with _client(arguments) as client:
        Console().print(shadow_table(client.shadow(arguments.model, arguments.revision)))


def shadow_stop(arguments: argparse.Namespace) -> None:
    with _client(arguments) as client:
        shadow = client.stop_shadow(arguments.model, arguments.revision)
    Console().print(f"[bold]{shadow.revision}[/] is compared no longer: {shadow.verdict} after {shadow.labels} labels")


def shadow_promote(arguments: argparse.Namespace) -> None:
    with _client(arguments) as client:
        shadow = client.promote(arguments.model, arguments.revision)
    Console().print(f"[bold]{shadow.revision}[/] is active, before {shadow.champion}")


def monitor_create(arguments: argparse.Namespace) -> None:
    with _client(arguments) as client:
        monitor = client.create_monitor(
            arguments.model,
            arguments.monitor,
            arguments.detector,
            watched=arguments.watched,
            policy=arguments.policy,
            cooldown_rows=arguments.cooldown_rows,
            baseline_rows=arguments.baseline_rows,
            **dict(map(_parameter, arguments.param)),
        )
    Console().print(f"[bold]{monitor.name}[/] watches from now on; it {monitor.false_alarms}")


def monitor_list(arguments: argparse.Namespace) -> None:
    from service.console import monitors_table

    with _client(arguments) as client:
        Console().print(monitors_table(client.monitors(arguments.model)))


def monitor_show(arguments: argparse.Namespace) -> None:
    from service.console import monitors_table

    with _client(arguments) as client:
        monitor = client.monitor(arguments.model, arguments.monitor)
    Console().print(monitors_table([monitor]), f"false alarms: it {monitor.false_alarms}", monitor.params)


def monitor_update(arguments: argparse.Namespace) -> None:
    with _client(arguments) as client:
        fields = {name: getattr(arguments, name) for name in ("policy", "cooldown_rows")}
        params = dict(map(_parameter, arguments.param)) if arguments.param else None
        monitor = client.update_monitor(arguments.model, arguments.monitor, **fields, params=params)
    Console().print(f"[bold]{monitor.name}[/]: policy {monitor.policy}, cool-down {monitor.cooldown_rows} rows")


def monitor_delete(arguments: argparse.Namespace) -> None:
    with _client(arguments) as client:
        client.delete_monitor(arguments.model, arguments.monitor)
    Console().print(f"{arguments.monitor} is deleted")


def alarms_list(arguments: argparse.Namespace) -> None:
    from service.console import alarms_table

    with _client(arguments) as client:
        Console().print(alarms_table(client.alarms(arguments.model or "", most=arguments.most)))


def alarms_acknowledge(arguments: argparse.Namespace) -> None:
    with _client(arguments) as client:
        alarm = client.acknowledge(arguments.model, arguments.alarm, rebaseline=arguments.rebaseline)
    Console().print(f"{alarm.alarm} was seen by {escape(alarm.acknowledged_by)}; {alarm.monitor} begins anew")


def watch(arguments: argparse.Namespace) -> None:
    from service.watching import shown
    from service.watching import watch as live

    with _client(arguments) as client:
        if arguments.once:
            Console().print(shown(client, arguments.model))
        else:
            live(client, arguments.model, Console())


def journal_inspect(arguments: argparse.Namespace) -> None:
    from service.console import journal_table
    from service.store.maintenance import contents

    Console().print(journal_table(contents(arguments.data_dir)))


def journal_export(arguments: argparse.Namespace) -> None:
    from service.journal_files import write_rows
    from service.store.maintenance import export as rows

    Console().print(f"{arguments.out}: {write_rows(rows(arguments.data_dir, arguments.model), arguments.out)} rows")


def journal_prune(arguments: argparse.Namespace) -> None:
    from service.store.journal_tables import Retention
    from service.store.maintenance import forget, forget_damaged

    if arguments.damaged:
        for problem in forget_damaged(arguments.data_dir):
            Console().print(f"forgotten: {escape(problem)}")
    given = forget(arguments.data_dir, Retention(86400 * arguments.days, arguments.bytes))
    Console().print(f"{given} bytes are given back")


def journal_verify(arguments: argparse.Namespace) -> None:
    from service.store.maintenance import journal_problems

    _tell(journal_problems(arguments.data_dir), "the journal")


def doctor(arguments: argparse.Namespace) -> None:
    from service.store.maintenance import store_problems

    _tell(store_problems(arguments.data_dir), "the store")


def _tell(problems: Iterable[str], what: str) -> None:
    """Exit code 3 if there are any."""
    found = list(problems)
    for problem in found:
        Console().print(f"[bold red]damaged:[/] {escape(problem)}", soft_wrap=True)
    if found:
        sys.exit(3)
    Console().print(f"{what} is what was written")


def delete(arguments: argparse.Namespace) -> None:
    with _client(arguments) as client:
        client.delete(arguments.model, arguments.revision)
    Console().print(f"{arguments.revision} is deleted")


def _client(arguments: argparse.Namespace) -> Any:
    from service.client import Client

    return Client(
        arguments.address,
        token=_token(arguments.token_from),
        root_certificates=arguments.root_certificates,
        certificate=arguments.certificate,
        private_key=arguments.private_key,
        tls=arguments.tls,
    )


def _token(file: Path | None) -> str | None:
    """From a file, never from a flag: everybody may list the flags of a process."""
    if file is None:
        return None
    try:
        return file.read_text().strip()
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}") from None


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


def _fail(error: CalserveError) -> int:
    Console(stderr=True).print(f"[bold red]calserve:[/] {escape(error.message)}", highlight=False, soft_wrap=True)
    return 3 if isinstance(error, Damaged) else 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="calserve", description="Honest probabilities for deployed ONNX classifiers.")
    parser.add_argument("--version", action="version", version=f"calserve {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        _serving_commands,
        _token_commands,
        _fitting_commands,
        _choosing_commands,
        _sharing_commands,
        _journal_commands,
        _online_commands,
        _shadow_commands,
        _monitor_commands,
    ):
        add(commands)
    return parser


def _serving_commands(commands: Any) -> None:
    command = _add(commands, "serve", serve, "serve a model repository over gRPC")
    for setting in fields(Settings):
        required = setting.default is MISSING
        default = "" if required or setting.default in (None, False, "") else f" (default: {setting.default})"
        flag = f"--{setting.name.replace('_', '-')}"
        if setting.type == "bool":
            command.add_argument(flag, action="store_true", default=None, help=HELP[setting.name])
            continue
        command.add_argument(
            flag,
            type=_setting_type(setting.type),
            required=required and f"CALSERVE_{setting.name.upper()}" not in os.environ,
            help=HELP[setting.name] + default,
        )
    text = "say where a model's logits and features are, and why (needs no server)"
    command = _add(commands, "inspect", inspect, text)
    command.add_argument("model", help="a .onnx file, or a model's name in the repository")
    command.add_argument("--model-repository", default=".", help="folder of models (default: this folder)")
    text = "put a model without a network in the repository: it calibrates logits made elsewhere (needs no server)"
    command = _add(commands, "passthrough", passthrough, text)
    command.add_argument("name", help="of the new model")
    command.add_argument("--classes", type=int, required=True, help="how many there are")
    text = "its input is log-probabilities, and -inf counts as the logarithm of the smallest number"
    command.add_argument("--log-probabilities", action="store_true", help=text)
    command.add_argument("--labels", type=Path, help="file of the class names, one a line")
    text = "folder of models (default: this folder)"
    command.add_argument("--model-repository", type=Path, default=Path(), help=text)
    _add_client(commands, "models", models, "list the models that the server serves")


def _token_commands(commands: Any) -> None:
    text = "make, list and revoke the bearer tokens of a server's --token-file (needs no server)"
    parser = commands.add_parser("token", help=text, description=text)
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = _add(actions, "add", token_add, "make a token: print it once, write its hash into the file")
    command.add_argument("file", type=Path, help="the token file, made if it is not there")
    command.add_argument("--name", required=True, help="whose it is; stands in the log")
    command.add_argument("--roles", required=True, help="some of infer,label,fit,operate; none includes another")
    command.add_argument(
        "--models", default="*", metavar="GLOBS", help="such as magika,resnet-* (default: every model)"
    )
    command.add_argument("--days", type=float, help="until it expires (default: never)")
    command = _add(actions, "list", token_list, "list the tokens of a file: names, roles, when they expire")
    command.add_argument("file", type=Path, help="the token file")
    command = _add(actions, "revoke", token_revoke, "take a token out of the file")
    command.add_argument("file", type=Path, help="the token file")
    command.add_argument("name", help="see `calserve token list`")


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
    text = "how a model did lately, or all its revisions judged on labelled rows, as an HTML page"
    command = _add_client(commands, "report", report, text, "model")
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--since", metavar="7d", help="what was predicted and labelled lately: 90m, 24h, 7d")
    which.add_argument("--data", help=DATA_HELP)
    command.add_argument("--out", type=Path, required=True, help="the file to write")


def _journal_commands(commands: Any) -> None:
    command = _add_client(commands, "label", label, "send labels for predictions that were served before", "model")
    text = "columns prediction_id or receipt, label or class_name, perhaps row; named in the first line"
    command.add_argument("--csv", type=Path, required=True, metavar="FILE", help=text)
    text = "look at the journal of predictions and labels, or keep it in order (needs no server)"
    parser = commands.add_parser("journal", help=text, description=text)
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_store(actions, "inspect", journal_inspect, "what it has of each model")
    command = _add_store(actions, "export", journal_export, "write a model's predictions with their labels into a file")
    command.add_argument("model")
    command.add_argument("--out", type=Path, required=True, help="the file to write, .csv or .parquet (needs pyarrow)")
    command = _add_store(
        actions, "prune", journal_prune, "forget old predictions with their labels (while no server runs)"
    )
    everything = float("inf")
    command.add_argument("--days", type=float, default=everything, help="forget what is older")
    text = "forget the oldest, while the journal takes more than this"
    command.add_argument("--bytes", type=float, default=everything, help=text)
    command.add_argument("--damaged", action="store_true", help="forget what is not what was written")
    _add_store(actions, "verify", journal_verify, "compare every checksum; exit code 3 if one differs")
    _add_store(commands, "doctor", doctor, "check the whole store and say what is wrong; exit code 3 if anything is")


def _online_commands(commands: Any) -> None:
    text = "look at what an online revision learns from labels, set it back, stop it"
    parser = commands.add_parser("online", help=text, description=text)
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_client(actions, "show", online_show, "what was learned, what serves, what is kept", "model")
    command = _add_client(actions, "rollback", online_rollback, "serve an earlier state and learn on from it", "model")
    command.add_argument("state", type=int, help="see `calserve online show`; 0: the revision as it was fitted")
    _add_client(actions, "suspend", online_suspend, "learn nothing until `resume`", "model")
    command = _add_client(actions, "resume", online_resume, "go on learning, with what has come since", "model")
    text = "the labels that came since teach nothing"
    command.add_argument("--skip-waiting", action="store_true", help=text)
    text = "learn again what the journal still has and compare, bit for bit; exit code 3 if it differs"
    _add_client(actions, "replay", online_replay, text, "model")


def _shadow_commands(commands: Any) -> None:
    text = "compare revisions with the active one on live traffic; make the better one serve"
    parser = commands.add_parser("shadow", help=text, description=text)
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    text = "compare a revision with the active one from now on; 'none': the model's own probabilities"
    command = _add_client(actions, "start", shadow_start, text, "model", "revision")
    text = "manual (default); automatic: promoted as soon as it is shown better"
    command.add_argument("--policy", choices=("manual", "automatic"), default="manual", help=text)
    text = "probability with which the bounds hold, whenever one looks (default: 0.95)"
    command.add_argument("--level", type=float, default=0.95, help=text)
    text = "labels without which the policy does nothing (default: 500)"
    command.add_argument("--least-labels", type=int, default=500, help=text)
    text = "of requests on which it is run, where kept logits are not enough (default: as is usual for its kind)"
    command.add_argument("--share", type=float, default=0.0, help=text)
    _add_client(actions, "list", shadow_list, "list the challengers of a model, those that have ended too", "model")
    _add_client(actions, "show", shadow_show, "how a challenger stands", "model", "revision")
    _add_client(actions, "stop", shadow_stop, "compare it no longer", "model", "revision")
    text = "make a challenger serve that is shown better; see also `activate`"
    _add_client(actions, "promote", shadow_promote, text, "model", "revision")


def _monitor_commands(commands: Any) -> None:
    text = "look at what watches a model, and at how it is asked to"
    parser = commands.add_parser("monitor", help=text, description=text)
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    text = "watch what is predicted from now on"
    command = _add_client(actions, "create", monitor_create, text, "model", "monitor", "detector")
    command.add_argument("--watched", default="served", help="raw: the model's own probabilities; or served (default)")
    command.add_argument("--policy", default="tell", help="tell (default), suspend, roll_back or refit")
    command.add_argument("--cooldown-rows", type=int, default=0, help="rows after an alarm that are not read")
    text = "labelled rows whose calibration is taken as given, so that only a change of it rings"
    command.add_argument("--baseline-rows", type=int, default=0, help=text)
    text = "a parameter of the detector; may be given more than once"
    command.add_argument("--param", action="append", default=[], metavar="NAME=VALUE", help=text)
    _add_client(actions, "list", monitor_list, "all of a model, and how far each is from ringing", "model")
    _add_client(actions, "show", monitor_show, "one of them, and what it promises", "model", "monitor")
    text = "change policy or cool-down; with other parameters it begins anew"
    command = _add_client(actions, "update", monitor_update, text, "model", "monitor")
    command.add_argument("--policy", help="tell, suspend, roll_back or refit")
    command.add_argument("--cooldown-rows", type=int, help="rows after an alarm that are not read")
    command.add_argument("--param", action="append", default=[], metavar="NAME=VALUE", help="all parameters, anew")
    _add_client(actions, "delete", monitor_delete, "forget one; its alarms stay", "model", "monitor")
    text = "look at what monitors told, and say that it was seen"
    parser = commands.add_parser("alarms", help=text, description=text)
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = _add_client(actions, "list", alarms_list, "the last ones, newest first")
    command.add_argument("model", nargs="?", help="default: of all models")
    command.add_argument("--most", type=int, default=20, help="how many (default: 20)")
    text = "say that one was seen: its monitor begins anew, and may ring again"
    command = _add_client(actions, "acknowledge", alarms_acknowledge, text, "model", "alarm")
    command.add_argument("--rebaseline", action="store_true", help="what comes from now on is the new reference")
    command = _add_client(commands, "watch", watch, "show a model's monitors and alarms as they change", "model")
    command.add_argument("--once", action="store_true", help="show them once")


def _add_store(commands: Any, name: str, command: Callable[..., None], text: str) -> argparse.ArgumentParser:
    parser = _add(commands, name, command, text)
    text = "the server's data directory: <model repository>.calserve unless it was told else"
    parser.add_argument("--data-dir", type=Path, required=True, help=text)
    return parser


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
    parser.add_argument("--token-from", type=Path, metavar="FILE", help="the file that holds your bearer token")
    text = "authorities (PEM), one of which signed the server's certificate; implies --tls"
    parser.add_argument("--root-certificates", type=Path, metavar="FILE", help=text)
    parser.add_argument("--certificate", type=Path, metavar="FILE", help="your own certificate, if the server asks")
    parser.add_argument("--private-key", type=Path, metavar="FILE", help="its key")
    parser.add_argument("--tls", action="store_true", help="TLS with the usual authorities")
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help=DATA_HELP)
    parser.add_argument("--seed", type=int, default=0, help="of the split and the intervals (default: 0)")


def _setting_type(annotation: Any) -> type:
    return {"int": int, "float": float, "Path": Path, "Path | None": Path}.get(str(annotation), str)
