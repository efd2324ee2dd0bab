"""examples/d3pm.py against Bayes' rule by enumeration, on problems of a few symbols."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from helpers import load_script, thinned

d3pm = load_script("examples/d3pm")
KINDS = pytest.mark.parametrize("kind", d3pm.TRANSITIONS)


@KINDS
def test_transitions_are_distributions_and_end_where_the_data_are_forgotten(kind):
    chain = d3pm.D3PM(d3pm.TRANSITIONS[kind](60, 5))
    torch.testing.assert_close(chain.one.sum(-1), torch.ones(60, 5))
    assert chain.one.min() >= 0 and torch.equal(chain.upto[0], torch.eye(5))
    assert (chain.upto[-1] - chain.prior).abs().max() < 2e-3


def test_many_steps_are_the_closed_forms_of_the_paper():
    """Uniform: the symbol is still the first one with what no step has drawn anew. Absorbing: a fraction t / T is grey."""
    one = d3pm.uniform(10, 4)
    kept = torch.cumprod(one[:, 0, 0] - one[:, 0, 1], 0)
    upto = d3pm.D3PM(one).upto[1:].double()
    torch.testing.assert_close(upto[:, 1, 1], kept + (1 - kept) / 4, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(upto[:, 1, 3], (1 - kept) / 4, rtol=1e-6, atol=1e-6)
    upto = d3pm.D3PM(d3pm.absorbing(10, 4)).upto
    torch.testing.assert_close(upto[:, 0, 2], torch.arange(11) / 10)
    torch.testing.assert_close(upto[:, 2, 2], torch.ones(11))


def test_gaussian_transitions_favour_near_shades_and_keep_a_uniform_distribution():
    one = d3pm.gaussian(3, 6)
    torch.testing.assert_close(one, one.mT)
    assert (one[0, 2, 3] > one[0, 2, 4] > one[0, 2, 5]) and one[0, 2, 2] > one[0, 2, 3]
    beta, total = 0.05, sum(math.exp(-4 * n**2 / 25 / 0.05) for n in range(-5, 6))
    assert one[0, 2, 3].item() == pytest.approx(math.exp(-4 / 25 / beta) / total)


@KINDS
def test_the_posterior_is_bayes_rule(kind):
    """q(x_t | x_(t+1), x0) from all paths x0 -> x_t -> x_(t+1), and p(x_t | x_(t+1)) as its mean over a distribution of x0, weighed by
    how likely each x0 has led to x_(t+1)."""
    chain, K = d3pm.D3PM(d3pm.TRANSITIONS[kind](6, 4)), 4
    for t, x0, x_next in itertools.product(range(1, 6), range(K), range(K)):
        paths = chain.upto[t][x0] * chain.one[t][:, x_next]
        if paths.sum() < 1e-12:
            continue                                        # x0 cannot have become that
        found = chain.posterior(F.one_hot(torch.tensor([[x0]]), K).float(), torch.tensor([[x_next]]), torch.tensor([t])).exp()
        torch.testing.assert_close(found[0, 0], paths / paths.sum(), rtol=1e-5, atol=1e-6)
    guess = torch.tensor([0.1, 0.2, 0.3, 0.4])
    joint = sum(guess[x0] * chain.upto[3][x0] * chain.one[3][:, 1] for x0 in range(K))
    found = chain.posterior(guess[None, None], torch.tensor([[1]]), torch.tensor([3])).exp()
    torch.testing.assert_close(found[0, 0], joint / joint.sum())


class Pair:
    """Two pixels of three symbols with a known joint distribution, and the network that knows it, by enumeration: p(x0 of a pixel | the
    other one of x_(t+1)), and at t = 0, where the answer is the last step itself, p(x0 of a pixel | both)."""

    def __init__(self, kind, steps):
        self.chain, self.K = d3pm.D3PM(d3pm.TRANSITIONS[kind](steps, 3)), 3
        self.p = torch.tensor([[0.3, 0.02, 0.08], [0.05, 0.25, 0.0], [0.1, 0.0, 0.2]])        # p(first, second)

    def data(self, n, seed=0):
        at = torch.multinomial(self.p.flatten(), n, replacement=True, generator=torch.Generator().manual_seed(seed))
        return torch.stack([at // self.K, at % self.K], 1)

    def net(self, x, t):
        up = self.chain.upto[t + 1]                                                     # [b, K, K]
        first, second = (up.gather(2, x[:, i, None, None].expand(-1, self.K, 1)).squeeze(2) for i in (0, 1))   # q(x_t of i | x0 of i)
        end = (t == 0).view(-1, 1)                                                      # up to a factor:
        answers = [(self.p * second[:, None]).sum(2), (self.p * first[:, :, None]).sum(1)]
        answers = [answer.where(~end, answer * own) for answer, own in zip(answers, (first, second))]
        return torch.stack(answers, 1).clamp(min=1e-30).log()                           # [b, 2, K]


def enumerated_bound(pair):
    """The bound in bits per pixel as a sum over all x0, x_t and x_(t+1)."""
    chain, K, total = pair.chain, pair.K, 0.0
    states = torch.tensor(list(itertools.product(range(K), repeat=2)))
    for x0 in states:
        p0 = pair.p[x0[0], x0[1]].item()
        total += p0 * chain.prior_gap(x0[None]).item() * 2
        for t, x_next in itertools.product(range(chain.steps), states):
            reach = math.prod(chain.upto[t + 1][x0[i], x_next[i]].item() for i in (0, 1))
            if p0 * reach == 0:
                continue
            guess = pair.net(x_next[None], torch.tensor([t])).softmax(-1)[0]            # [2, K]
            for i in (0, 1):
                before = guess[i] @ chain.upto[t] * chain.one[t][:, x_next[i]] if t else guess[i]
                before, true = before / before.sum(), chain.upto[t][x0[i]] * chain.one[t][:, x_next[i]]
                true = true / true.sum()
                total += p0 * reach * sum((true[k] * (true[k] / before[k]).log()).item() for k in range(K) if true[k] > 0)
    return total / 2 / math.log(2)


@KINDS
def test_the_bits_per_dimension_are_those_of_enumeration_and_bound_the_entropy(kind):
    pair = Pair(kind, 5)
    exact = enumerated_bound(pair)
    found = pair.chain.bits_per_dim(pair.net, pair.data(150_000), torch.Generator().manual_seed(1))
    print(f"{found:.4f} {exact:.4f}")
    assert found == pytest.approx(exact, abs=3e-3)
    entropy = -(pair.p[pair.p > 0] * pair.p[pair.p > 0].log2()).sum().item() / 2
    assert entropy < exact < entropy + 0.4


@pytest.mark.parametrize("kind", thinned(3, d3pm.TRANSITIONS))
def test_samples_have_the_joint_distribution(kind):
    """Of the exact network; what is left is that pixels step independently, which 100 steps nearly make up for."""
    pair = Pair(kind, 100)
    x = pair.chain.sample(pair.net, (8000, 2), torch.Generator().manual_seed(2))
    found = torch.bincount(x[:, 0] * 3 + x[:, 1], minlength=9).view(3, 3) / len(x)
    distance = (found - pair.p).abs().sum().item() / 2
    print(f"total variation {distance:.4f}")
    assert distance < 0.03


def test_the_loss_is_an_estimate_of_the_bound_and_a_little_cross_entropy():
    """Eq. 5: T times its mean over random steps, without the prior's part, is the bound."""
    pair = Pair("uniform", 5)
    x0 = pair.data(150_000)
    found = pair.chain.losses(pair.net, x0, torch.Generator().manual_seed(3), auxiliary=0.0).mean().item() * 5
    assert found / math.log(2) == pytest.approx(enumerated_bound(pair) - pair.chain.prior_gap(x0).mean().item() / math.log(2), abs=6e-3)
    more = pair.chain.losses(pair.net, x0, torch.Generator().manual_seed(3), auxiliary=1.0).mean().item()
    assert more > found / 5 + 0.1


def test_the_network_is_told_symbols_as_numbers_and_answers_for_every_one():
    net = d3pm.PixelNetwork(8, 8, 5)
    x = torch.randint(8, (2, 3 * 64), generator=torch.Generator().manual_seed(0))
    logits = net(x, torch.tensor([0, 3]), torch.tensor([[0, 1, 2], [1, 2, 4]]))
    assert logits.shape == (2, 192, 8)
    torch.testing.assert_close(logits.detach(), F.one_hot(x, 8).float())                 # before training, near what it is given
