"""The page: what was done, each claim with its answer, pictures and numbers. Every number comes from the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from claims import DECAY, EARLY, SHARE
from measures import FLATTENED, LOSS, ROLE_FROZEN, ROLE_READ, ROLES, SYNTAX, TOP, TRACE_OF_HESSIAN

ANSWERS = {
    "yes": "Yes",
    "no": "No",
    "mixed": "It depends on what is compared",
    "not shown": "Not shown",
    "no turn": "There is no turn to precede",
}
TITLES = {measure.key: measure.title for measure in (*SYNTAX, *ROLES, TRACE_OF_HESSIAN, TOP)}
QUESTIONS = {
    "syntax_before_roles": "Is syntax earlier than roles?",
    "dimension_falls_and_rises": "Does intrinsic dimension fall and rise?",
    "curvature_peaks_early": "Does curvature peak early and decay?",
    "peak_before_turn": "Does the peak precede the turn?",
}


def write_page(results: Mapping[str, Any]) -> str:
    """The whole page as Markdown."""
    parts = [_head(results), _answers(results), _made(results)]
    parts += [_learning(results), _dimension(results), _curvature(results), _peak(results)]
    parts += [_caveats(results), _again(results)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def step_of(event: Any) -> str:
    """``512 (448-640)``, or a dash where there is no event."""
    return f"{event['step']:,} ({event['low']:,}-{event['high']:,})" if isinstance(event, Mapping) else "–"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many digits that count."""
    return "–" if value is None else f"{value:.{digits}g}"


def groups(results: Mapping[str, Any]) -> list[str]:
    """The groups that were judged: one for each number of layers, and all runs where there are several."""
    found = [name for name in results["claims"] if name != "all runs"]
    return found + (["all runs"] if len(found) > 1 else [])


def _head(results: Mapping[str, Any]) -> str:
    return """
# Do syntax, roles and curvature develop in phases?

TRACE (Aljaafari, Carvalho and Freitas 2025, arXiv:2507.03668; arXiv:2505.17998) watched small transformers learn an
artificial language and reported phases: syntax first and meaning later, representations that first compress and then
expand, a loss surface whose curvature peaks early and collapses. Its released code cannot support this: the attention
mask is upside down, watching a run changes it, the "trace" is the sum of five eigenvalues, the probes never look at
their labels, and there is one run.

Here the question is asked again with other instruments: causal models, saved checkpoints that are measured afterwards,
held-out sentences with gold annotations, several seeds, and an interval with each number. This page is written by
`examples/trace_paper/run.py` from the history it measured; nothing on it is written by hand.
"""


def _answers(results: Mapping[str, Any]) -> str:
    shown = groups(results)
    rows = [
        [question, *(ANSWERS[results["claims"][group][claim]["verdict"]] for group in shown)]
        for claim, question in QUESTIONS.items()
    ]
    counts = {
        group: sum(group == "all runs" or f"{run['layers']} layers" == group for run in results["runs"].values())
        for group in shown
    }
    head = ["claim", *(f"{group} (runs: {counts[group]})" for group in shown)]
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
            f"{run['training_seconds']:,.0f}",
            f"{run['analysis_seconds']:,.0f}",
        ]
        for name, run in results["runs"].items()
    ]
    head = ["run", "layers", "seed", "parameters", "steps", "held-out loss (nats)", "training s", "analysis s"]
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
and {scale["pairs"]:,} sentences with one word changed in four ways. Machine: {results["machine"]},
{results["date"]}; seconds are wall time of one process, while other work ran on the machine.
"""


def _learning(results: Mapping[str, Any]) -> str:
    claim = results["claims"]["all runs"]["syntax_before_roles"]
    runs = list(results["runs"])
    rows = [
        [TITLES[measure.key], *(step_of(claim["events"].get(measure.key, {}).get(run)) for run in runs)]
        for measure in (*SYNTAX, *ROLES)
    ]
    return f"""
## {QUESTIONS["syntax_before_roles"]}

{_verdicts(results, "syntax_before_roles")}

Syntax is told in four ways, roles in two:

- **word class, in what it predicts**: probability that the model gives to words of the right class.
- **word class, read by a probe from unseen words**: a linear probe on the last layer, tested on words that it was never
  fitted to; so it cannot know words by heart.
- **agreement, in what it prefers**: share of sentences in which the right form of the verb is more probable than the
  other number's.
- **number of the subject, read by a probe**: at the word before the verb, where that word is not the subject itself.
- **role, in what it prefers**: share of sentences in which a word that the verb's frame allows there is more probable
  than after a change that takes the role away (another preposition, or a verb that takes no object).
- **role, read by a probe**: at nouns whose role the words before them decide.

![Loss, preferences and probes over training](images/trace_paper_learning.svg)

Every line style is a seed; bands are 95 % intervals of the measurement. Pale lines are explained at the end of this
section. The step at which each measure had made half of its rise, for good (between the checkpoints in brackets):

