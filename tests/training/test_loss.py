import pytest
import torch
from tiny_training import FAMILIES, VOCABULARY, dataset, llama
from torch import nn

from blindtune.training.batches import collate
from blindtune.training.loss import accepts_logits_to_keep, count_targets, next_token_loss


class PlainForward(nn.Module):
    """A model whose forward cannot restrict the head."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return self.model(input_ids, attention_mask=attention_mask, use_cache=use_cache)


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("examples", [1, 5])
def test_equals_the_loss_of_transformers(family, examples):
    model = FAMILIES[family]().eval()
    batch = collate([dataset(examples, seed=3)[i] for i in range(examples)], pad_token_id=1)
    count = count_targets(batch["labels"])
    assert accepts_logits_to_keep(model)
    ours = next_token_loss(model, batch, logits_to_keep=True) / count
    plain = model(**batch).loss
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(gradients(ours, model), gradients(plain, model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_falls_back_to_all_logits():
    model = PlainForward(llama().eval())
    batch = collate([dataset(4, seed=3)[i] for i in range(4)], pad_token_id=1)
    assert not accepts_logits_to_keep(model)
    torch.testing.assert_close(
        next_token_loss(model, batch, logits_to_keep=False),
        next_token_loss(model.model, batch, logits_to_keep=True),
    )


def test_head_runs_only_where_some_row_has_a_label():
    model = llama()
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    labels = torch.full((2, 10), -100)
    labels[0, 4], labels[1, 7] = 5, 6
    batch = {"input_ids": torch.randint(0, VOCABULARY, (2, 10)), "labels": labels}
    next_token_loss(model, batch, logits_to_keep=True)
    assert seen == [(2, 2, VOCABULARY)]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # read by peft
def test_lora_model_is_looked_through():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert accepts_logits_to_keep(model)
    batch = collate([dataset(3, seed=3)[i] for i in range(3)], pad_token_id=1)
    model.eval()
    torch.testing.assert_close(
        next_token_loss(model, batch, logits_to_keep=True) / count_targets(batch["labels"]),
        model(**batch).loss,
    )
