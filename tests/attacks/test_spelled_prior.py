"""A language model of other words: what it says of words by its own spelling of them."""

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from blindtune.attacks.adversary import Candidates
from blindtune.attacks.language_prior import NO_WORD, CausalPrior, JointPrior, decode
from blindtune.attacks.spelled_prior import SpelledPrior, spelling_of
from blindtune.models.decoder import Decoder
from blindtune.models.encoders import load_any
from tiny_models import tiny_model, tiny_tokenizer

SAME = tuple((word,) for word in range(128))
LONG = ((), (10,), (20, 21), (30, 31, 32), (40,), (50, 51))


def test_words_of_one_token_are_said_as_by_a_model_of_these_words():
    decoder = Decoder(tiny_model("smollm2"))
    draw = torch.Generator().manual_seed(0)
    before_BL = torch.randint(3, 128, (5, 6), generator=draw)
    word_BK = torch.randint(3, 128, (5, 4), generator=draw)
    for begin in (None, 1):
        torch.testing.assert_close(
            SpelledPrior(decoder, SAME, begin).log_probabilities(before_BL, word_BK),
            CausalPrior(decoder, begin).log_probabilities(before_BL, word_BK),
            atol=1e-4, rtol=1e-4,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["smollm2", "gpt2", "bloom"])
def test_a_texts_words_add_up_to_what_the_model_says_of_its_spelling(name):
    model = tiny_model(name)
    prior, text = SpelledPrior(Decoder(model), LONG, begin_id=1), [3, 1, 2, 3, 5, 4]
    total = 0.0
    for k, word in enumerate(text):
        said = prior.log_probabilities(torch.tensor([text[:k]]).long(), torch.tensor([[word]]))
        total += float(said)
    ids = [1, *(token for word in text for token in LONG[word])]
    with torch.no_grad():
        log_TV = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(1)
    true = sum(float(log_TV[t, ids[t + 1]]) for t in range(len(ids) - 1))
    assert total == pytest.approx(true, abs=1e-3)


def test_beginnings_of_other_lengths_are_read_together():
    prior = SpelledPrior(Decoder(tiny_model("smollm2")), LONG, begin_id=1)
    before_BL = torch.tensor([[1, 1], [3, 2], [0, 1], [2, 3]])  # of 2, 5, 1 and 5 tokens
    word_BK = torch.tensor([[1, 2, 3]] * 4)
    whole = prior.log_probabilities(before_BL, word_BK)
    alone = [prior.log_probabilities(before_BL[i : i + 1], word_BK[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(whole, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_words_that_are_never_said_and_beginnings_without_tokens():
    prior = SpelledPrior(Decoder(tiny_model("smollm2")), LONG)
    said = prior.log_probabilities(torch.tensor([[0, 0]]), torch.tensor([[0, 1, 99]]))
    assert said.tolist() == [[NO_WORD, 0.0, NO_WORD]]
    after = prior.log_probabilities(torch.tensor([[1, 99]]), torch.tensor([[0, 1, 99]]))
    assert after[0, 1] < 0
    assert after[0, 0] == after[0, 2] == NO_WORD


def test_a_long_text_is_read_by_its_end():
    prior = SpelledPrior(Decoder(tiny_model("gpt2", n_positions=8)), LONG, begin_id=1)
    said = prior.log_probabilities(torch.full((1, 9), 3), torch.tensor([[1, 2]]))
    assert bool((said < 0).all())


def test_a_tokenizers_words_are_spelled_as_they_stand_in_a_text():
    """Two real tokenizers: of pieces of words (MiniLM), and of bytes (SmolLM2)."""
    words, model = (load_any(name)[1] for name in ("minilm", "smollm2-135m"))
    spelling = spelling_of(words, model)
    assert len(spelling) == len(words.get_vocab())
    ids = words("the film is unwatchably bad, a mess", add_special_tokens=False)["input_ids"]
    tokens = [token for word in ids for token in spelling[word]]
    assert model.decode(tokens) == " the film is unwatchably bad, a mess"
    assert spelling[words.cls_token_id] == ()


def test_a_tokenizer_that_begins_with_a_space_of_its_own():
    """As SentencePiece's do: words that stand after others have one space, their endings none."""
    words = load_any("minilm")[1]
    model = Tokenizer(models.BPE({"<unk>": 0, "▁": 1, "▁a": 2, "▁good": 3, "ly": 4, "a": 5,
                                  "g": 6, "o": 7, "d": 8, "l": 9, "y": 10, "▁g": 11, "▁go": 12,
                                  "▁goo": 13},
                                 [("▁", "a"), ("▁", "g"), ("▁g", "o"), ("▁go", "o"),
                                  ("▁goo", "d"), ("l", "y")], unk_token="<unk>"))  # fmt: skip
    model.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    spelling = spelling_of(words, PreTrainedTokenizerFast(tokenizer_object=model))
    good, ly = words.convert_tokens_to_ids(["good", "##ly"])
    assert spelling[good] == (3,)
    assert spelling[ly] == (4,)


def test_a_model_of_other_words_reads_what_fits_together():
    """Trained on words in pairs, it chooses the second by the first, through the spelling."""
    model = tiny_model("smollm2")
    texts = torch.tensor([[1, 20, 21, 60], [1, 30, 31, 70]])  # spelled words 2, 3; or 4, 5
    spelling = ((), (), (20, 21), (60,), (30, 31), (70,))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        model(input_ids=texts, labels=texts).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    prior = SpelledPrior(Decoder(model.eval()), spelling, begin_id=1)
    words = torch.tensor([[2, 4], [3, 5]])
    for first, second in ((2, 3), (4, 5)):
        seen = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
        seen[0, 0 if first == 4 else 1] = -9.0  # the first word is known, the second is not
        found = Candidates(words=(words,), log_likelihoods=(seen,))
        assert decode(found, prior)[0].tolist() == [first, second]


def test_the_tiny_tokenizer_spells_its_own_words():
    tokenizer = tiny_tokenizer()
    spelling = spelling_of(tokenizer, tokenizer)
    said = tokenizer("good film", add_special_tokens=False)["input_ids"]
    tokens = [token for word in said for token in spelling[word]]
    assert tokenizer.decode(tokens).split() == tokenizer.decode(said).split()


def test_priors_that_are_joined_must_agree():
    decoder = Decoder(tiny_model("smollm2"))
    one, two = CausalPrior(decoder, 1), SpelledPrior(decoder, SAME, 2)
    before_BL, word_BK = torch.tensor([[5, 6], [7, 8]]), torch.tensor([[9, 10], [11, 12]])
    joined = JointPrior(one, two)
    torch.testing.assert_close(
        joined.log_probabilities(before_BL, word_BK),
        one.log_probabilities(before_BL, word_BK) + two.log_probabilities(before_BL, word_BK),
    )
    joined.forget()
    assert one._reading._cache is two._reading._cache is None
