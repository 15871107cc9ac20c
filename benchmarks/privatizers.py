"""Privatizers side by side at equal empirical privacy: does a better one than SAP's exist?

    python benchmarks/privatizers.py --data DIR --work DIR [--smoke] [PART ...]

The tasks are those of `split.py sst2` and `fpb`: MiniLM, two-part, cut 0, every token replaced by a
word. The strength of each privatizer is set so that as many tokens of the test texts come out
changed as of d_chi at eta 80: the EP of the nearest neighbour is equal. The accuracy of d_chi
itself, with and without CTI, is in split-sst2.json and split-fpb.json.

sst2, fpb: accuracy (UA) of each.
leaks, leaks-fpb: what attackers read of 300 test texts (other ones with every seed), and how fast
    they are replaced. Bayes' rule knows the mechanism and how frequent words are in other texts of
    the task; with trigrams it chooses among its likeliest words by the trigrams of these texts, as
    far as a rehearsal on some of them says that this helps. "rare" are tokens outside the 200
    commonest words of public text: a privatizer that changes nothing but function words has an EP
    too.
language, language-fpb: the same of 40 texts and with a language model (SmolLM2-135M, which spells
    MiniLM's words in its own) beside trigrams.

d_chi, exponential: `Mechanism` in token and exponential mode.
vector: d_chi's noise, and the sum goes out as it is; Bayes' rule has the noise's density.
gaussian: the control: a normal vector as long as d_chi's noise, then the nearest word.
shifted: in the way of PrivTune (arXiv 2512.08809): d_chi's noise with its mean moved towards the
    words that are `HOPS` hops away, and scaled by importance; then the nearest word. Assumed, as
    the paper's details were not at hand: hops in the graph of the `NEAR` nearest words, the mean of
    the words at exactly that distance as the aim, half of the way there, importance as in
    `privacy.word_groups` (rare words matter), noise and shift times 1 - importance / 2.
exponential-equal: the same at a smaller eta: the strongest attack reads as much as of d_chi.
context: the exponential mechanism on other vectors: a word's contextual vector
    (`split.customer.word_vectors`) of length 1.
meaning: the same, each vector times the square root of the word's importance.
groups: word groups as coarse as `split-tune` makes them without being told; no noise.
fine: finer ones: on reviews, the strongest attack of "leaks" reads as much as of d_chi.
CTI: contributing tokens spared in training texts, at equal EP in training.
denoised: what is sent is the posterior mean of the embedding, given the word that was drawn, with
    word frequencies of public text (WikiText, speeches).
"""

import time
from contextlib import contextmanager
from functools import cache

import torch

from blindtune.attacks.adversary import Candidates, StatesView
from blindtune.attacks.embedding_inversion import nearest_tokens
from blindtune.attacks.language_prior import JointPrior, NgramPrior, best_weight, decode
from blindtune.attacks.likelihoods import vector_candidates
from blindtune.evaluation.audits.language_attack import open_prior, weighed
from blindtune.evaluation.leakage.empirical_privacy import contributing_masks, empirical_privacy
from blindtune.models.encoders import load_any
from blindtune.models.margins import margins_of
from blindtune.privacy.channel import CountingConfig, counted_channel
from blindtune.privacy.draw_level import DrawSurvey
from blindtune.privacy.entropy import system_uniforms
from blindtune.privacy.metric_dp import Mechanism, d_chi_noise
from blindtune.privacy.nearest import NearestRows
from blindtune.privacy.word_groups import GroupingConfig
from blindtune.privacy.word_sampling import WordSampler
from blindtune.split.customer.private_states import privatize
from blindtune.split.customer.requests import predict, train
from figures import part as part_of
from flops import counter
from rows import parse_options, run_parts
from split import (
    BATCH,
    CTI,
    EPOCHS,
    LENGTH,
    RATE,
    SEEDS,
    Bench,
    accuracy,
    job,
    some_of,
    tuning,
)

