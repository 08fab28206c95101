"""The cost of a run from its sizes alone: what docs/scale.md says in formulas.

Pure arithmetic. Work is counted in floating-point operations of matrix products, numbers passed over one by one (the
softmax of a large vocabulary, the search through distances), bytes moved in memory, bytes read, calls of small
operations. A machine gives each a rate; seconds are their sum, because nothing overlaps within one worker.

Letters: L blocks, D width, V vocabulary, N parameters, W bytes of a checkpoint's file; S rows of T positions, n = S·T.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class Network:
    """A GPT-NeoX: L blocks of width D (feed-forward 4 D), vocabulary V, separate embedding and output matrices."""

    name: str
    layers: int
    width: int
    vocabulary: int

    @property
    def block_weights(self) -> int:
        """12 L D²: the matrices of all blocks."""
        return 12 * self.layers * self.width**2

    @property
    def parameters(self) -> int:
        """N = 12 L D² + 13 L D + 2 D + 2 V D."""
        return self.block_weights + 13 * self.layers * self.width + 2 * self.width + 2 * self.vocabulary * self.width


PYTHIA = (
    Network("70m", 6, 512, 50304),
    Network("160m", 12, 768, 50304),
    Network("410m", 24, 1024, 50304),
    Network("1b", 16, 2048, 50304),
    Network("1.4b", 24, 2048, 50304),
    Network("2.8b", 32, 2560, 50304),
    Network("6.9b", 32, 4096, 50432),
    Network("12b", 36, 5120, 50688),
)
"""Biderman et al. 2023, arXiv:2304.01373, table 1, with the padded vocabularies of the published configurations."""

PYTHIA_STEPS = (0, *(2**i for i in range(10)), *range(1000, 143001, 1000))
PYTHIA_COPIES = 2
"""Each size was trained on the Pile and on its deduplicated version."""


@dataclass(frozen=True)
class Plan:
    """What is asked: S rows of T positions, and the parameters of the analyzers (their defaults).

    ``words``: annotated words of all tasks, at most 20,000 a task; ``classes`` K of a task; ``evaluations``: products
    with the features for one probe over its six penalties and the final fit. ``eigen_products``: Lanczos products.
    """

    rows: int = 1024
    positions: int = 128
    points: int = 2000
    subsamples: int = 20
    tasks: int = 1
    words: int = 20000
    classes: int = 17
    label_sets: int = 2
    evaluations: int = 60
    hessian_rows: int = 16
    hessian_tokens: int = 2048
    eigen_products: int = 46
    slq_probes: int = 8
    slq_steps: int = 10
    trace_probes: int = 24

    @property
    def tokens(self) -> int:
        """S·T."""
        return self.rows * self.positions

    @property
    def curvature_tokens(self) -> int:
        """Tokens in the loss of the Hessian."""
        return min(self.hessian_rows, max(1, self.hessian_tokens // self.positions)) * self.positions

    @property
    def products(self) -> int:
        """P = 1 + Lanczos + probes · steps of the density + further probes of the trace."""
        density = self.slq_probes * self.slq_steps
        return 1 + self.eigen_products + density + max(0, self.trace_probes - self.slq_probes)


@dataclass(frozen=True)
class Work:
    """What has to be done; see the module. ``analyses`` and ``numbers`` go to the store."""

    flops: float = 0.0
    elements: float = 0.0
    moved: float = 0.0
    read: float = 0.0
    hashed: float = 0.0
    calls: float = 0.0
    analyses: float = 0.0
    numbers: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(Work)))

    def times(self, factor: float) -> Work:
        """The same, so many times."""
        return Work(*(factor * getattr(self, item.name) for item in fields(Work)))


@dataclass(frozen=True)
class Machine:
    """Rates a second: matrix-product FLOPs, numbers passed over, bytes moved, read, hashed; seconds of a small call, of
    one analysis in the store and of one number in it.
    """

    name: str
    flops: float
    elements: float
    moved: float
    read: float
    hashed: float
    call: float
    analysis: float
    number: float

    def seconds(self, work: Work) -> float:
        """Σ work / rate."""
        total = sum(
            getattr(work, rate) / getattr(self, rate) for rate in ("flops", "elements", "moved", "read", "hashed")
        )
        return total + work.calls * self.call + work.analyses * self.analysis + work.numbers * self.number


def pass_flops(network: Network, tokens: int, positions: int, *, head: bool) -> float:
    """2 n 12 L D² + 4 n L T D (attention over all T positions) + 2 n V D (output head)."""
    blocks = 2 * network.block_weights * tokens + 4 * network.layers * positions * network.width * tokens
    return float(blocks + (2 * tokens * network.vocabulary * network.width if head else 0))


def gradient_flops(network: Network, tokens: int, positions: int) -> float:
    """Three passes: forward, and twice that backward."""
    return 3 * pass_flops(network, tokens, positions, head=True)


SOFTMAX_BYTES = 12
"""Log softmax of one number: read twice, written once; and one exponential."""

LOSS_BYTES = 36
"""``loss``, a log-probability: row copied, largest found, clamped, multiplied, summed; and one exponential."""

OUTPUT_BYTES = 12
"""``output``, a log-probability of an annotated word: row copied, largest found."""

SEARCH_PASSES = 6
"""``intrinsic_dimension``, a distance: computed, and passed over in the search for the smallest of its row."""

CANDIDATES, CANDIDATE_BYTES = 28, 40
"""Each point's proposed neighbours (k + 8), whose differences are formed anew in float64: bytes for each coordinate."""

