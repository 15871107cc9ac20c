"""Split-and-Privatize: utility accuracy (UA) and empirical privacy (EP) of split tuning.

    python benchmarks/split.py --data DIR --work DIR [--smoke] [sst2|leaks|fpb|smollm2|wikitext ...]

Both parties run in this process, over the codec of the network. Rows are kept and collected as
`rows.py` says, into benchmarks/results/split-PART.json; `--smoke` does a twentieth of everything.

sst2: film reviews, MiniLM, two-part: cut 0 by strength of noise, with and without CTI, in every
    mode; cuts 2, 4, 5 at one strength.
leaks: what attacks read of the states of the same settings, without tuning anything.
fpb: financial news, three classes: with and without CTI at equal EP.
smollm2: the same film reviews on SmolLM2-135M by the U-shape.
wikitext: causal language modelling on SmolLM2-135M by the U-shape.
"""

import json
import random
from contextlib import contextmanager
from dataclasses import asdict

import torch
from peft import LoraConfig, inject_adapter_in_model

from blindtune.attacks.adversary import StatesView
from blindtune.attacks.embedding_inversion import nearest_tokens
from blindtune.evaluation.leakage.empirical_privacy import contributing_masks, empirical_privacy
from blindtune.exchange.wire.messages import unpack
from blindtune.exchange.wire.transport import InProcessTransport
from blindtune.models.encoders import load_any
from blindtune.privacy.metric_dp import Mechanism
from blindtune.privacy.noise_level import NoiseSurvey
from blindtune.privacy.token_importance import ImportanceConfig
from blindtune.privacy.word_groups import WordGroups, group_words
from blindtune.split.bottom import open_bottom, write_bottom
from blindtune.split.customer.private_states import privatize
from blindtune.split.customer.requests import PassConfig, new_token, open_job, predict, train
from blindtune.split.customer.ushape import Top, predict_u_shape, train_u_shape
from blindtune.split.customer.word_vectors import word_vectors
from blindtune.split.partition import (
    Cut,
    PooledHead,
    finish,
    lm_logits,
    mean_token_loss,
    stack_of,
    task_loss,
)
from blindtune.split.terms import TuningConfig
from blindtune.split.vendor.handler import Vendor
from blindtune.split.vendor.lora import freeze
from blindtune.training.optimizers import build_optimizer, build_scheduler
from rows import parse_options, run_parts

SEEDS = (0, 1, 2)
ETAS = (100.0, 80.0, 65.0)
CUTS = (2, 4, 5)
BATCH, EPOCHS, RATE, LENGTH = 16, 2, 1e-3, 64
CTI = ImportanceConfig()


