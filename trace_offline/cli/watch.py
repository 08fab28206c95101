"""``trace-offline watch``."""

from __future__ import annotations

from typing import Annotated

import typer

from trace_offline.cli import options


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(watch)


def watch(
    source: Annotated[str | None, typer.Argument(help="The folder that the training saves to.")] = None,
    evaluation_set: options.EvaluationSet = None,
    heldout_set: options.HeldoutSet = None,
    store: options.StoreFile = None,
    interval: Annotated[float, typer.Option(metavar="SECONDS", help="Time between two looks.", min=0.1)] = 30.0,
    quiet: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="End when nothing new came for so long. Default: only on Ctrl-C.", min=0),
    ] = None,
    analyzer: options.Analyzers = None,
    set_: options.Assignments = None,
    config: options.Config = None,
    run: options.RunName = None,
    revisions: options.Revisions = None,
    device: options.Device = None,
    jobs: options.Jobs = None,
    executor: options.Executor = None,
    timeout: options.Timeout = None,
    scheduler: options.Scheduler = None,
    dtype: options.Dtype = None,
    seed: options.Seed = None,
    model_factory: options.ModelFactory = None,
    blocks: options.Blocks = None,
    tokenizer: options.Tokenizer = None,
    cache: options.Cache = None,
    cache_size: options.CacheSize = None,
    hub_disk_limit: options.HubDiskLimit = None,
    remove_downloads: options.RemoveDownloads = None,
    as_json: options.AsJson = False,
) -> None:
    """Stay beside a training job and analyze each checkpoint as soon as it is complete.

    Survives restarts of the training and of itself; checkpoints that the training removes are no failure.
    """
    from trace_offline.cli.analysis import run_watch

    given = {
        "source": source, "evaluation_set": evaluation_set, "heldout_set": heldout_set, "store": store,
        "analyzers": analyzer, "run": run, "revisions": revisions, "device": device, "jobs": jobs,
        "executor": executor, "timeout": timeout, "scheduler": scheduler, "dtype": dtype, "seed": seed,
        "model_factory": model_factory, "blocks": blocks, "tokenizer": tokenizer,
        "cache": cache, "cache_size": cache_size, "hub_disk_limit": hub_disk_limit,
        "remove_downloads": remove_downloads,
    }  # fmt: skip
    raise typer.Exit(run_watch(given, set_ or [], config, interval=interval, quiet=quiet, as_json=as_json))
