"""What `split_tune` will take, before it starts: tokens, bytes on the wire, memory, time.

The package is opened and the texts are read, because only they tell how many tokens there are;
nothing is sent. Times follow from FLOPs and a rate measured here for 0.3 s. The vendor's time is
computed as if its machine were this one and its layers like the customer's.

Letters: D hidden, V vocabulary, N texts.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from blindtune.exchange.packages.signing import Trust
from blindtune.exchange.wire.codec import HEAD_BYTES, row_bytes
from blindtune.models.costs import (
    FLOAT,
    READ_BYTES_PER_SECOND,
    Estimate,
    Rate,
    estimated,
    matmul_rate,
    matrix_numbers,
    weight_bytes,
)
from blindtune.privacy.word_groups import GroupingConfig
from blindtune.split.bottom import Bottom, open_bottom
from blindtune.split.customer.private_gradients import GradientConfig, check_fit, plan_gradients
from blindtune.split.customer.private_texts import ReadingConfig, read_training
from blindtune.split.customer.privatizer_config import PrivatizerConfig
from blindtune.split.customer.requests import PassConfig

HEADER_BYTES = 120
"""Of a message with tensors, more or less, without its lengths."""
NOISE_SECONDS = 6e-8
"""For one coordinate of noise (two uniforms, logarithms, an angle), on one thread."""
SURVEY_SAMPLES = 512
TOKENS_OF_A_WORD, JOINING_PRODUCTS, CLUSTER_PRODUCTS = 3, 3, 3
"""Of word groups: a text of one word with its margins; products of all frequent words by all, and
of all rare words by all their centres: only what changed is multiplied again."""
NETWORK_BYTES_PER_SECOND = 12.5e6
"""100 Mbit/s."""


def estimate_split_tune(
    bottom: str | Path,
    data: str | Path,
    privatizer: PrivatizerConfig,
    passes: PassConfig | None = None,
    *,
    dp: GradientConfig | None = None,
    reading: ReadingConfig | None = None,
    trust: Trust | None = None,
) -> Estimate:
    """Estimate `split_tune`; `dp` and `trust` as there.

    Raises:
        PackageError, PolicyError, DataError, ConfigError: as for `split_tune`.
    """
    passes, reading = passes or PassConfig(), reading or ReadingConfig()
    privatizer.check_whole()
    package = open_bottom(bottom, trust=trust)
    dp, partition = dp or GradientConfig(), package.cut.partition
    check_fit(dp, privatizer.for_task(reading.task, partition), partition)
    texts = read_training(package, data, reading)
    gradients = plan_gradients(dp, reading.task, len(texts.ids), passes.epochs)
    tokens, width = sum(map(len, texts.ids)), package.hidden_size
    longest = max(map(len, texts.ids))
    rate, cut = matmul_rate(width), package.cut
    layer = layer_flops(package, tokens / len(texts.ids))
    table_VD = _table(package)
    parts = {
        "open": weight_bytes(package.stack.model) / READ_BYTES_PER_SECOND,
        "bottom": rate.seconds(tokens * cut.cut * layer),
        **_privatizing(privatizer, package, cut.cut * layer, tokens, rate),
    }
    trained = passes.epochs * tokens
    requests = passes.epochs * -(-len(texts.ids) // passes.batch_size)
    vendor = len(cut.vendor_layers) * layer
    parts["vendor, if as fast as this machine"] = rate.seconds(2 * trained * vendor)
    sent, received = _wire(passes, trained, requests, width, cut.partition == "u-shape")
    if cut.partition == "u-shape":
        head = cut.last * layer
        if reading.task == "language-model":
            head += 2.0 * table_VD.numel()
        parts["top"] = rate.seconds(2 * trained * head)
    noised = gradients is not None and gradients.unit == "window"
    if noised:
        parts["noise on gradients"] = NOISE_SECONDS * trained * width
    parts["network, at 100 Mbit/s"] = (sent + received) / NETWORK_BYTES_PER_SECOND
    states = tokens * width * FLOAT
    batch = passes.batch_size * longest * width * FLOAT
    logits = passes.batch_size * longest * FLOAT * (
        package.stack.config.vocab_size if reading.task == "language-model" else 0
    )  # fmt: skip
    kept = min(requests, 2 * passes.checkpoint_steps * passes.accumulate) * batch * noised
    return estimated(
        parts,
        rate,
        memory=states + 40 * batch + 3 * logits,
        written=states + 8 * tokens + kept,
        tokens=trained,
        sizes={"sent": int(sent), "received": int(received)},
    )


def _privatizing(
    privatizer: PrivatizerConfig, package: Bottom, bottom_flops: float, tokens: int, rate: Rate
) -> dict[str, float]:
    """Seconds of what a privatizer does, by part."""
    table_VD, vector = _table(package), privatizer.privatizer != "block-output"
    noised = table_VD.shape[1] if vector else package.hidden_size
    parts = {"noise": NOISE_SECONDS * tokens * noised} if privatizer.draws else {}
    if privatizer.privatizer == "exponential":  # the words that occur, in float64; and a survey
        words = min(tokens, len(table_VD)) + SURVEY_SAMPLES
        parts["words to draw from"] = rate.seconds(2 * 2.0 * words * table_VD.numel())
    if privatizer.privatizer in ("token", "vector"):
        survey = 2 * 2 * 2.0 * SURVEY_SAMPLES * table_VD.numel()  # two products, in float64
        parts["survey"] = rate.seconds(survey)
        if privatizer.privatizer == "token":
            parts["nearest word"] = rate.seconds(2.0 * tokens * table_VD.numel())
    if (grouping := privatizer.grouping()) is not None:
        parts["word groups"] = grouping_seconds(grouping, table_VD, bottom_flops, rate)
    return parts


def grouping_seconds(
    config: GroupingConfig, table_VD: Tensor, bottom_flops: float, rate: Rate
) -> float:
    """Seconds of making word groups: every word through the bottom, joins, and clusters."""
    words, width = table_VD.shape
    frequent = min(words, config.frequent)
    rare, read = words - frequent, TOKENS_OF_A_WORD * words * bottom_flops
    joined = JOINING_PRODUCTS * 2.0 * frequent**2 * width
    clustered = CLUSTER_PRODUCTS * 2.0 * rare * (rare / config.words_of_a_rare_group) * width
    return rate.seconds(read + joined + clustered)


def layer_flops(package: Bottom, length: float) -> float:
    """Forward FLOPs a token of one layer, of the package's own or of the usual shape."""
    width = package.hidden_size
    linear = 12.0 * width * width
    if package.cut.customer_layers:
        layer = package.stack.layers[0]
        assert isinstance(layer, nn.Module)
        linear = float(matrix_numbers(layer))
    return 2 * linear + 4.0 * length * width


def _table(package: Bottom) -> Tensor:
    table_VD = package.stack.embedding.weight
    assert isinstance(table_VD, Tensor)
    return table_VD


def _wire(
    passes: PassConfig, tokens: int, requests: int, width: int, u_shape: bool
) -> tuple[float, float]:
    """Bytes to the vendor and from it; in the U-shape states go both ways, gradients up."""
    row = row_bytes(passes.precision, width)
    frame = HEADER_BYTES + HEAD_BYTES
    steps = -(-requests // passes.accumulate)
    if u_shape:
        return 2 * tokens * row + (2 * requests + steps) * frame, tokens * row + (
            2 * requests + steps
        ) * frame
    return tokens * row + (requests + steps) * frame, (requests + steps) * frame