PARTS = ("leaks", "sst2", "leaks-fpb", "fpb", "language", "language-fpb", "cost")
ETA, SHARE = 80.0, {"sst2": 0.397, "fpb": 0.372}  # of d_chi; tokens it changes (split-TASK.json)
# Tokens that the exponential mechanism must change, so that the strongest attack here reads as many
# of its words as of d_chi's: its words lie nearer, and tell more where they are others.
EQUAL = {"sst2": 0.455, "fpb": 0.44}
DRAWN = ("exponential", "context", "meaning")
GROUPED = ("groups", "fine")
KINDS = ("d_chi", *DRAWN, "gaussian", "shifted", *GROUPED)
# Read by a language model too: (kind, whether at d_chi's EP under the attacks of "leaks").
READ = ("groups", "fine", "d_chi", "exponential-equal")
MODEL, READ_TEXTS, READ_SECONDS = "smollm2-135m", 40, 700.0
WRONG = {"groups": GroupingConfig.wrong_guesses, "fine": 0.6}  # guesses by frequency
LIKELY, DRAWS = 1000, 8  # words that Bayes' rule considers, and draws for each to denoise
ATTACKERS_DRAWS = 32  # the attacker's draws for each
ATTACKED, FREQUENT = 300, 200  # test texts; words that are not rare
KEPT, REHEARSED = 16, 24  # candidates of a token; texts on which the attacker rehearses
NEAR, HOPS, PIVOT = 8, 2, 1e-3
SAMPLE, HALVINGS = 2000, 8  # tokens and steps of the search for a strength


class Vocabulary:
    """MiniLM's words, and every way to replace them."""

    def __init__(self, bench):
        model, self.tokenizer = load_any("minilm")
        self.table_VD = model.get_input_embeddings().weight.detach().clone()
        self.margins = margins_of(self.tokenizer)
        self.special = torch.tensor([*self.margins.before, *self.margins.after])
        self.vector_VD, count_V, _ = bench.words()
        self.public_V = count_V.float()
        self.rows = NearestRows(self.table_VD)
        share_V = self.public_V / self.public_V.sum()
        self.importance_V = (PIVOT / (PIVOT + share_V)).square()
        self.shift_path = bench.work / "shift.pt"
        self.groups = cache(lambda wrong: bench.groups(GroupingConfig(wrong_guesses=wrong)))

    def vectors(self, kind):
        """Between what the exponential mechanism takes its distances."""
        if kind == "exponential":
            return self.table_VD
        vector_VD = torch.nn.functional.normalize(self.vector_VD.float(), dim=1)
        return vector_VD if kind == "context" else vector_VD * self.importance_V[:, None].sqrt()

    def draw(self, kind, strength, ids_N):
        """A word for every token, at a strength: eta, or for all noises D over their mean norm.

        Of groups the share of wrong guesses.
        """
        if kind in GROUPED:
            return self.groups(strength).apply(ids_N)
        if kind in DRAWN:
            return WordSampler(self.vectors(kind)).draw(ids_N, strength, system_uniforms)
        word_ND = self.table_VD[ids_N].double()
        count, width = word_ND.shape
        if kind == "gaussian":
            noise_ND = torch.randn(count, width, dtype=torch.float64) * width**0.5 / strength
        else:
            noise_ND = d_chi_noise(count, width, strength, system_uniforms)
        if kind == "shifted":
            less_N1 = 1 - self.importance_V[ids_N][:, None].double() / 2
            noise_ND = less_N1 * (noise_ND + self.shift()[ids_N] / 2)
        return self.rows.find(word_ND + noise_ND)

    def shift(self):
        """From every word to the mean of those that are exactly `HOPS` hops away [V, D]."""
        if not self.shift_path.exists():
            torch.save(self._shift(), self.shift_path)
        return torch.load(self.shift_path)

    def _shift(self):
        squared_V = self.table_VD.square().sum(1)
        near = []
        for part_CD in self.table_VD.split(1024):
            gap_CV = torch.addmm(squared_V, part_CD, self.table_VD.T, alpha=-2)
            near.append(gap_CV.topk(NEAR + 1, largest=False).indices[:, 1:])
        near_VK = torch.cat(near)
        shifts = []
        for word in range(len(near_VK)):
            seen = {word}
            edge = {word}
            for _ in range(HOPS):
                edge = set(near_VK[list(edge)].flatten().tolist()) - seen
                seen |= edge
            aims = list(edge) or [word]
            shifts.append(self.table_VD[aims].mean(0) - self.table_VD[word])
        return torch.stack(shifts).double()

    def channel(self, kind, strength, word_K, sent_U, draws):
        """log P(y | x) [U, K]: computed for what is drawn, counted for noise."""
        if kind in GROUPED:
            mine_UK = self.groups(strength).apply(word_K) == sent_U[:, None]
            return torch.where(mine_UK, 0.0, -torch.inf)
        if kind in DRAWN:
            sampler = WordSampler(self.vectors(kind))
            return sampler.log_probabilities(word_K, strength, sent_U).T.float()
        drawn_MK = self.draw(kind, strength, word_K.repeat(draws)).view(draws, -1)
        spread = (self.table_VD.shape[1] + 1) / strength**2
        distance_UK = torch.cdist(self.table_VD[sent_U].double(), self.table_VD[word_K].double())
        near_UK = torch.exp(-distance_UK.square() / (8 * spread))
        config = CountingConfig(draws=draws)
        return counted_channel(drawn_MK, sent_U, near_UK, len(self.table_VD), config)

    def posterior(self, kind, strength, count_V, sent_U, draws=DRAWS):
        """log P(x | y) [U, K] by word frequencies, log P(y | x) [U, K], and the words x [K]."""
        prior_V = ((count_V + 0.5) / (count_V.sum() + 0.5 * len(count_V))).log()
        prior_V[self.special] = -torch.inf
        likely = len(prior_V) if kind in GROUPED else LIKELY
        word_K = torch.cat([prior_V.topk(likely).indices, sent_U]).unique()
        channel_UK = self.channel(kind, strength, word_K, sent_U, draws)
        return (channel_UK + prior_V[word_K]).log_softmax(1), channel_UK, word_K

    def encoded(self, texts):
        found = self.tokenizer(list(texts), truncation=True, max_length=LENGTH)["input_ids"]
        return tuple(torch.tensor(ids) for ids in found)

    def content(self, ids):
        ids_N = torch.cat(ids)
        return ids_N[~torch.isin(ids_N, self.special)]

    def replaced(self, kind, strength, ids, spared=None):
        """Texts with every content token replaced, but for those that are spared."""
        ids_N = torch.cat(ids)
        mine = ~torch.isin(ids_N, self.special)
        if spared is not None:
            mine &= ~torch.cat(spared)
        sent_N = ids_N.clone()
        sent_N[mine] = self.draw(kind, strength, ids_N[mine])
        return sent_N.split([len(text) for text in ids])


