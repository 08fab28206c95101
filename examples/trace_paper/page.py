"""The page: what was done, each claim with its answer, pictures and numbers. Every number comes from the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from answers import ANSWERS, QUESTIONS, groups, verdicts
from claims import SHARE
from curvature import curvature, peak
from in_short import SHORT, TITLES
from measures import FLATTENED, LOSS, ROLE_FROZEN, ROLE_READ, ROLES, SYNTAX
from tables import lowest, number, step_of, table
from writing import written


def write_page(results: Mapping[str, Any]) -> str:
    """The whole page as Markdown."""
    parts = [_head(results), _answers(results), _made(results)]
    parts += [_learning(results), _dimension(results), curvature(results), peak(results), written(results)]
    parts += [_caveats(results), _again(results)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _head(results: Mapping[str, Any]) -> str:
    return """
# Do syntax, roles and curvature develop in phases?

TRACE (Aljaafari, Carvalho and Freitas 2025, arXiv:2507.03668; arXiv:2505.17998) watched small transformers learn an
artificial language and reported phases: syntax early and meaning later, representations that are compressed on the way,
a loss surface whose curvature peaks early and collapses. Its released code cannot support this: the attention
mask is upside down, watching a run changes it, the "trace" is the sum of five eigenvalues, the probes never look at
their labels, and there is one run.

Here the question is asked again with other instruments: causal models, saved checkpoints that are measured afterwards,
held-out sentences with gold annotations, several seeds, and an interval with each number. This page is written by
`examples/trace_paper/run.py` from the history it measured; nothing on it is written by hand.
"""


def _answers(results: Mapping[str, Any]) -> str:
    shown = groups(results)
    rows = [
        [
            question,
            *(ANSWERS[results["claims"][group][claim]["verdict"]] for group in shown),
            SHORT[claim](results["claims"]["all runs"][claim]),
        ]
        for claim, question in QUESTIONS.items()
    ]
    counts = {
        group: sum(group == "all runs" or f"{run['layers']} layers" == group for run in results["runs"].values())
        for group in shown
    }
    head = ["claim", *(f"{group} (runs: {counts[group]})" for group in shown), "in short, over all runs"]
    return f"""
## The answers

{table(head, rows)}

*Yes* and *No* mean: in every run, beyond the noise of the measurement. *It depends* means that measures or runs
contradict one another beyond noise. *Not shown* is the rest. Read the sections below before quoting a row.
"""


def _made(results: Mapping[str, Any]) -> str:
    corpus, setting, scale = results["corpus"], results["scale"]["setting"], results["scale"]
    runs = [
        [
            name,
            str(run["layers"]),
            str(run["seed"]),
            f"{run['parameters']:,}",
            f"{run['steps']:,}",
            number(results["curves"][name][LOSS.key]["values"][-1]),
            lowest(results["curves"][name][LOSS.key]),
            _seconds(run["training_cpu_seconds"]),
            _seconds(run["analysis_cpu_seconds"]),
        ]
        for name, run in results["runs"].items()
    ]
    head = [
        "run",
        "layers",
        "seed",
        "parameters",
        "steps",
        "held-out loss (nats)",
        "lowest",
        "training (CPU s)",
        "analysis (CPU s)",
    ]
    return f"""
## What was trained

{setting["sentences"]:,} sentences of an English-like language with invented words were drawn from
`trace_offline.corpus` (at most {setting["longest"]} words each, {corpus["vocabulary"]:,} word forms with four special
tokens). {corpus["train"]:,} ({setting["train_share"]:.0%}) are for training; of the others, {corpus["held_out"]:,} do
not repeat a training sentence word by word. In this language word class is not all there is to syntax: verbs agree with
their subjects, also across nouns of the other number. And roles are not word classes: any noun can be
Agent, Patient or Goal; verb and preposition decide.

The models are GPT-2s of the paper's size: width {setting["width"]}, {setting["heads"]} heads, feed-forward width
{setting["inner"]}, dropout {setting["dropout"]:g}; batches of {setting["batch"]} sentences for {setting["epochs"]}
epochs, AdamW at {setting["rate"]:g} after {setting["warmup"]:,} steps of linear warm-up, weight decay
{setting["weight_decay"]:g}. The corpus is the same for every seed, as it is in the paper: runs differ in initial
weights, order of sentences and dropout. So the seeds speak of training, not of other languages.

