"""Ordinary LoRA tuning of the whole model in one place: what split tuning is compared with."""

import torch
from peft import LoraConfig, inject_adapter_in_model

from blindtune.models.encoders import load_any
from blindtune.split.partition import PooledHead, default_pooling, feature_size, stack_of
from blindtune.training.optimizers import build_optimizer


def tune_whole_model(model, learn, test, config, passes, max_length) -> float:
    """Accuracy on the test texts after the plan's steps, by `transformers` and PEFT alone."""
    whole, tokenizer = load_any(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    stack = stack_of(whole)
    whole.requires_grad_(False)
    torch.manual_seed(config.seed)
    lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear")
    inject_adapter_in_model(lora, whole)
    head = PooledHead(feature_size(stack), len(learn.names), default_pooling(stack))
    trained = [p for p in whole.parameters() if p.requires_grad] + list(head.parameters())
    optimizer = build_optimizer(torch.nn.ParameterList(trained), config.learning_rate, 0.0)

    def outputs(texts) -> torch.Tensor:
        batch = tokenizer(texts, padding=True, truncation=True, max_length=max_length,
                          return_tensors="pt")  # fmt: skip
        states = whole(**batch, output_hidden_states=True).hidden_states[-1]
        return head(states, batch["attention_mask"])

    for step in passes.steps(len(learn.texts)):
        for chosen in step:
            loss = torch.nn.functional.cross_entropy(
                outputs([learn.texts[i] for i in chosen]), learn.labels_N[chosen]
            )
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        found = torch.cat([outputs([text]) for text in test.texts]).argmax(1)
    return float((found == test.labels_N).float().mean())
