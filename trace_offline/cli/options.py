"""The options that ``analyze``, ``rerun`` and ``watch`` have in common: one name, one meaning, one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EvaluationSet = Annotated[Path | None, typer.Option(help="Folder of the evaluation set.")]
HeldoutSet = Annotated[
    Path | None, typer.Option(help="A second evaluation set, of held-out text, for analyzers that compare the two.")
]
StoreFile = Annotated[Path | None, typer.Option(metavar="FILE.duckdb", help="Where the history goes.")]
Analyzers = Annotated[
    list[str] | None, typer.Option(help="An analyzer to run; repeat for several. Default: the five built in.")
]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="ANALYZER.PARAM=VALUE", help="A parameter; repeatable.")
]
Config = Annotated[Path | None, typer.Option(help="A TOML file with the same names; options win over it.")]
RunName = Annotated[str | None, typer.Option(help="Name of the run in the store. Default: the folder's name.")]
Revisions = Annotated[str | None, typer.Option(help="Revisions of a hub repository, e.g. 'step*'.")]
Steps = Annotated[str | None, typer.Option(help="Only these steps, e.g. 0,512,1000-5000.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or cuda:N,M; one worker a GPU.")]
Jobs = Annotated[int | None, typer.Option(help="Worker processes. Default: one a GPU, or as cores and memory allow.")]
Executor = Annotated[str | None, typer.Option(help="inline, joblib or dask. Default: joblib, or inline for one job.")]
Timeout = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="Give up an analysis that takes longer; the rest goes on.")
]
Scheduler = Annotated[str | None, typer.Option(metavar="ADDRESS", help="The Dask scheduler, for --executor dask.")]
Cache = Annotated[
    str | None,
    typer.Option(metavar="auto|off|FOLDER", help="Keep hidden states for reruns, beside the store or there."),
]
CacheSize = Annotated[
    str | None, typer.Option(metavar="SIZE", help="The most the cache may hold, 20GB by default; alone: --cache auto.")
]
HubDiskLimit = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="The most that downloads from the hub may take together, e.g. 50GB."),
]
RemoveDownloads = Annotated[
    bool | None,
    typer.Option(
        "--remove-downloads/--keep-downloads",
        help="Remove what this run downloaded from the hub once its analyses are stored. Default: keep.",
    ),
]
Dtype = Annotated[str | None, typer.Option(help="float32, tf32 (GPUs only), float64, bfloat16 or float16.")]
Seed = Annotated[int | None, typer.Option(help="Seed of every random choice; the same for all steps.")]
ModelFactory = Annotated[
    str | None, typer.Option(metavar="PACKAGE.MODULE:FUNCTION", help="Makes the model from raw weights.")
]
Blocks = Annotated[str | None, typer.Option(help="Names of the model's blocks, e.g. 'layers.*'.")]
Tokenizer = Annotated[str | None, typer.Option(help="Folder of the tokenizer, if not beside the weights.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]