{table(head, runs)}

Measured on {scale["sentences"]:,} held-out sentences, {scale["words"]:,} further ones for the probe of word classes,
and up to {scale["pairs"]:,} pairs of sentences for each kind of preference. Machine: {results["machine"]},
{results["date"]}. Seconds are those of one core, since other work ran on the machine at the time (a dash: not
recorded); the analysis shares them among as many processes as there are cores.{_longest(results["runs"])}
"""


def _longest(runs: Mapping[str, Any]) -> str:
    totals = [
        run["training_cpu_seconds"] + run["analysis_cpu_seconds"]
        for run in runs.values()
        if run["training_cpu_seconds"]
    ]
    return f" The longest\nseed recorded took {max(totals) / 60:.0f} minutes of one core for both." if totals else ""


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _learning(results: Mapping[str, Any]) -> str:
    claim = results["claims"]["all runs"]["syntax_before_roles"]
    runs = list(results["runs"])
    rows = [
        [TITLES[measure.key], *(step_of(claim["events"].get(measure.key, {}).get(run)) for run in runs)]
        for measure in (*SYNTAX, *ROLES)
    ]
    return f"""
## {QUESTIONS["syntax_before_roles"]}

{verdicts(results, "syntax_before_roles")}

Both are asked in two ways, of what the model **predicts** and of what a **probe** reads from its last layer:

- *word class, in what it predicts*: probability that the model gives to words of the right class.
- *agreement, in what it prefers*: is the right form of the verb more probable than the other number's? Once where the
  subject is the word before the verb, once where other words stand between.
- *role, in what it prefers*: is the next word less probable after a change that takes its role away? Once at the word
  after the verb (an object after a verb that takes none), once across other words (another preposition, one that marks
  no role of this verb, after its object).
- *word class, read by a probe from unseen words*: a linear probe, tested on words that it was never fitted to, so that
  it cannot know words by heart.
- *number of the subject, read by a probe*: at the word before the verb, where that word is not the subject itself.
- *role, read by a probe*: at nouns whose role the words before them decide.

All preferences are balanced: each form is right as often as it is wrong, so who only knows frequencies scores one half.

![Loss, preferences and probes over training](images/trace_paper_learning.svg)

Every line style is a seed; bands are 95 % intervals of the measurement. Pale lines are explained at the end of this
section. The step at which each measure had made half of its rise, for good (between the checkpoints in brackets):

{table(["measure", *runs], rows)}

![Order of events](images/trace_paper_order.svg)

{_order_table(claim["pairs"])}

*ratio*: geometric mean of step + 1 of the first over that of the second, over runs, with Student's interval. *p*: sign
test, two-sided; with so many runs it cannot be lower than *lowest p*.

{_trace_probe(results)}
"""


def _order_table(pairs: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for pair in pairs:
        order = pair.get("order", {})
        interval = (
            f" ({number(order['ratio_low'])}-{number(order['ratio_high'])})"
            if order.get("ratio_low") is not None
            else ""
        )
        rows.append(
            [
                TITLES[pair["syntax"]],
                TITLES[pair["role"]],
                f"{pair['earlier']} of {pair['runs']}",
                f"{pair['later']} of {pair['runs']}",
                f"{number(order.get('ratio'))}{interval}",
                number(order.get("p_sign")),
                number(pair.get("smallest_p")),
            ]
        )
    head = ["syntax", "role", "surely earlier", "surely later", "ratio", "p", "lowest p"]
    return table(head, rows)


def _trace_probe(results: Mapping[str, Any]) -> str:
    lines = []
    for run in results["runs"]:
        curves = results["curves"][run]
        if ROLE_FROZEN.key in curves and ROLE_READ.key in curves:
            refit, frozen = (
                dict(zip(curves[key]["steps"], curves[key]["values"], strict=True))
                for key in (ROLE_READ.key, ROLE_FROZEN.key)
            )
            step = max((s for s in refit if s in frozen), key=lambda s: refit[s] - frozen[s])
            lines.append([run, f"{step:,}", number(refit[step]), number(frozen[step])])
    if not lines:
        return ""
    return f"""
