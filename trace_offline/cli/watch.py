"""``trace-offline watch``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(watch)


def watch(
    source: Annotated[str | None, typer.Argument(help="The folder that the training saves to.")] = None,
    evaluation_set: Annotated[Path | None, typer.Option(help="Folder of the evaluation set.")] = None,
    heldout_set: Annotated[
        Path | None, typer.Option(help="A second evaluation set, of held-out text, for analyzers that compare the two.")
    ] = None,
    store: Annotated[Path | None, typer.Option(metavar="FILE.duckdb", help="Where the history goes.")] = None,
    interval: Annotated[float, typer.Option(metavar="SECONDS", help="Time between two looks.", min=0.1)] = 30.0,
    quiet: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="End when nothing new came for so long. Default: only on Ctrl-C.", min=0),
    ] = None,
    analyzer: Annotated[
        list[str] | None, typer.Option(help="An analyzer to run; repeat for several. Default: the five built in.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="ANALYZER.PARAM=VALUE", help="A parameter; repeatable.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file, as for analyze; options win over it.")] = None,
    run: Annotated[str | None, typer.Option(help="Name of the run in the store. Default: the folder's name.")] = None,
    revisions: Annotated[str | None, typer.Option(help="Revisions of a hub repository, e.g. 'step*'.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Worker processes. Default: what cores and memory allow.")] = None,
    executor: Annotated[str | None, typer.Option(help="inline, joblib or dask.")] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Give up an analysis that takes longer; the rest goes on.")
    ] = None,
    scheduler: Annotated[str | None, typer.Option(metavar="ADDRESS", help="The Dask scheduler.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float64, bfloat16 or float16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random choice; the same for all steps.")] = None,
    model_factory: Annotated[
        str | None, typer.Option(metavar="PACKAGE.MODULE:FUNCTION", help="Makes the model from raw weights.")
    ] = None,
    blocks: Annotated[str | None, typer.Option(help="Names of the model's blocks, e.g. 'layers.*'.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder of the tokenizer, if not beside the weights.")] = None,
    cache: Annotated[
        str | None,
        typer.Option(metavar="auto|off|FOLDER", help="Keep hidden states for reruns, beside the store or there."),
    ] = None,
    cache_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="The most the cache may hold, 20GB by default; alone: --cache auto."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
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
        "cache": cache, "cache_size": cache_size,
    }  # fmt: skip
    raise typer.Exit(run_watch(given, set_ or [], config, interval=interval, quiet=quiet, as_json=as_json))
