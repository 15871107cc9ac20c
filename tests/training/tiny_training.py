"""Tiny models and data for the training tests; as a script, one run of `fit` in its own process."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from blindtune.training.dataset import TokenDataset
from blindtune.training.loop import RunConfig, TrainingConfig, fit

VOCABULARY = 61


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def gpt2(dropout=0.0):
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=64,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def gemma2():
    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            sliding_window=4,
            final_logit_softcapping=3.0,
        )
    )


def opt():
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            max_position_embeddings=64,
            dropout=0.0,
        )
    )


FAMILIES = {"llama": llama, "gpt2": gpt2, "gemma2": gemma2, "opt": opt}


def dataset(examples, seed):
    """Examples of 5..12 tokens whose first tokens are context: padding and uneven targets."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    ids = [
        torch.randint(2, VOCABULARY, (draw(5, 13),), generator=generator) for _ in range(examples)
    ]
    labels = [row.clone() for row in ids]
    for row in labels:
        row[: draw(1, 4)] = -100
    return TokenDataset(ids, labels)


def freeze_all_but(model, part):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
    return model


def copy_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def main(options):
    """One run: options are the model, the configs, the folder, and the step to die at."""
    model = freeze_all_but(
        gpt2(options["dropout"]) if options["model"] == "gpt2" else llama(), options["part"]
    )

    def die(report):
        if report.step == options.get("die_at"):
            os.kill(os.getpid(), signal.SIGKILL)

    result = fit(
        model,
        dataset(21, seed=1),
        dataset(7, seed=2),
        TrainingConfig(**options["config"]),
        options["out"],
        run=RunConfig(**options["run"]),
        on_progress=die,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(model.state_dict(), Path(options["out"]) / "final.pt")
        summary = {
            "train_loss": result.train_loss,
            "validation_loss": result.validation_loss,
            "tokens": result.tokens,
        }
        (Path(options["out"]) / "result.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