LAYER_CALLS = 40
ITERATION_CALLS = 150
LOAD_BYTES = 2.5
"""Float32 copies of the weights moved: widened into the memory of the kept network (read half, write one), and read
once more in search of numbers that are none."""

PRODUCT_GRADIENTS = 2.0
"""A Hessian-vector product costs two gradients in theory (Pearlmutter 1994); 2.1 were measured."""


def checkpoint_work(network: Network, plan: Plan, *, file_bytes: int = 2, hidden_bytes: int = 4) -> dict[str, Work]:
    """Component → work for one checkpoint, analyzers at the parameters of ``plan``."""
    size = file_bytes * network.parameters
    layers, width, tokens = network.layers + 1, network.width, plan.tokens
    logits = float(tokens) * network.vocabulary
    words = min(plan.words, tokens)
    points = min(plan.points, tokens)
    # M² D for the search and, for standard errors, that of subsamples of a fifth of the points
    pairs = points**2 * (1 + plan.subsamples / 25)
    searched = points * (1 + plan.subsamples / 5)
    dimension = Work(
        flops=layers * (2 * pairs * width + 2 * points * width**2 + 10 * width**3),
        elements=layers * SEARCH_PASSES * pairs,
        moved=layers * searched * CANDIDATES * CANDIDATE_BYTES * width,
        calls=layers * LAYER_CALLS * plan.subsamples,
    )
    probes = layers * plan.tasks
    fits = probes * plan.label_sets * plan.evaluations
    probe = Work(
        # two products for each evaluation; one eigendecomposition for the path and one for the final fit
        flops=fits * 4 * words * plan.classes * width + 2 * probes * (2 * words * width**2 + 10 * width**3),
        elements=fits * 6 * words * plan.classes,
        calls=plan.evaluations * ITERATION_CALLS * plan.tasks,
    )
    return {
        "hash": Work(hashed=size),
        "load": Work(read=size, moved=LOAD_BYTES * 4 * network.parameters, calls=20 * network.layers),
        "pass": Work(
            flops=pass_flops(network, tokens, plan.positions, head=True),
            elements=float(tokens) * network.layers * (20 * width + 2 * plan.positions),
            moved=float(layers) * tokens * width * 2 * hidden_bytes,
            calls=network.layers * LAYER_CALLS,
        ),
        "loss": softmax_work(network, plan) + Work(elements=logits, moved=LOSS_BYTES * logits),
        "output": Work(moved=OUTPUT_BYTES * float(plan.tasks) * words * network.vocabulary),
        "intrinsic_dimension": dimension,
        "probe": probe,
        "hessian": product_work(network, plan).times(plan.products) + orthogonalisation(network, plan),
    }


