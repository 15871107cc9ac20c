"""Word groups: what is joined, what a guess is worth, and that members cannot be told apart."""

import pytest
import torch

from blindtune.errors import ConfigError, DataError
from blindtune.privacy import word_groups
from blindtune.privacy.word_groups import GroupingConfig, WordGroups, group_words


def clustered(seed=0, clusters=40, size=5):
    """Words in tight clusters far from each other, with frequencies that fall like Zipf's."""
    generator = torch.Generator().manual_seed(seed)
    centre = 5 * torch.randn(clusters, 16, generator=generator)
    order = torch.randperm(clusters * size, generator=generator)
    vector_VD = (centre.repeat(size, 1) + 0.1 * torch.randn(200, 16, generator=generator))[order]
    count_V = (10_000 / (1 + torch.arange(200))).long()
    return vector_VD, count_V, (torch.arange(200) % clusters)[order]


def test_words_that_mean_the_same_are_joined_first():
    vector_VD, count_V, cluster_V = clustered()
    config = GroupingConfig(wrong_guesses=0.3, frequent=200, pivot=1.0)
    groups = group_words(vector_VD, count_V, config=config)
    assert len(groups.representatives) < 200
    assert torch.equal(cluster_V[groups.representative_V], cluster_V)


@pytest.mark.parametrize("wanted", [0.2, 0.5, 0.8])
def test_guessing_by_frequency_is_wrong_as_often_as_wanted(wanted):
    vector_VD, count_V, _ = clustered()
    config = GroupingConfig(wrong_guesses=wanted, frequent=200)
    groups = group_words(vector_VD, count_V, config=config)
    share = groups.best_guess_share(count_V)
    text = torch.multinomial(
        count_V.double(), 20_000, replacement=True, generator=torch.Generator().manual_seed(1)
    )
    right = (groups.best_guesses(count_V)[text] == text).double().mean().item()
    assert share <= 1 - wanted < share + 0.15
    assert abs(right - share) < 0.02


def test_the_best_guess_is_the_best_of_all_guesses():
    """A brute force over the members of every group."""
    vector_VD, count_V, _ = clustered()
    groups = group_words(vector_VD, count_V, config=GroupingConfig(frequent=100))
    other_V = count_V.flip(0)  # an adversary whose text is another
    best = sum(
        int(other_V[groups.representative_V == word].max()) for word in groups.representatives
    )
    assert groups.best_guess_share(other_V) == pytest.approx(best / int(other_V.sum()))
    guess_V = groups.best_guesses(other_V)
    assert torch.equal(groups.representative_V[guess_V], groups.representative_V)


def test_frequent_words_that_carry_little_are_joined_before_others_as_near():
    """Two pairs at equal distance: the pivot makes the frequent pair the cheaper one."""
    vector_VD = torch.tensor([[0.0, 0], [1, 0], [0, 50], [1, 50], [90, 0]])
    count_V = torch.tensor([5000, 4000, 50, 40, 10])
    config = GroupingConfig(wrong_guesses=0.1, frequent=5, pivot=1e-3)
    assert group_words(vector_VD, count_V, config=config).representative_V.tolist() == [
        0, 0, 2, 3, 4,
    ]  # fmt: skip


def test_rare_words_are_grouped_among_themselves_and_special_ones_stay_alone():
    vector_VD, count_V, _ = clustered()
    special = [0, 7, 150]
    found = group_words(
        vector_VD, count_V, special, GroupingConfig(frequent=50, rare_size=4)
    ).representative_V
    rare = torch.arange(200) > 51  # 50 frequent ones and two special ones come before
    rare[150] = False
    assert set(found[rare].tolist()) <= set(torch.arange(200)[rare].tolist())
    assert 10 < len(found[rare].unique()) <= 37
    for word in special:
        assert (found == word).nonzero().tolist() == [[word]]
    alone = group_words(vector_VD, count_V, config=GroupingConfig(frequent=50, rare_size=1))
    assert torch.equal(alone.representative_V[50:], torch.arange(50, 200))


@pytest.mark.parametrize(("wrong", "size"), [(0.3, 2.0), (0.6, 2.0), (0.75, 4.0), (0.9, 8.0)])
def test_however_fine_rare_words_are_not_alone(wrong, size):
    config = GroupingConfig(frequent=50, wrong_guesses=wrong)
    assert config.words_of_a_rare_group == size
    vector_VD, count_V, _ = clustered()
    groups = group_words(vector_VD, count_V, config=config)
    assert groups.alone(torch.arange(50, 200)).double().mean() < 0.4
    found = groups.representative_V
    expected = [int((found == found[word]).sum()) == 1 for word in range(200)]
    assert groups.alone(torch.arange(200)).tolist() == expected


