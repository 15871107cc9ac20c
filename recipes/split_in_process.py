"""Split tuning, the whole protocol in one process: bottom, privatize, tune, predict, compare.

The vendor has a model; the customer has private sentences with classes. Here both are played by one
program, over the codec that the network uses, so that it can show what noise costs and buys: for
several strengths the utility accuracy (UA), and the empirical privacy (EP: the share of words that
the nearest-neighbour attack gets wrong), beside tuning the whole model in one place.

    python recipes/split_in_process.py --out demo-split
    python recipes/split_in_process.py --model DIR --train mine.csv --test held-out.csv --cut 6
"""

import argparse
import json
import time

import torch
from rich.console import Console

from blindtune.exchange.wire.transcript import Recorder
from blindtune.exchange.wire.transport import InProcessTransport
from blindtune.models.encoders import load_any
from blindtune.privacy.metric_dp import Mechanism
from blindtune.privacy.noise_level import NoiseSurvey
from blindtune.privacy.token_importance import ImportanceConfig
from blindtune.split.bottom import open_bottom, write_bottom
from blindtune.split.customer.private_states import privatize
from blindtune.split.customer.requests import PassConfig, new_token, open_job, predict, train
from blindtune.split.partition import Cut, stack_of
from blindtune.split.terms import TuningConfig
from blindtune.split.vendor.handler import Vendor
from nearest_attack import attacked
from side_by_side import as_table, common_options, labelled_texts
from whole_model import tune_whole_model


def main() -> None:
    """Run the protocol and leave split.json in the output directory."""
    options, begin, say = parse_options(), time.perf_counter(), Console().print
    out = options.out
    learn, test = labelled_texts(options)

    say("\n[bold]Vendor[/] cuts the model, writes the bottom package, and serves the top.")
    model, tokenizer = load_any(options.model)
    stack = stack_of(model)
    cut = Cut(layers=stack.layer_count, cut=options.cut)
    identity = write_bottom(
        model, tokenizer, out / "bottom", cut, max_length=options.max_length, overwrite=True
    )
    vendor = Vendor(stack, cut, identity, out / "vendor")

    say("[bold]Customer[/] opens the package and asks what noise does to its own words.")
    bottom = open_bottom(out / "bottom")
    words = torch.cat(privatize(bottom, learn.texts, mechanism=None).ids)
    survey = NoiseSurvey(bottom.stack.embedding.weight, words, samples=options.samples)
    etas = options.eta or [round(survey.eta_for(share), 1) for share in (0.1, 0.5, 0.9)]
    for eta in etas:
        say(f"  {survey.at(eta)}", style="dim")

    runs = [("no noise", None, None)]
    for eta in etas:
        runs.append((f"eta {eta:g} a token", Mechanism(eta=eta), None))
        runs.append((f"eta {eta:g} a token, CTI", Mechanism(eta=eta), ImportanceConfig()))
    say("[bold]Nobody[/] could do this: the whole model tuned on the texts as they are.")
    config, passes = plans(options)
    whole = tune_whole_model(options.model, learn, test, config, passes, options.max_length)
    rows = [{"run": "whole model, no split", "UA": whole}]
    for name, mechanism, importance in runs:
        say(f"[bold]Customer[/] privatizes once and tunes: {name}.")
        rows.append(
            {"run": name} | tune(vendor, bottom, learn, test, mechanism, importance, options)
        )
    (out / "split.json").write_text(json.dumps(rows, indent=2))
    say(as_table(rows, cut.cut, cut.layers))
    say(f"{time.perf_counter() - begin:,.0f} s in all.")


def tune(vendor, bottom, learn, test, mechanism, importance, options) -> dict:
    """One job from opening to predicting; accuracy, changed words, bytes and seconds."""
    begin, recorder, (config, passes) = time.perf_counter(), Recorder(), plans(options)
    private = privatize(
        bottom, learn.texts, learn.labels_N, mechanism=mechanism, importance=importance,
        classes=len(learn.names),
    )  # fmt: skip
    unseen = privatize(bottom, test.texts, mechanism=mechanism)
    with vendor.session("customer") as handler:
        job = open_job(
            lambda: InProcessTransport(handler, tap=recorder),
            bottom,
            new_token(),
            config,
            task="classification",
            outputs=len(learn.names),
        )
        losses = train(job, private, passes)
        logits_NC = predict(job, unseen)
        job.close()
    tokens = sum(map(len, private.states)) * options.epochs + sum(map(len, unseen.states))
    return {
        "UA": float((logits_NC.argmax(1) == test.labels_N).float().mean()),
        "EP, training texts": attacked(bottom, private, mechanism, options.attacked),
        "EP, texts to predict": attacked(bottom, unseen, mechanism, options.attacked),
        "last loss": losses[-1],
        "bytes a token": len(recorder.transcript().wire()) / tokens,
        "seconds": time.perf_counter() - begin,
    }


def plans(options) -> tuple[TuningConfig, PassConfig]:
    """What is asked of the vendor, and how the customer goes through its texts."""
    config = TuningConfig(learning_rate=options.learning_rate, seed=options.seed)
    return config, PassConfig(epochs=options.epochs, seed=options.seed)


def parse_options() -> argparse.Namespace:
    """Those of both recipes, and of this one."""
    parser = common_options(__doc__)
    parser.add_argument("--eta", type=float, nargs="*", help="per token; default: by a survey")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--samples", type=int, default=256, help="of the noise survey")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
