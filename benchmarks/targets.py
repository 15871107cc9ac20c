"""What the gradients of the U-shape give away, and what hiding it costs.

    python benchmarks/targets.py --data DIR --work DIR [--smoke] [labels|questions|words ...]

labels: film reviews (two classes), MiniLM, cut 0, no noise on texts: labels as they are, drawn anew
    by randomized response, and DP-SGD at the customer. UA, and the EP of labels: when gradients of
    the first pass are grouped (the table has for DP-SGD what its noise leaves to the best
    attacker); when the vendor's own outputs of the last pass are; and when a classifier of these
    corrects labels that were drawn anew.
questions: the same for TREC's six kinds of questions.
words: WikiText-2, SmolLM2-135M, cut 6 and 2: true tokens as targets, without noise on gradients and
    with, and the words that were sent. Perplexity on true text, and the EP of the words that the
    gradients of the first batches give.

Rows are kept and collected as `rows.py` says, into benchmarks/results/targets-PART.json.
"""

from dataclasses import asdict

import torch

from blindtune.attacks.gradient_matching import GradientsView, tokens_from_gradients
from blindtune.attacks.label_inference import (
    groups_of_activations,
    groups_of_gradients,
    labels_from_activations,
)
from blindtune.attacks.observation import seen_gradients, seen_texts
from blindtune.evaluation.leakage.empirical_privacy import record_privacy
from blindtune.exchange.wire.transcript import Recorder
from blindtune.models.encoders import load_any
from blindtune.privacy.metric_dp import Mechanism
from blindtune.privacy.randomized_response import keep_chance
from blindtune.split.customer.private_gradients import (
    GradientConfig,
    GradientNoise,
    plan_gradients,
)
from blindtune.split.customer.private_states import privatize
from blindtune.split.customer.ushape import Top, customers_head, predict_u_shape, train_u_shape
from blindtune.split.partition import stack_of
from rows import parse_options, run_parts
from split import (
    BATCH,
    EPOCHS,
    LENGTH,
    RATE,
    SEEDS,
    Bench,
    accuracy,
    job,
    nats_per_token,
    tuning,
    windows,
)  # fmt: skip

EPSILONS = (4.0, 2.0, 1.0)
DP_EPSILONS = (8.0, 4.0, 2.0)
ETAS = (60.0, 45.0, 35.0)  # of token mode; about 8, 30 and 57 % of the words change
EXACT = {"task": "hidden", "precision": "float32"}  # of the terms of a recorded job


def label_row(bench, folder, seed, data, epsilon=None, dp=None):
    """UA of one U-shape job, and how many labels its gradients give away."""
    learn, test = data(seed)
    classes = int(learn[1].max()) + 1
    vendor, bottom = bench.party(folder, partition="u-shape")
    private = privatize(bottom, *learn, mechanism=None, classes=classes, label_epsilon=epsilon)
    unseen = privatize(bottom, test[0], mechanism=None)
    config, passes = tuning(len(learn[0]), seed)
    head, recorder = customers_head(bottom, classes, config), Recorder()
    top = Top(bottom, head, learning_rate=RATE)
    plan = plan_gradients(
        GradientConfig(epsilon=dp), "classification", len(learn[0]), passes.epochs
    )
    noise = plan and GradientNoise(plan, None)
    with job(vendor, bottom, config, tap=recorder, **EXACT) as transport:
        losses = train_u_shape(transport, top, private, passes, language_model=False, noise=noise)
        logits_NC = torch.cat(predict_u_shape(transport, top, unseen))
    return {
        "UA": accuracy(logits_NC, test[1]),
        **read_labels(recorder.transcript(), passes, learn[1], epsilon),
        "changed labels": private.changed_labels,
        "epsilon": dp or epsilon,
        "DP-SGD": plan and asdict(plan),
        "last loss": sum(losses[-10:]) / len(losses[-10:]),
    }


def first_gradients(transcript, passes, texts):
    """Of every text: output and gradient [L, D] of its first pass, and output of its last."""
    order = [batch.texts for batch in passes.numbered(texts, "u-shape")]
    found = {}
    for numbers, seen in zip(
        order, seen_gradients(transcript, seen_texts(transcript)), strict=True
    ):
        for i, output_LD, gradient_LD in zip(numbers, seen.outputs, seen.gradients, strict=True):
            found[i] = (*found.get(i, (output_LD, gradient_LD))[:2], output_LD)
    return found