class Task:
    """Texts of a seed as ids, and how many of their tokens shall come out changed."""

    def __init__(self, bench, words, name, seed, *, equal=False):
        self.name, self.share = name, (EQUAL if equal else SHARE)[name]
        read = {"sst2": bench.reviews, "fpb": bench.news}[name]
        (texts, self.labels), (tested, self.test_labels) = read(seed)
        self.classes = int(self.labels.max()) + 1

        self.learn, self.test = words.encoded(texts), words.encoded(tested)
        self.used, size = [*texts, *tested], len(words.table_VD)
        self.spared = contributing_masks(
            self.learn,
            self.labels,
            words.margins,
            CTI,
            classes=self.classes,
            vocabulary_size=size,
        )


def changed_strength(words, kind, ids_N, share):
    """At which this share of tokens comes out changed."""
    if kind in DRAWN:
        return DrawSurvey(words.vectors(kind), ids_N, samples=8192).eta_for(share)
    sample = ids_N[:: max(1, len(ids_N) // SAMPLE)]
    low, high = ETA / 4, 4 * ETA
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        changed = float((words.draw(kind, middle, sample) != sample).float().mean())
        low, high = (middle, high) if changed > share else (low, middle)
    return (low * high) ** 0.5


def strength_of(words, task, kind, spared=None):
    """What a row is run at; None: too many tokens are spared for the share that shall change."""
    if kind in GROUPED:
        return WRONG[kind]
    if kind in ("d_chi", "gaussian", "vector"):
        return ETA
    if spared is None:
        return changed_strength(words, kind, words.content(task.test), task.share)
    ids_N = torch.cat(task.learn)
    content_N = ~torch.isin(ids_N, words.special)
    noised_N = content_N & ~torch.cat(spared)
    share = task.share * float(content_N.sum() / noised_N.sum())
    if not share < 0.98:
        return None
    return changed_strength(words, kind, ids_N[noised_N], share)


def bayes(words, kind, strength, sent, count_V):
    """The likeliest words behind each that came out, by these word frequencies."""
    sent_U, place_N = torch.cat(sent).unique(return_inverse=True)
    log_UK, channel_UK, word_K = words.posterior(
        kind, strength, count_V, sent_U, draws=ATTACKERS_DRAWS
    )
    best_UC = log_UK.topk(KEPT).indices
    likely_UC, word_UC = channel_UK.gather(1, best_UC), word_K[best_UC]
    special_U = torch.isin(sent_U, words.special)
    word_UC[special_U] = sent_U[special_U, None]
    likely_UC[special_U, 1:] = -torch.inf
    likely_UC[special_U, 0] = 0.0
    lengths = [len(text) for text in sent]
    return Candidates(
        words=word_UC[place_N].split(lengths), log_likelihoods=likely_UC[place_N].split(lengths)
    )


def rehearsal(words, kind, strength, texts, count_V):
    """Some of the other texts, and what their replaced words may have been."""
    known = some_of(texts, min(REHEARSED, len(texts) // 2))
    return known, bayes(words, kind, strength, words.replaced(kind, strength, known), count_V)


def trigrams(words, known, texts):
    """Of the other texts but those that the rehearsal is on."""
    hidden = {id(text) for text in known}
    return NgramPrior([t for t in texts if id(t) not in hidden], len(words.table_VD))


@contextmanager
def denoised(bottom, words, kind, strength, sent):
    """The customer's embedding gives the posterior mean for every word that was drawn."""
    sent_U = torch.cat(sent).unique()
    sent_U = sent_U[~torch.isin(sent_U, words.special)]
    log_UK, _, word_K = words.posterior(kind, strength, words.public_V, sent_U)
    weight = bottom.stack.embedding.weight
    before = weight[sent_U].clone()
    weight[sent_U] = log_UK.exp() @ words.table_VD[word_K]
    yield
    weight[sent_U] = before


@torch.no_grad()
def states_of(bottom, words, kind, strength, sent, labels, denoise):
    if not denoise:
        return privatize(bottom, sent, labels, mechanism=None)
    with denoised(bottom, words, kind, strength, sent):
        return privatize(bottom, sent, labels, mechanism=None)


def row(bench, words, folder, name, seed, kind, cti=False, denoise=False, equal=False):
    """UA of one job."""
    task = Task(bench, words, name, seed, equal=equal)
    spared = task.spared if cti else None
    strength = strength_of(words, task, kind, spared)
    if strength is None:
        return {"UA": None, "impossible": True}
    sent = words.replaced(kind, strength, task.learn, spared)
    asked = words.replaced(kind, strength, task.test)
    vendor, bottom = bench.party(folder)
    private = states_of(bottom, words, kind, strength, sent, task.labels, denoise)
    unseen = states_of(bottom, words, kind, strength, asked, None, denoise)
    config, passes = tuning(len(task.learn), seed)
    with job(vendor, bottom, config, task="classification", outputs=task.classes) as transport:
        losses = train(transport, private, passes)
        logits_NC = predict(transport, unseen, batch_size=32)
    changed = [
        empirical_privacy(read, truth, margins=words.margins).content.value
        for read, truth in ((asked, task.test), (sent, task.learn))
    ]
    return {
        "UA": accuracy(logits_NC, task.test_labels),
        "strength": strength,
        "changed in test": changed[0],
        "changed in training": changed[1],
        "last loss": sum(losses[-10:]) / len(losses[-10:]),
    }


def attacked_texts(tests, count, seed):
    """Other ones with every seed, as far as there are as many."""
    return some_of(tests, min(count, len(tests)) * len(SEEDS))[seed :: len(SEEDS)]


def by_density(bottom, texts, public):
    """Of vector mode: the nearest neighbours, Bayes' candidates, and seconds to make its states."""
    mechanism = Mechanism(eta=ETA, mode="vector")
    start = time.perf_counter()
    states = privatize(bottom, texts, mechanism=mechanism).states
    took = time.perf_counter() - start
    view = StatesView(
        model=bottom.stack, cut=0, states=states, mechanism=mechanism, public=public,
        margins=bottom.margins,
    )  # fmt: skip
    return nearest_tokens(view), vector_candidates(view, KEPT), took


def leak_row(bench, words, name, called, seed, folder, *, reads):
    """EP of three attackers, of all tokens and of rare words, and how fast words are replaced.

    A language model `reads` too, of fewer texts.
    """
    kind = called.removesuffix("-equal")
    task = Task(bench, words, name, seed, equal=called != kind)
    strength = strength_of(words, task, kind)
    truth = attacked_texts(task.test, READ_TEXTS if reads else ATTACKED, seed)
    others = words.encoded(bench.other_texts(name, task.used))
    if kind == "vector":
        bottom, known = bench.party(folder)[1], some_of(others, min(REHEARSED, len(others) // 2))
        sent, likely, took = by_density(bottom, truth, others)
        rehearsed = by_density(bottom, known, others)[1]
    else:
        words.replaced(kind, strength, truth[:1])  # whatever is made once
        start = time.perf_counter()
        sent = words.replaced(kind, strength, truth)
        took = time.perf_counter() - start
        used = bench.other_counts(name, words.tokenizer, task.used, len(words.table_VD))
        likely = bayes(words, kind, strength, sent, used.float())
        known, rehearsed = rehearsal(words, kind, strength, others, used.float())
    counted = trigrams(words, known, others)
    weight = best_weight(rehearsed, known, counted)
    guesses = {
        "nearest neighbour": sent,
        "Bayes": likely.first(),
        "Bayes, trigrams": decode(likely, counted, weight=weight),
    }
    said = ""
    if reads:
        prior = JointPrior(open_prior(MODEL, bench.party(folder)[1], others), counted)
        seconds = READ_SECONDS / 20 if bench.smoke else READ_SECONDS
        read, said = weighed(likely, rehearsed, known, prior, seconds)
        guesses["Bayes, language model"] = read
    frequent = words.public_V.topk(FREQUENT).indices
    masks = [torch.isin(ids, frequent) for ids in truth]
    found = {"strength": strength, "tokens a second": len(words.content(truth)) / took}
    found |= {"note": said} if said else {}
    for attack, guess in guesses.items():
        score = empirical_privacy(guess, truth, margins=words.margins, contributing=masks)
        found[attack] = {
            "EP": score.content.value, "low": score.content.low, "high": score.content.high,
            "rare": score.other.value,
        }  # fmt: skip
    return found


def cost_row(bench, words, kind):
    """FLOPs of replacing the words of the attacked texts, but for what is made once."""
    texts = attacked_texts(Task(bench, words, "sst2", 0).test, ATTACKED, 0)
    strength = part_of("privatizers-leaks")["rows"][f"{kind}-0"]["strength"]
    words.replaced(kind, strength, texts[:1])
    with counter() as count:
        words.replaced(kind, strength, texts)
    return {"flops": count.get_total_flops(), "tokens": len(words.content(texts))}


def plan(bench, part):
    """The rows, most wanted first: (name, function)."""
    words = Vocabulary(bench)
    if part == "cost":
        return [(kind, lambda _, kind=kind: cost_row(bench, words, kind)) for kind in KINDS]
    task = part.partition("-")[2] or "sst2"
    if part.startswith(("leaks", "language")):
        reads = part.startswith("language")
        return [
            (
                f"{called}-{seed}",
                lambda folder, called=called, seed=seed: leak_row(
                    bench, words, task, called, seed, folder, reads=reads
                ),
            )
            for seed in SEEDS
            for called in (READ if reads else (*KINDS, "exponential-equal", "vector"))
        ]
    rows = []

    def add(name, *args, **options):
        rows.append((name, lambda folder: row(bench, words, folder, part, *args, **options)))

    for seed in SEEDS:
        for kind in KINDS[1:]:
            add(f"{kind}-{seed}", seed, kind)
        for kind in ("exponential", "d_chi"):
            add(f"{kind}-denoised-{seed}", seed, kind, denoise=True)
        add(f"exponential-CTI-{seed}", seed, "exponential", cti=True)
        add(f"exponential-equal-{seed}", seed, "exponential", equal=True)
    return rows


def main():
    options = parse_options(__doc__, PARTS)
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.data, options.work, options.smoke)
    facts = {"batch": BATCH, "epochs": EPOCHS, "learning_rate": RATE, "max_length": LENGTH}
    run_parts("privatizers", options, lambda part: plan(bench, part), facts=facts)


if __name__ == "__main__":
    main()