class Bench:
    """Where things are, and how much is done of everything."""

    def __init__(self, data, work, smoke):
        self.data, self.work, self.smoke = data, work, smoke

    def amount(self, full):
        return max(16, full // 20) if self.smoke else full

    def reviews(self, seed, learn=1000, test=872):
        """SST-2: training sentences of 8 to 16 words, as many of each class; the dev set."""
        rows = read(self.data / "sst2_train.jsonl")
        rows = [row for row in rows if 8 <= len(row["text"].split()) <= 16]
        random.Random(seed).shuffle(rows)
        half = self.amount(learn) // 2
        chosen = [row for c in (0, 1) for row in [r for r in rows if r["label"] == c][:half]]
        dev = read(self.data / "sst2_dev.jsonl")
        return labelled(chosen), labelled(some_of(dev, self.amount(test)))

    def news(self, seed):
        """Financial PhraseBank: one fixed test set of 800, training sentences from the rest."""
        rows = read(self.data / "fpb_50agree.jsonl")
        random.Random(0).shuffle(rows)
        test, rest = rows[:800], rows[800:]
        random.Random(seed).shuffle(rest)
        return labelled(rest[: self.amount(800)]), labelled(test[: self.amount(800)])

    def questions(self, seed):
        """TREC: questions of six kinds; its test set."""
        rows = read(self.data / "trec_qc_train.jsonl")
        kinds = {name: i for i, name in enumerate(sorted({row["label"] for row in rows}))}
        random.Random(seed).shuffle(rows)
        sets = rows[: self.amount(1000)], read(self.data / "trec_qc_test.jsonl")
        return [labelled([row | {"label": kinds[row["label"]]} for row in some]) for some in sets]

    def party(self, folder, model="minilm", *, partition="two-part", cut=0, last=0):
        """Vendor and customer of a fresh model."""
        whole, tokenizer = load_any(model)
        stack = stack_of(whole)
        cut = Cut(partition=partition, layers=stack.layer_count, cut=cut, last=last)
        identity = write_bottom(whole, tokenizer, folder / "bottom", cut, max_length=LENGTH)
        return Vendor(stack, cut, identity, folder / "vendor"), open_bottom(folder / "bottom")

    def groups(self, config):
        """MiniLM's word groups, made from WikiText and speeches; kept in the work directory."""
        path = (
            self.work
            / f"groups-{config.wrong_guesses}-{config.words_of_a_rare_group:g}.safetensors"
        )
        if not path.exists():
            vector_VD, count_V, special = self.words()
            group_words(vector_VD, count_V, special, config).save(path)
        return WordGroups.load(path)

    def words(self):
        """Vectors and public counts of MiniLM's words, and its special tokens."""
        path = self.work / "words.pt"
        if not path.exists():
            model, tokenizer = load_any("minilm")
            stack = stack_of(model)
            texts = (self.data / "wikitext2_valid.txt").read_text().replace("<unk>", "")
            texts = [line for line in texts.splitlines() if len(line) > 20]
            texts += [row["text"] for row in read(self.data / "state_union.jsonl")]
            count_V = count_words(tokenizer, texts, len(stack.embedding.weight))
            vector_VD = word_vectors(stack, tokenizer)
            torch.save((vector_VD, count_V, tokenizer.all_special_ids), path)
        return torch.load(path)

    def other_texts(self, task, used):
        """A task's other texts: the best that an adversary can have of the language."""
        file = {"sst2": "sst2_train.jsonl", "fpb": "fpb_50agree.jsonl"}[task]
        texts = [row["text"] for row in read(self.data / file)]
        texts = sorted({text for text in texts if len(text.split()) >= 8} - set(used))
        return some_of(texts, min(len(texts), 10_000))

    def other_counts(self, task, tokenizer, used, size):
        """How often each word is in these texts."""
        return count_words(tokenizer, self.other_texts(task, used), size)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def some_of(rows, count):
    """Spread evenly."""
    return [rows[i * len(rows) // count] for i in range(count)]


def count_words(tokenizer, texts, size):
    """How often each word of the vocabulary occurs, without special tokens."""
    found = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.bincount(torch.tensor([i for ids in found for i in ids]), minlength=size)


def labelled(rows):
    """Texts and classes; sorted by length, because a batch is padded to its longest text."""
    rows = sorted(rows, key=lambda row: len(row["text"]))
    return [row["text"] for row in rows], torch.tensor([row["label"] for row in rows])


def tuning(texts, seed, rate=RATE, epochs=EPOCHS):
    """What the customer asks for, and how it goes through its texts."""
    steps = epochs * -(-texts // BATCH)
    config = TuningConfig(
        learning_rate=rate, schedule="linear", warmup_steps=steps // 10, max_steps=steps, seed=seed
    )
    return config, PassConfig(epochs=epochs, batch_size=BATCH, seed=seed, checkpoint_steps=steps)


@contextmanager
def job(vendor, bottom, config, *, tap=None, wrap=lambda transport: transport, **terms):
    """A job's transport; `tap` records what crosses, `wrap` goes around every connection."""
    with vendor.session("customer") as handler:
        transport = open_job(
            lambda: wrap(InProcessTransport(handler, tap=tap)), bottom, new_token(), config, **terms
        )
        yield transport
        transport.close()


def accuracy(logits_NC, labels_N):
    return float((logits_NC.argmax(1) == labels_N).float().mean())


def two_part_row(bench, folder, data, seed, mechanism=None, importance=None, cut=0):
    """UA of one job, and the share of tokens that left as other tokens (token mode)."""
    learn, test = data
    classes = int(learn[1].max()) + 1
    vendor, bottom = bench.party(folder, cut=cut)
    private = privatize(bottom, *learn, mechanism=mechanism, importance=importance, classes=classes)
    unseen = privatize(bottom, test[0], mechanism=mechanism)
    config, passes = tuning(len(learn[0]), seed)
    with job(vendor, bottom, config, task="classification", outputs=classes) as transport:
        losses = train(transport, private, passes)
        logits_NC = predict(transport, unseen, batch_size=32)
    return {
        "UA": accuracy(logits_NC, test[1]),
        "changed in test": unseen.changed,
        "changed in training": private.changed,
        "last loss": sum(losses[-10:]) / len(losses[-10:]),
        "setting": {
            "cut": cut,
            "mechanism": mechanism and asdict(mechanism),
            "CTI": importance and asdict(importance),
            "training texts": len(learn[0]),
            "test texts": len(test[0]),
        },
    }


def equal_privacy_row(bench, folder, data, seed, eta):
    """CTI with the eta at which as many training tokens leave changed as at `eta` without it."""
    learn, _ = data
    _, bottom = bench.party(folder / "survey")
    ids = privatize(bottom, learn[0], mechanism=None).ids
    spared = contributing_masks(
        ids, learn[1], bottom.margins, CTI,
        classes=int(learn[1].max()) + 1, vocabulary_size=len(bottom.stack.embedding.weight),
    )  # fmt: skip
    content_T = ~torch.cat([bottom.margins.mask(text) for text in ids])
    noised_T = content_T & ~torch.cat(spared)
    share = float(noised_T.sum() / content_T.sum())
    table_VD, ids_T = bottom.stack.embedding.weight, torch.cat(ids)
    changed = NoiseSurvey(table_VD, ids_T[content_T], samples=2048).at(eta).changed_share
    if changed > 0.98 * share:
        return {"UA": None, "spared in training": 1 - share, "impossible": True}
    lower = NoiseSurvey(table_VD, ids_T[noised_T], samples=2048).eta_for(changed / share)
    row = two_part_row(bench, folder, data, seed, Mechanism(eta=lower), CTI)
    return row | {"spared in training": 1 - share, "equal to eta": eta}


def centralised_row(bench, folder, data, seed):
    """Ordinary LoRA tuning of the whole model, without anything of split tuning's run."""
    learn, test = data
    config, passes = tuning(len(learn[0]), seed)
    model, tokenizer = load_any("minilm")
    classes = int(learn[1].max()) + 1
    stack = stack_of(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        add_lora(stack, Cut(layers=stack.layer_count, cut=0), config)
        head = PooledHead(stack.hidden_size, classes, "mean")

    def outputs(texts):
        batch = tokenizer(texts, truncation=True, max_length=LENGTH, padding=True,
                          return_tensors="pt")  # fmt: skip
        return head(model(**batch).last_hidden_state, batch["attention_mask"])

    def loss(chosen):
        return task_loss(outputs([learn[0][i] for i in chosen]), learn[1][chosen], "classification")

    losses = fit([*trained(model), *head.parameters()], loss, len(learn[0]), config, passes)
    with torch.no_grad():
        logits_NC = torch.cat([outputs(test[0][i : i + 32]) for i in range(0, len(test[0]), 32)])
    return {"UA": accuracy(logits_NC, test[1]), "losses": {"all": losses}}


def add_lora(stack, cut, config):
    """LoRA where a vendor puts it."""
    served = freeze(stack, cut)
    targets = [*served.attention, *served.feed_forward]
    lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=targets)
    inject_adapter_in_model(lora, stack.model, adapter_name="one")


def trained(model):
    return [p for name, p in model.named_parameters() if "lora_" in name]


def fit(parameters, loss_of, texts, config, passes):
    """The plain loop that split tuning must equal."""
    optimizer = build_optimizer(
        torch.nn.ParameterList(parameters), config.learning_rate, config.weight_decay
    )
    scheduler = build_scheduler(optimizer, config.schedule, config.warmup_steps, config.max_steps)
    losses = []
    for step in passes.steps(texts):
        for chosen in step:
            loss = loss_of(chosen)
            (loss * len(chosen) / sum(map(len, step))).backward()
            losses.append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return losses


def leak_row(bench, folder, seed, mechanism=None, cut=0, texts=100):
    """EP of the nearest-neighbour attack on the states of test texts."""
    _, (sentences, _) = bench.reviews(seed)
    _, bottom = bench.party(folder, cut=cut)
    sent = privatize(bottom, some_of(sentences, min(texts, len(sentences))), mechanism=mechanism)
    margins = bottom.margins
    view = StatesView(
        model=bottom.stack, cut=cut, states=sent.states, mechanism=mechanism, margins=margins
    )
    found = empirical_privacy(nearest_tokens(view), sent.ids, margins=margins).content
    return {
        "EP nearest neighbour": found.value,
        "interval": {"low": found.low, "high": found.high},
        "changed": sent.changed,
    }


def decoder_row(bench, folder, seed, noise=None):
    """SST-2 on SmolLM2-135M: labels and head at home, 10 of 30 layers at the vendor."""
    learn, test = bench.reviews(seed, learn=300, test=200)
    vendor, bottom = bench.party(folder, "smollm2-135m", partition="u-shape", cut=15, last=5)
    eta, mechanism = noise_of(bottom, learn[0], noise)
    private = privatize(bottom, *learn, mechanism=mechanism)
    unseen = privatize(bottom, test[0], mechanism=mechanism)
    config, passes = tuning(len(learn[0]), seed)
    torch.manual_seed(seed)
    top = Top(bottom, PooledHead(bottom.hidden_size, 2, "last"), learning_rate=RATE)
    with job(vendor, bottom, config, task="hidden") as transport:
        losses = train_u_shape(transport, top, private, passes, language_model=False)
        logits_NC = torch.cat(predict_u_shape(transport, top, unseen))
    return {
        "UA": accuracy(logits_NC, test[1]),
        "eta": eta,
        "changed in test": unseen.changed,
        "last loss": sum(losses[-5:]) / len(losses[-5:]),
    }


def noise_of(bottom, texts, share):
    """Eta and mechanism at which this share of the texts' tokens changes; none without a share."""
    if share is None:
        return None, None
    ids_T = torch.cat(privatize(bottom, texts[:100], mechanism=None).ids)
    eta = NoiseSurvey(bottom.stack.embedding.weight, ids_T, samples=512).eta_for(share)
    return eta, Mechanism(eta=eta)


def wiki_row(bench, folder, seed, noise=None, *, split=True):
    """WikiText-2 on SmolLM2-135M, cut 6 and 2: nats a true token before and after tuning.

    What is predicted are always the true tokens; what is read has the noise.
    """
    vendor, bottom = bench.party(folder, "smollm2-135m", partition="u-shape", cut=6, last=2)
    learn = windows(bench, bottom.tokenizer, "valid", 96, seed)
    test = windows(bench, bottom.tokenizer, "test", 32, 0)
    config, passes = tuning(len(learn), seed, rate=5e-4, epochs=1)
    if not split:
        return centralised_wiki(bottom.cut, learn, test, bottom.tokenizer, config, passes)
    eta, mechanism = noise_of(bottom, learn, noise)
    private = privatize(bottom, learn, mechanism=mechanism)
    unseen = privatize(bottom, test, mechanism=mechanism)
    top = Top(bottom, None)

    with job(vendor, bottom, config, task="hidden") as transport:
        before = nats_per_token(transport, top, unseen)
        losses = train_u_shape(
            transport, top, private, passes, language_model=True, true_targets=True
        )
        after = nats_per_token(transport, top, unseen)
    return {
        "nats before": before,
        "nats after": after,
        "eta": eta,
        "changed in test": unseen.changed,
        "losses": {"all": losses},
    }


def nats_per_token(transport, top, unseen):
    """Of the true tokens, by a U-shape job."""
    logits, begin, total, count = predict_u_shape(transport, top, unseen), 0, 0.0, 0
    for logits_BLV in logits:
        ids = unseen.ids[begin : begin + len(logits_BLV)]
        begin += len(ids)
        ids_BL, mask_BL = unpack(torch.cat(ids)[:, None], tuple(map(len, ids)))
        tokens = int(mask_BL[:, 1:].sum())
        total += tokens * float(mean_token_loss(logits_BLV, ids_BL[..., 0], mask_BL))
        count += tokens
    return total / count


def windows(bench, tokenizer, part, count, seed):
    """Texts of about LENGTH tokens."""
    text = (bench.data / f"wikitext2_{part}.txt").read_text()
    for odd, even in ((" @-@ ", "-"), (" , ", ", "), (" . ", ". ")):
        text = text.replace(odd, even)
    lines = [line.strip() for line in text.splitlines() if len(line) > 400 and "<unk>" not in line]
    random.Random(seed).shuffle(lines)
    return [" ".join(line.split()[:LENGTH]) for line in lines[: bench.amount(count)]]


def centralised_wiki(cut, learn, test, tokenizer, config, passes):
    """The same layers tuned by an ordinary loop on the whole model."""
    model, _ = load_any("smollm2-135m")
    stack = stack_of(model)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        add_lora(stack, cut, config)

    def loss(texts):
        batch = tokenizer(texts, truncation=True, max_length=LENGTH, padding=True,
                          return_tensors="pt")  # fmt: skip
        inputs = stack.begin(batch["input_ids"], batch["attention_mask"])
        hidden_BLD = stack.run_layers(inputs.hidden_BLD, inputs.calls, 0, stack.layer_count)
        logits_BLV = lm_logits(stack, finish(stack, hidden_BLD))
        return mean_token_loss(logits_BLV, batch["input_ids"], batch["attention_mask"])

    @torch.no_grad()
    def score():
        tokens = [
            len(ids) - 1 for ids in tokenizer(test, truncation=True, max_length=LENGTH)["input_ids"]
        ]
        return sum(n * float(loss([text])) for n, text in zip(tokens, test, strict=True)) / sum(
            tokens
        )

    before = score()
    losses = fit(
        trained(model), lambda chosen: loss([learn[i] for i in chosen]), len(learn), config, passes
    )
    return {"nats before": before, "nats after": score(), "losses": {"all": losses}}


def plan(bench, part):
    """The rows of a part, most wanted first: (name, function)."""
    rows = []

    def add(name, function, *args, **options):
        rows.append((name, lambda folder: function(bench, folder, *args, **options)))

    for seed in SEEDS:
        if part == "sst2":
            plan_reviews(bench, add, seed)
        elif part == "fpb":
            news = bench.news(seed)
            add(f"no-noise-{seed}", two_part_row, news, seed)
            add(f"token-80-{seed}", two_part_row, news, seed, Mechanism(eta=80.0))
            add(f"CTI-80-{seed}", equal_privacy_row, news, seed, 80.0)
        elif part == "smollm2":
            for noise in (None, 0.1, 0.5):
                add(f"changed-{noise or 0}-{seed}", decoder_row, seed, noise)
        elif part == "wikitext" and seed == 0:
            add("centralised-0", wiki_row, seed, split=False)
            for noise in (None, 0.1, 0.3, 0.6):
                add(f"changed-{noise or 0}-{seed}", wiki_row, seed, noise)
        elif part == "leaks" and seed == 0:
            for cut in (0, *CUTS):
                add(f"no-noise-cut-{cut}", leak_row, seed, cut=cut)
                add(f"token-80-cut-{cut}", leak_row, seed, Mechanism(eta=80.0), cut=cut)
    return rows


def plan_reviews(bench, add, seed):
    data = bench.reviews(seed)
    add(f"no-noise-{seed}", two_part_row, data, seed)
    for eta in ETAS:
        add(f"token-{eta:g}-{seed}", two_part_row, data, seed, Mechanism(eta=eta))
    for eta in ETAS[1:]:
        add(f"CTI-{eta:g}-{seed}", equal_privacy_row, data, seed, eta)
    vector = Mechanism(eta=80.0, mode="vector")
    add(f"vector-80-{seed}", two_part_row, data, seed, vector)
    for cut in CUTS:
        add(f"no-noise-cut-{cut}-{seed}", two_part_row, data, seed, cut=cut)
        add(f"token-80-cut-{cut}-{seed}", two_part_row, data, seed, Mechanism(eta=80.0), cut=cut)
    if seed == 0:
        add("centralised-0", centralised_row, data, seed)
        block = Mechanism(eta=80.0, mode="block-output")
        add("block-output-80-cut-4-0", two_part_row, data, seed, block, cut=4)


def main():
    options = parse_options(__doc__, ("leaks", "sst2", "fpb", "wikitext", "smollm2"))
    bench = Bench(options.data, options.work, options.smoke)
    facts = {"batch": BATCH, "epochs": EPOCHS, "learning_rate": RATE, "max_length": LENGTH}
    run_parts("split", options, lambda part: plan(bench, part), facts=facts)


if __name__ == "__main__":
    main()