def softmax_work(network: Network, plan: Plan) -> Work:
    """Log-probabilities of every position: once a checkpoint, for whoever reads them."""
    logits = float(plan.tokens) * network.vocabulary
    return Work(elements=logits, moved=SOFTMAX_BYTES * logits)


def product_work(network: Network, plan: Plan) -> Work:
    """One Hessian-vector product with kept graphs."""
    tokens = plan.curvature_tokens
    # forward and backward, twice: the softmax and its derivatives, and what each block does number by number
    elements = 8.0 * tokens * network.vocabulary + 100.0 * tokens * network.layers * network.width
    return Work(
        flops=PRODUCT_GRADIENTS * gradient_flops(network, tokens, plan.positions),
        elements=elements,
        moved=6 * 4 * float(network.parameters),
        calls=6 * network.layers * LAYER_CALLS,
    )


def orthogonalisation(network: Network, plan: Plan) -> Work:
    """Σ_j of two projections on j vectors of N numbers, each read twice, for every Lanczos run."""
    steps = plan.eigen_products**2 / 2 + plan.slq_probes * plan.slq_steps**2 / 2
    return Work(moved=4 * 4 * float(network.parameters) * steps)


def basis_vectors_that_fit(network: Network, gigabytes: float) -> int:
    """⌊bytes / 4 N⌋."""
    return int(gigabytes * 2**30 // (4 * network.parameters))


@dataclass(frozen=True)
class Prediction:
    """One network: seconds of one checkpoint without and with curvature, bytes read, numbers stored, seconds to write
    them, and the workers that keep the writer busy.
    """

    network: str
    seconds: float
    seconds_with_hessian: float
    bytes_read: float
    numbers: float
    write_seconds: float
    workers_to_saturate: float | None
    hessian_vectors: int
    components: Mapping[str, float] = field(default_factory=dict)


CHEAP = ("load", "pass", "loss", "output", "intrinsic_dimension", "probe")


def predict(
    network: Network, plan: Plan, machine: Machine, numbers: Mapping[str, tuple[float, float]], memory_gb: float
) -> Prediction:
    """One checkpoint of a network. ``numbers``: analyzer → (numbers of the whole network, of each layer), measured;
    ``memory_gb``: what there is for Lanczos vectors.
    """
    work = checkpoint_work(network, plan)
    parts = {name: machine.seconds(each) for name, each in work.items()}
    count = sum(whole + layer * (network.layers + 1) for whole, layer in numbers.values())
    writing = machine.seconds(Work(analyses=len(numbers), numbers=count))
    cheap = sum(parts[name] for name in CHEAP)
    return Prediction(
        network=network.name, seconds=cheap, seconds_with_hessian=cheap + parts["hessian"],
        bytes_read=2.0 * network.parameters, numbers=count, write_seconds=writing,
        workers_to_saturate=cheap / writing if writing else None,
        hessian_vectors=basis_vectors_that_fit(network, memory_gb), components=parts,
    )  # fmt: skip


def h100(analysis: float, number: float) -> Machine:
    """An H100 SXM by its data sheet: 67 TFLOP/s in float32, 3.35 TB/s; half of the first and 70 % of the second are
    assumed to be reached. Files at 2 GB/s, hashing 1 GB/s, 10 µs for a small operation: assumed. Writing: measured.
    """
    memory = 0.7 * 3.35e12
    return Machine("H100 SXM (data sheet)", 0.5 * 67e12, memory / 8, memory, 2e9, 1e9, 1e-5, analysis, number)