{table(["measure", *runs], rows)}

![Order of events](images/trace_paper_order.svg)

{_order_table(claim["pairs"])}

*ratio*: geometric mean of the step of the first over that of the second, over runs, with Student's interval. *p*: sign
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
            flat = results["curves"][run].get(f"{FLATTENED.key}@{layer}", {"values": []})["values"]
            rows.append(
                [
                    run,
                    layer,
                    form,
                    number(values[0]),
                    f"{number(min(values))}-{number(max(values))}",
                    number(values[-1]),
                    f"{number(flat[0])} → {number(flat[-1])}" if flat else "–",
                ]
            )
    head = ["run", "layer", "shape", "at step 0", "lowest-highest", "at the end", "TRACE's way"]
    return f"""
## {QUESTIONS["dimension_falls_and_rises"]}

{_verdicts(results, "dimension_falls_and_rises")}

How many dimensions the hidden states of single words fill, by TwoNN on distinct points (layers from 1 on; layer 0
holds one point for each word and place and no cloud). A shape counts when it lies beyond the noise of the estimate.

![Intrinsic dimension over training](images/trace_paper_dimension.svg)

{table(head, rows)}

**As TRACE does it** (second row of the picture): 128 rows, each flattened with its padding into one point. That number
is of whole sentences, lengths included, and scatters by several dimensions from one draw of rows to the next.
"""


def _curvature(results: Mapping[str, Any]) -> str:
    claim = results["claims"]["all runs"]["curvature_peaks_early"]
    rows = []
    for key, events in claim["events"].items():
        for run, event in events.items():
            values = results["curves"][run][key]["values"]
            rows.append(
                [
                    TITLES[key],
                    run,
                    step_of(event),
                    number(values[0]),
                    number(max(values)),
                    number(values[-1]),
                    claim["runs"][key][run],
                ]
            )
    head = ["measure", "run", "peak", "at step 0", "highest", "at the end", "early and decaying"]
    return f"""
## {QUESTIONS["curvature_peaks_early"]}

{_verdicts(results, "curvature_peaks_early")}

Curvature of the loss on a fixed sample of held-out sentences: the trace of the Hessian (over random vectors, with
standard error) and its largest eigenvalue. *Early*: the peak's interval ends within the first {EARLY:.0%} of the steps.
*Decaying*: the last level is below {DECAY:.0%} of the peak.

![Curvature over training](images/trace_paper_curvature.svg)

{table(head, rows)}

**As TRACE does it**: the sum of five eigenvalues is called the trace (orange). It follows the sharpest directions and
says nothing of the rest of the spectrum.
"""


def _peak(results: Mapping[str, Any]) -> str:
    claim = results["claims"]["all runs"]["peak_before_turn"]
    runs = list(results["runs"])
    rows = [
        [name, *(step_of(claim["events"][key].get(run)) for run in runs)]
        for key, name in (("peak", "peak of the trace"), ("turn", "turn of the dimension, last layer"))
    ]
    learnt = [
        [
            TITLES[key],
            f"{each['earlier']} of {each['runs']}",
            f"{each['later']} of {each['runs']}",
            number(each.get("order", {}).get("p_sign")),
        ]
        for key, each in claim["learnt"].items()
    ]
    return f"""
## {QUESTIONS["peak_before_turn"]}

{_verdicts(results, "peak_before_turn")}

{table(["", *runs], rows)}

And against what is learnt: is the peak of the trace surely before, or surely after, half of the rise of each measure?

{table(["measure", "peak surely before", "peak surely after", "p"], learnt)}
"""


def _verdicts(results: Mapping[str, Any], claim: str) -> str:
    said = [f"{ANSWERS[results['claims'][group][claim]['verdict']]} ({group})" for group in groups(results)]
    return "**" + "; ".join(said) + ".**"


def _caveats(results: Mapping[str, Any]) -> str:
    n = len(results["runs"])
    counts: dict[int, int] = {}
    for run in results["runs"].values():
        counts[run["layers"]] = counts.get(run["layers"], 0) + 1
    warmup = results["scale"]["setting"]["warmup"]
    shown = " and ".join(f"{count} runs of {layers} layers" for layers, count in sorted(counts.items()))
    return f"""
## What to keep in mind

- There are {shown}. By a sign test three runs cannot give p below 0.25, six not below 0.03; all {n} together not below
  {number(2.0 ** (1 - n))}. Within a run the intervals are narrow; across runs the strength lies in how alike they are.
- The seeds share one corpus. Another draw of sentences, or another language, is not covered.
- Intervals of events are between checkpoints: nothing finer than their spacing can be known.
- The learning rate still rises until step {warmup:,}: what peaks or turns before that does so during warm-up, and may
  belong to the schedule rather than to learning. The paper's runs have the same warm-up.
- Half of the rise ({SHARE:g}) is a convention. Measures with another chance level, or another ceiling, are compared by
  it all the same.
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