def test_clusters_are_those_of_plain_k_means():
    """Slow oracle: every word against every centre, in every round."""
    torch.manual_seed(0)
    vector_WD, share_W = torch.randn(300, 6), torch.rand(300)
    centre_GD = vector_WD[share_W.argsort(descending=True)[:100]].clone()
    for _ in range(word_groups.ROUNDS):
        group_W = torch.cdist(vector_WD, centre_GD).argmin(1)
        for g in group_W.unique():
            centre_GD[g] = vector_WD[group_W == g].mean(0)
    expected = torch.cdist(vector_WD, centre_GD).argmin(1)
    found = word_groups._join_rare(vector_WD, share_W, GroupingConfig(rare_size=3))
    assert torch.equal(found, expected)


def test_joinings_are_those_of_prices_computed_anew():
    """Slow oracle: every pair of groups in every round."""
    vector_WD, count_W, _ = clustered()
    share_W, config = count_W / count_W.sum(), GroupingConfig(wrong_guesses=0.7)
    centre = dict(enumerate(vector_WD.double()))
    weight = (
        share_W.double() * (config.pivot / (config.pivot + share_W)).square() + 1e-12
    ).tolist()
    won, groups = dict(enumerate(share_W.tolist())), {i: [i] for i in range(200)}
    while 1 - sum(won.values()) < config.wrong_guesses:
        best = {}
        for i in groups:
            best[i] = min(
                (float((centre[i] - centre[j]).square().sum()) * weight[i] * weight[j]
                 / (weight[i] + weight[j]) / min(won[i], won[j]), j)
                for j in groups if j != i
            )  # fmt: skip
        pairs = [(best[i][0], i, best[i][1]) for i in groups if best[best[i][1]][1] == i]
        pairs = sorted(pair for pair in pairs if pair[1] < pair[2])
        for _, i, j in pairs[: max(1, int(word_groups.MERGED_SHARE * len(groups)))]:
            if 1 - sum(won.values()) >= config.wrong_guesses:
                break
            part = weight[j] / (weight[i] + weight[j])
            centre[i] = centre[i].lerp(centre[j], part)
            weight[i], won[i] = weight[i] + weight[j], max(won[i], won.pop(j))
            groups[i] += groups.pop(j)
    found = word_groups._join_frequent(vector_WD, share_W, config)
    expected = {frozenset(members) for members in groups.values()}
    assert {frozenset((found == g).nonzero()[:, 0].tolist()) for g in found.unique()} == expected
    assert 10 < len(expected) < 150


def test_representatives_are_the_most_frequent_and_lowest():
    vector_VD, count_V, _ = clustered()
    groups = group_words(vector_VD, count_V, config=GroupingConfig(wrong_guesses=0.7, frequent=200))
    for word in groups.representatives.tolist():
        members = (groups.representative_V == word).nonzero().squeeze(1)
        assert word == int(members[0])  # counts fall with the id


def test_groups_come_back_from_a_file(tmp_path):
    vector_VD, count_V, _ = clustered()
    groups = group_words(vector_VD, count_V, config=GroupingConfig(frequent=50))
    groups.save(tmp_path / "groups.safetensors")
    again = WordGroups.load(tmp_path / "groups.safetensors")
    assert torch.equal(again.representative_V, groups.representative_V)
    (tmp_path / "groups.safetensors").write_bytes(b"{}")
    with pytest.raises(DataError, match="cannot read"):
        WordGroups.load(tmp_path / "groups.safetensors")


def test_equal_vectors_do_not_hang():
    groups = group_words(torch.ones(30, 4), torch.ones(30), config=GroupingConfig(frequent=30))
    assert 1 <= len(groups.representatives) <= 15


@pytest.mark.parametrize("bad", [[1, 0, 2], [0, 1, 3], [-1, 1, 2], []])
def test_maps_that_are_no_groups_are_refused(bad):
    with pytest.raises(DataError, match="stands for itself"):
        WordGroups(torch.tensor(bad, dtype=torch.int64))


def test_bad_inputs_are_refused():
    vector_VD, count_V, _ = clustered()
    for counts in (count_V[:5], torch.zeros(200), -count_V):
        with pytest.raises(DataError, match="counts of 200 words"):
            group_words(vector_VD, counts)
    with pytest.raises(DataError, match="finite"):
        group_words(vector_VD * torch.inf, count_V)
    with pytest.raises(DataError, match="ids below 3"):
        WordGroups(torch.arange(3)).apply(torch.tensor([3]))
    for options in ({"wrong_guesses": 1.0}, {"frequent": 1}, {"rare_size": 0.5}, {"pivot": 0.0}):
        with pytest.raises(ConfigError):
            GroupingConfig(**options)