**As TRACE does it.** Its probes are fitted to a finished model and applied to earlier checkpoints (pale lines). Where
the two ways of reading the role differ most:

{table(["run", "step", "probe fitted there", "probe of the last checkpoint"], lines)}

A frozen probe measures how far a layer still is from its final form, not what it holds."""


def _dimension(results: Mapping[str, Any]) -> str:
    claim = results["claims"]["all runs"]["dimension_falls_and_rises"]
    rows = []
    for run, layers in claim["shapes"].items():
        for key, form in sorted(layers.items()):
            values = results["curves"][run][key]["values"]
            layer = key.split("@")[1]
            other = f"{FLATTENED.key}@{layer}"
            flat = results["curves"][run].get(other, {"values": []})["values"]
            rows.append(
                [
                    run,
                    layer,
                    form,
                    number(values[0]),
                    f"{number(min(values))}-{number(max(values))}",
                    number(values[-1]),
                    claim["trace_shapes"][run].get(other, "–"),
                    f"{number(flat[0])}, {number(min(flat))}, {number(flat[-1])}" if flat else "–",
                ]
            )
    head = [
        "run",
        "layer",
        "shape",
        "at step 0",
        "lowest-highest",
        "at the end",
        "TRACE's way: shape",
        "start, lowest, end",
    ]
    return f"""
## {QUESTIONS["dimension_falls_and_rises"]}

{verdicts(results, "dimension_falls_and_rises")}

How many dimensions the hidden states of single words fill, by TwoNN on distinct points (layers from 1 on; layer 0
holds one point for each word and place and no cloud). A shape counts when it lies beyond the noise of the estimate;
*falls* (*rises*) says that no way back was seen, and answers the claim only where that way is surely below half of it.

![Intrinsic dimension over training](images/trace_paper_dimension.svg)

{table(head, rows)}

**As TRACE does it** (second row of the picture): 128 rows, each flattened with its padding into one point. That number
is of whole sentences, lengths included, and scatters by several dimensions from one draw of rows to the next. Where its
shape differs from that of the words, the phases seen with it belong to the number and not to the representations.
"""


def _caveats(results: Mapping[str, Any]) -> str:
    n = len(results["runs"])
    counts: dict[int, int] = {}
    for run in results["runs"].values():
        counts[run["layers"]] = counts.get(run["layers"], 0) + 1
    warmup = results["scale"]["setting"]["warmup"]
    shown = " and ".join(
        f"{count} {'run' if count == 1 else 'runs'} of {layers} layers" for layers, count in sorted(counts.items())
    )
    four = "" if 4 in counts else "\n  Four layers (`--models 4`) are not on this page."
    return f"""
## What to keep in mind

- Runs: {shown}. A sign test over {n} runs cannot give p below {number(2.0 ** (1 - n))}, however clear they are.
  Within a run the intervals are narrow; across runs the strength lies in how alike they are.{four}
- Curvature is that of 32 sentences; its trace is from 96 random vectors. At step 0, where as much curves down as
  up, it is known least (see its band).
- The seeds share one corpus. Another draw of sentences, or another language, is not covered.
- Intervals of events are between checkpoints: nothing finer than their spacing can be known.
- The learning rate still rises until step {warmup:,}: what peaks or turns before that does so during warm-up, and may
  belong to the schedule rather than to learning. The paper's runs have the same warm-up.
- Half of the rise ({SHARE:g}) is a convention. Measures with another chance level, or another ceiling, are compared by
  it all the same.
- What a checkpoint is asked decides what comes first. Whether a verb takes an object can be learnt from pairs of
  words. Only what spans other words needs the structure of the sentence.
- The weights decay apart from the gradient here (AdamW); TRACE adds the decay to the gradient.
"""


def _again(results: Mapping[str, Any]) -> str:
    return """
## Do it again

```
pip install -e ".[examples]"
python examples/trace_paper/run.py --output runs --reduced
python examples/trace_paper/run.py --output runs-full --publish
```

The first is a rehearsal in small, the second makes this page. Both go on where they were stopped. All numbers behind
the page are in `examples/trace_paper/results/trace_paper.json`; all others that were measured are in the history
`history.duckdb` that the command leaves beside the runs, for `trace-offline query`, `trace-offline events` and
`trace-offline report`.
"""