def read_labels(transcript, passes, labels_N, epsilon):
    """EP of labels: gradients of each text's first pass, grouped by direction; activations."""
    found = first_gradients(transcript, passes, len(labels_N))
    count, classes = len(labels_N), int(labels_N.max()) + 1
    groups_N = groups_of_gradients([found[i][1] for i in range(count)], classes)
    activation_ND = torch.stack([found[i][2].mean(0) for i in range(count)])
    guesses = {
        "EP labels": groups_N,
        "EP activations": groups_of_activations(activation_ND, classes),
    }
    if epsilon is not None:
        right = keep_chance(epsilon, classes)
        corrected_N = labels_from_activations(activation_ND, groups_N, classes, right=right)
        guesses["EP corrected"] = corrected_N
    scores = {name: record_privacy(one, labels_N, unnamed=True) for name, one in guesses.items()}
    read = scores["EP labels"].privacy
    return {
        **{name: one.privacy.value for name, one in scores.items()},
        "interval": {"low": read.low, "high": read.high},
        "commonest": scores["EP labels"].blind_accuracy,
    }


def read_words(transcript, passes, cut, private, texts=24):
    """EP of words: the true tokens against those that the gradients of some texts give."""
    found = first_gradients(transcript, passes, len(private))
    some = list(found)[:texts]
    view = GradientsView(
        model=stack_of(load_any("smollm2-135m")[0]), last=cut.last,
        outputs=tuple(found[i][0] for i in some), gradients=tuple(found[i][1] for i in some),
    )  # fmt: skip
    guess = tokens_from_gradients(view)
    right = [guess_L[1:] == private.ids[i][1:] for guess_L, i in zip(guess, some, strict=True)]
    return {"EP words": 1 - float(torch.cat(right).float().mean())}


def word_row(bench, folder, seed, eta, *, sent, dp=None):
    """Perplexity before and after, and the words that the first gradients give away."""
    vendor, bottom = bench.party(folder, "smollm2-135m", partition="u-shape", cut=6, last=2)
    learn = windows(bench, bottom.tokenizer, "valid", 96, seed)
    test = windows(bench, bottom.tokenizer, "test", 32, 0)
    config, passes = tuning(len(learn), seed, rate=5e-4, epochs=1)
    mechanism = Mechanism(eta=eta)
    protection = GradientConfig(epsilon=dp, unit="window")
    plan = plan_gradients(protection, "language-model", len(learn), passes.epochs)
    noise = plan and GradientNoise(plan, None)
    private = privatize(bottom, learn, mechanism=mechanism, predict_sent=sent)
    unseen = privatize(bottom, test, mechanism=mechanism)
    recorder, top = Recorder(), Top(bottom, None)
    with job(vendor, bottom, config, tap=recorder, **EXACT) as transport:
        before = nats_per_token(transport, top, unseen)
        train_u_shape(
            transport, top, private, passes,
            language_model=True, noise=noise, true_targets=not sent,
        )  # fmt: skip
        after = nats_per_token(transport, top, unseen)
    return {
        "nats before": before,
        "nats after": after,
        "changed in training": private.changed,
        "DP-SGD": plan and asdict(plan),
        **read_words(recorder.transcript(), passes, bottom.cut, private),
    }


def plan(bench, part):
    """The rows of a part, most wanted first: (name, function)."""
    rows = []

    def add(name, function, *args, **options):
        rows.append((name, lambda folder: function(bench, folder, *args, **options)))

    for seed in SEEDS:
        if part == "words":
            for eta in ETAS:
                add(f"true-{eta:g}-{seed}", word_row, seed, eta, sent=False)
                add(f"sent-{eta:g}-{seed}", word_row, seed, eta, sent=True)
            add(f"dp-{DP_EPSILONS[0]:g}-{seed}", word_row, seed, ETAS[1], sent=False,
                dp=DP_EPSILONS[0])  # fmt: skip
            continue
        data = {"labels": bench.reviews, "questions": bench.questions}[part]
        add(f"as-they-are-{seed}", label_row, seed, data)
        for epsilon in EPSILONS:
            add(f"response-{epsilon:g}-{seed}", label_row, seed, data, epsilon)
        for epsilon in DP_EPSILONS:
            add(f"dp-{epsilon:g}-{seed}", label_row, seed, data, dp=epsilon)
    return rows


def main():
    options = parse_options(__doc__, ("labels", "questions", "words"))
    bench = Bench(options.data, options.work, options.smoke)
    facts = {"batch": BATCH, "epochs": EPOCHS, "learning_rate": RATE, "max_length": LENGTH}
    run_parts("targets", options, lambda part: plan(bench, part), facts=facts)


if __name__ == "__main__":
    main()
