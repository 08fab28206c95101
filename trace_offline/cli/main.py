"""The command line. Commands import what they need when they run, so that ``--help`` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from trace_offline.cli import corpus, evaluation, events, importing, options, stores, watch
from trace_offline.core.errors import TraceOfflineError

app = typer.Typer(
    name="trace-offline",
    help="When did my language model learn that? Every checkpoint of a training run → one queryable history.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(evaluation.app, name="evaluation-set")
app.add_typer(corpus.app, name="corpus")

StoreArgument = Annotated[Path, typer.Argument(metavar="FILE.duckdb", help="The store.")]


@app.command()
def discover(
    source: Annotated[str, typer.Argument(help="A folder, a file, hf://org/name, or a Hugging Face cache folder.")],
    revisions: Annotated[str | None, typer.Option(help="Revisions of a hub repository, e.g. 'step*'.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the checkpoints found, in order, and why any was set aside."""
    from trace_offline.cli.discovery import show

    raise typer.Exit(show(source, revisions, as_json=as_json))


@app.command()
def analyze(
    source: Annotated[
        str | None, typer.Argument(help="A folder, a file, hf://org/name, or a Hugging Face cache folder.")
    ] = None,
    evaluation_set: options.EvaluationSet = None,
    heldout_set: options.HeldoutSet = None,
    store: options.StoreFile = None,
    analyzer: options.Analyzers = None,
    set_: options.Assignments = None,
    config: options.Config = None,
    run: options.RunName = None,
    steps: options.Steps = None,
    revisions: options.Revisions = None,
    device: options.Device = None,
    jobs: options.Jobs = None,
    executor: options.Executor = None,
    timeout: options.Timeout = None,
    scheduler: options.Scheduler = None,
    shard: Annotated[
        str | None, typer.Option(metavar="i/n", help="Only every n-th checkpoint from the i-th; see merge.")
    ] = None,
    cache: options.Cache = None,
    cache_size: options.CacheSize = None,
    hub_disk_limit: options.HubDiskLimit = None,
    remove_downloads: options.RemoveDownloads = None,
    dtype: options.Dtype = None,
    seed: options.Seed = None,
    model_factory: options.ModelFactory = None,
    blocks: options.Blocks = None,
    tokenizer: options.Tokenizer = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Compute again what the store already has.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Analyze every checkpoint of a run into the store. Doing it twice is a no-op; interrupted runs resume."""
    from trace_offline.cli.analysis import run_analyze

    given = {
        "source": source, "evaluation_set": evaluation_set, "heldout_set": heldout_set, "store": store,
        "analyzers": analyzer, "run": run,
        "steps": steps, "revisions": revisions, "device": device, "jobs": jobs, "dtype": dtype, "seed": seed,
        "model_factory": model_factory, "blocks": blocks, "tokenizer": tokenizer,
        "trust_remote_code": trust_remote_code or None, "force": force or None, "executor": executor,
        "timeout": timeout, "scheduler": scheduler, "shard": shard, "cache": cache, "cache_size": cache_size,
        "hub_disk_limit": hub_disk_limit, "remove_downloads": remove_downloads,
    }  # fmt: skip
    raise typer.Exit(run_analyze(given, set_ or [], config, as_json=as_json))


@app.command()
def rerun(
    store: StoreArgument,
    analyzer: Annotated[str, typer.Option(help="The analyzer to run again.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PARAM=VALUE", help="A parameter to change; repeatable."),
    ] = None,
    steps: options.Steps = None,
    run: Annotated[str | None, typer.Option(help="Only this run of the store.")] = None,
    source: Annotated[str | None, typer.Option(help="Where the checkpoints are now, if they moved.")] = None,
    evaluation_set: Annotated[Path | None, typer.Option(help="Where the evaluation set is now, if it moved.")] = None,
    heldout_set: Annotated[Path | None, typer.Option(help="Where the held-out set is now, or another one.")] = None,
    device: options.Device = None,
    jobs: options.Jobs = None,
    executor: options.Executor = None,
    timeout: options.Timeout = None,
    scheduler: options.Scheduler = None,
    cache: options.Cache = None,
    cache_size: options.CacheSize = None,
    hub_disk_limit: options.HubDiskLimit = None,
    remove_downloads: options.RemoveDownloads = None,
    force: Annotated[bool, typer.Option("--force", help="Compute again what the store already has.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Run one analyzer again over a whole history, changing single parameters; nothing else is touched."""
    from trace_offline.cli.analysis import run_rerun

    raise typer.Exit(
        run_rerun(
            store, analyzer, set_ or [], steps=steps, run=run, source=source, evaluation_set=evaluation_set,
            heldout_set=heldout_set, device=device, jobs=jobs, force=force, as_json=as_json, executor=executor,
            timeout=timeout, scheduler=scheduler, cache=cache, cache_size=cache_size,
            hub_disk_limit=hub_disk_limit, remove_downloads=remove_downloads,
        )
    )  # fmt: skip


@app.command()
def status(store: StoreArgument, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show what is planned, done, failed and why."""
    from trace_offline.cli.status import show

    raise typer.Exit(show(store, as_json=as_json))


@app.command()
def query(
    store: StoreArgument,
    sql: Annotated[str, typer.Argument(metavar="SQL", help="One SELECT over history, arrays, status, …")],
    format_: Annotated[str, typer.Option("--format", help="table, csv, json or parquet.")] = "table",
    output: Annotated[Path | None, typer.Option(help="Write to this file instead of the terminal.")] = None,
) -> None:
    """Ask the history in SQL."""
    from trace_offline.query.formats import check_format, render, write
    from trace_offline.query.reader import Store

    check_format(format_)
    table = Store.open(store).sql(sql)
    if output is not None:
        write(table, format_, output)
        typer.echo(f"{table.num_rows} rows written to {output}", err=True)
        return
    sys.stdout.buffer.write(render(table, format_))
    sys.stdout.buffer.flush()


@app.command()
def analyzers(
    name: Annotated[str | None, typer.Argument(help="Show this one in full.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the analyzers, or one with its parameters, metrics and references."""
    from trace_offline.cli.analyzers import show

    raise typer.Exit(show(name, as_json=as_json))


@app.command()
def report(
    store: StoreArgument,
    output: Annotated[Path, typer.Option(metavar="FILE.html", help="The page to write.")],
    run: Annotated[str | None, typer.Option(help="Only this run of the store.")] = None,
) -> None:
    """Write the history as one self-contained page of pictures."""
    from trace_offline.report import write_report

    written = write_report(store, output, run=run)
    typer.echo(f"wrote {written}", err=True)


@app.command()
def demo(
    store: Annotated[Path, typer.Option(metavar="FILE.duckdb", help="Where the history goes.")] = Path("demo.duckdb"),
    data: Annotated[
        Path | None, typer.Option(help="Folder with the shipped series. Default: data/ here or in the checkout.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Worker processes.")] = None,
) -> None:
    """Analyze the series shipped in data/ and print its history."""
    from trace_offline.cli.demo import run_demo

    raise typer.Exit(run_demo(store, data, jobs))


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("trace-offline"))
        raise typer.Exit


events.register(app)
importing.register(app)
stores.register(app)
watch.register(app)


def main() -> None:
    """Entry point: a user's mistake ends in one message and exit code 2, never in a traceback."""
    try:
        app()
    except TraceOfflineError as error:
        print(f"Error: {error.message}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # The reader of our output (head, less) went away.
        sys.stderr.close()
        sys.exit(0)


if __name__ == "__main__":
    main()
