"""The adversarial loss: discriminator, generator, adaptive weight, R1 and LeCam, against formulas in float64."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tinyldm.objectives import adversarial
from tinyldm.objectives.adversarial import DECAY, EPS, KINDS, MOST, WATCHED, Adversary, GANConfig

REAL, FAKE = (torch.rand(2, 6, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1)
mean = lambda x: x.flatten(1).mean(1)


class Linear(nn.Module):
    """A discriminator that can be computed by hand: one logit per picture, linear in its pixels."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.weight = nn.Parameter(scale * torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64))

    def forward(self, pixels):
        return (pixels * self.weight).sum((1, 2, 3)).view(-1, 1, 1, 1)


def make(net=None, **fields) -> Adversary:
    torch.manual_seed(0)
    made = Adversary(GANConfig(**{"width": 4, "layers": 1, "norm": "none"} | fields)).double()
    if net is not None:
        made.net = net
    return made


# Losses of logits as the papers have them, for one batch: of the discriminator, to be minimised, and of the generator.
PAPER = {
    "hinge": (lambda real, fake: 0.5 * (torch.clamp(1 - real, min=0) + torch.clamp(1 + fake, min=0)), lambda fake: -fake),
    "non_saturating": (lambda real, fake: -0.5 * (torch.log(torch.sigmoid(real)) + torch.log(1 - torch.sigmoid(fake))),
                       lambda fake: -torch.log(torch.sigmoid(fake))),
}


@pytest.mark.parametrize("kind", PAPER)
def test_the_losses_of_discriminator_and_generator_are_those_of_the_paper(kind):
    adversary = make(kind=kind)
    with torch.no_grad():
        for layer in adversary.net.main[::2]:
            layer.weight.mul_(30), layer.bias.zero_()           # logits on both sides of the margins
        real, fake = adversary.net(REAL), adversary.net(FAKE)   # [6, 1, 2, 2]
    assert all((side * logits > 1).any() and (side * logits < 1).any() for logits in (real, fake) for side in (1, -1))
    discriminator, generator = PAPER[kind]
    torch.testing.assert_close(adversary.discriminator_losses(REAL, FAKE), mean(discriminator(real, fake)))
    torch.testing.assert_close(adversary.generator_losses(FAKE), mean(generator(fake)))
    zero = torch.zeros(1, dtype=torch.float64)
    assert KINDS[kind].blind == pytest.approx(discriminator(zero, zero).item())


def test_each_turn_reaches_only_its_own_weights():
    adversary, fake = make(), FAKE.clone().requires_grad_()
    adversary.generator_losses(fake).sum().backward()
    assert fake.grad.any() and all(p.grad is None for p in adversary.parameters())
    fake.grad = None
    adversary.discriminator_losses(REAL, fake).sum().backward()
    assert fake.grad is None and all(p.grad is not None for p in adversary.parameters())


# ---------------------------------------------------------------- the adaptive weight


class Decoder(nn.Module):
    """Latents [b, 4, 8, 8] -> pixels, with a last layer of which the gradients are taken."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Conv2d(4, 5, 3, padding=1).double(), nn.Conv2d(5, 3, 3, padding=1).double()

    def forward(self, z):
        return self.last(torch.tanh(self.first(z)))


Z = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
compare = lambda pixels: lambda decoded: mean((decoded - pixels).abs() + (decoded - pixels).square())


def paper_weight(adversary: Adversary, decoder: Decoder) -> float:
    """Eq. 7 of arXiv:2012.09841 on the whole batch, with the constants of the published code."""
    decoded = decoder(Z)
    reconstruction, generator = compare(REAL)(decoded).mean(), -adversary.net(decoded).mean()
    norms = [torch.autograd.grad(loss, decoder.last.weight, retain_graph=True)[0].norm() for loss in (reconstruction, generator)]
    return torch.clamp(norms[0] / (norms[1] + 1e-4), 0.0, 1e4).item()


def run_step(adversary: Adversary, decoder: Decoder, parts: int = 1, average=lambda tensor: tensor, factor=0.5) -> torch.Tensor:
    losses = [adversary.losses(decoder(z), decoder.last.weight, compare(pixels), factor)
              for z, pixels in zip(Z.tensor_split(parts), REAL.tensor_split(parts))]
    (torch.cat(losses).sum() / len(Z)).backward()
    adversary.after_step(average)
    return torch.cat(losses).detach()


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_adaptive_weight_is_that_of_the_paper_however_the_batch_is_cut(parts):
    adversary, decoder = make(), Decoder()
    expected = paper_weight(adversary, decoder)
    run_step(adversary, decoder, parts)
    assert adversary.weight.item() == pytest.approx(expected, rel=1e-12) and 0.1 < expected < MOST


def test_the_weight_of_several_processes_is_that_of_their_gradients_mean():
    whole, decoder = make(), Decoder()
    run_step(whole, decoder)
    halves, sums = [make(), make()], []
    for one, half in zip(halves, (slice(0, 4), slice(4, 6))):   # processes need not hold equally many samples
        one.losses(decoder(Z[half]), decoder.last.weight, compare(REAL[half]), 0.5)
        sums.append(one.pulls[0])
    halves[0].after_step(lambda tensor: torch.stack(sums).mean(0))
    torch.testing.assert_close(halves[0].weight, whole.weight)


def test_values_and_gradients_are_those_of_the_weighted_sum_with_the_weight_of_the_step_before():
    adversary, decoder = make(), Decoder()
    before = torch.tensor(0.7, dtype=torch.float64)
    adversary.weight.copy_(before)
    losses = run_step(adversary, decoder, parts=2, factor=0.3)
    found = [p.grad.clone() for p in decoder.parameters()]
    decoder.zero_grad()
    decoded = decoder(Z)
    plain = compare(REAL)(decoded) + 0.3 * before * mean(-adversary.net(decoded))
    plain.mean().backward()
    torch.testing.assert_close(losses, plain.detach(), rtol=1e-12, atol=1e-12)
    for ours, p in zip(found, decoder.parameters()):
        torch.testing.assert_close(ours, p.grad, rtol=1e-10, atol=1e-14)
    assert adversary.weight != before and all(p.grad is None for p in adversary.parameters())


def test_in_the_first_step_the_adversarial_loss_has_no_weight_yet_and_without_adaptive_it_has_its_own():
    decoder = Decoder()
    torch.testing.assert_close(run_step(make(), decoder), compare(REAL)(decoder(Z)).detach())
    fixed = make(adaptive=False)
    expected = compare(REAL)(decoder(Z)) + 0.5 * fixed.generator_losses(decoder(Z))
    torch.testing.assert_close(run_step(fixed, decoder), expected.detach())
    assert not fixed.pulls and fixed.weight == 0


def test_the_weight_has_an_upper_limit_and_what_is_not_finite_leaves_it_as_it_was():
    adversary, decoder = make(Linear(0.0)), Decoder()
    with torch.no_grad():
        decoder.last.weight.mul_(100)
    run_step(adversary, decoder)
    assert adversary.weight == MOST and EPS == 1e-4             # a gradient of 0, and of the reconstruction more than 1
    adversary.weight.fill_(3.0)
    adversary.losses(decoder(Z) * float("nan"), decoder.last.weight, compare(REAL), 0.5)
    adversary.after_step(lambda tensor: tensor)
    assert adversary.weight == 3


def test_a_step_that_starts_over_forgets_what_was_measured():
    adversary, decoder = make(), Decoder()
    adversary.losses(decoder(Z[:2]), decoder.last.weight, compare(REAL[:2]), 0.5)
    adversary.start_over()
    run_step(adversary, decoder)
    assert adversary.weight.item() == pytest.approx(paper_weight(make(), decoder), rel=1e-12)


# ---------------------------------------------------------------- regularisers of the discriminator


def test_r1_is_half_the_squared_gradient_on_originals():
    """Of a linear discriminator that is its weights' squared norm; the penalty's gradient is these weights."""
    plain, penalised = (make(Linear(0.01), r1=r1) for r1 in (0.0, 3.0))
    added = penalised.discriminator_losses(REAL, FAKE) - plain.discriminator_losses(REAL, FAKE)
    torch.testing.assert_close(added, (1.5 * penalised.net.weight.square().sum()).expand(6))
    penalised.discriminator_losses(REAL, FAKE).mean().backward(), plain.discriminator_losses(REAL, FAKE).mean().backward()
    torch.testing.assert_close(penalised.net.weight.grad - plain.net.weight.grad, 3 * plain.net.weight.detach())


@pytest.mark.parametrize("norm", ["none", "group"])
def test_r1_of_a_convolutional_discriminator_is_that_of_its_mean_logit(norm):
    plain, penalised = (make(norm=norm, r1=r1) for r1 in (0.0, 2.0))
    with torch.no_grad():
        penalised.net.main[-1].weight.mul_(50), plain.net.main[-1].weight.mul_(50)
    real = REAL.clone().requires_grad_()
    slope, = torch.autograd.grad(mean(plain.net(real)).sum(), real)
    added = penalised.discriminator_losses(REAL, FAKE) - plain.discriminator_losses(REAL, FAKE)
    torch.testing.assert_close(added, slope.square().sum((1, 2, 3)), rtol=1e-8, atol=1e-15)
    assert added.min() > 1e-5


def test_lecam_draws_logits_to_the_average_of_the_other_kind():
    adversary, plain = make(Linear(0.05), lecam=0.1), make(Linear(0.05))
    real, fake = (plain.net(pixels).flatten().detach() for pixels in (REAL, FAKE))
    first = adversary.discriminator_losses(REAL, FAKE)          # there are no averages yet
    torch.testing.assert_close(first, plain.discriminator_losses(REAL, FAKE))
    adversary.after_step(lambda tensor: tensor)
    torch.testing.assert_close(adversary.averages[:2], torch.stack([real.mean(), fake.mean()]))
    second = adversary.discriminator_losses(FAKE, REAL)         # now the other way round
    apart = F.relu(fake - fake.mean()).square() + F.relu(real.mean() - real).square()
    torch.testing.assert_close(second, plain.discriminator_losses(FAKE, REAL) + 0.1 * apart)
    adversary.after_step(lambda tensor: tensor)
    torch.testing.assert_close(adversary.averages[0], DECAY * real.mean() + (1 - DECAY) * fake.mean())


def test_the_averages_are_those_of_the_whole_batch_however_it_is_cut():
    whole, cut = make(), make()
    whole.discriminator_losses(REAL, FAKE), cut.discriminator_losses(REAL[:5], FAKE[:5]), cut.discriminator_losses(REAL[5:], FAKE[5:])
    whole.after_step(lambda tensor: tensor), cut.after_step(lambda tensor: tensor)
    torch.testing.assert_close(whole.averages, cut.averages)
    assert whole.steps == cut.steps == 1


# ---------------------------------------------------------------- when, and what is noted


def test_the_adversarial_loss_grows_from_the_start_over_the_warm_up():
    gan = GANConfig(start=0.5, warmup=0.2)
    assert [round(gan.ramp(progress), 9) for progress in (0, 0.49, 0.5, 0.55, 0.6, 0.7, 1)] == [0, 0, 0, 0.25, 0.5, 1, 1]
    assert [GANConfig(start=0.5, warmup=0).ramp(progress) for progress in (0.49, 0.5, 1)] == [0, 1, 1]
    assert GANConfig(start=0, warmup=0).ramp(0) == 1


def scored(adversary: Adversary, real: float, fake: float, steps: int = 1, weight: float = 1.0) -> list[str]:
    """Steps in which the discriminator gives these logits -> what is noted after them."""
    loss = float(mean(adversary.kind.real(torch.full((1, 1), real)) + adversary.kind.fake(torch.full((1, 1), fake))) / 2)
    for _ in range(steps):
        adversary.weight.fill_(weight)
        adversary.scores.append(torch.tensor([4.0, 4 * real, 4 * fake, 4 * loss], dtype=torch.float64))
        adversary.after_step(lambda tensor: tensor)
    return adversary.notes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("real, fake, weight, said", [
    (9.0, -9.0, 1.0, "tells all reconstructions from originals (its loss is"),
    (0.3, 0.3, 1.0, "answers alike to reconstructions and originals (mean logits"),
    (0.5, -0.5, MOST, "the adaptive weight of the adversarial loss is at its limit of 10000")])
def test_a_collapse_is_noted_once_and_again_where_it_comes_back(kind, real, fake, weight, said):
    adversary = make(kind=kind)
    assert scored(adversary, real, fake, WATCHED - 1, weight) == []             # too early to tell
    note, = scored(adversary, real, fake, 1, weight)
    assert said in note and "--vae-gan" in note
    assert scored(adversary, real, fake, 50, weight) == []
    assert scored(adversary, 0.5, -0.5, 700) == []             # a healthy one
    note, = scored(adversary, real, fake, 700, weight)
    assert said in note


def test_what_has_been_noted_is_part_of_the_state():
    adversary, again = make(), make()
    assert scored(adversary, 0.0, 0.0, WATCHED)
    again.load_state_dict(adversary.state_dict())
    assert again.notes() == [] and again.log_row() == adversary.log_row() == {"gan_weight": 1.0, "gan_real": 0.0, "gan_fake": 0.0}
    assert make().log_row() == {} and make().notes() == []


def test_a_step_whose_logits_are_not_finite_is_not_averaged():
    adversary = make()
    scored(adversary, 1.0, -1.0)
    before = adversary.averages.clone()
    scored(adversary, math.nan, -1.0)
    assert torch.equal(adversary.averages, before) and adversary.steps == 1


@pytest.mark.parametrize("fields, said", [
    (dict(kind="hing"), "unknown adversarial loss 'hing': did you mean 'hinge'"), (dict(start=1.5), "start=1.5 must lie between 0 and 1"),
    (dict(warmup=-0.1), "warmup=-0.1 must lie between"), (dict(r1=-1.0), "r1=-1.0 must be 0 or more"), (dict(lr=0.0), "lr=0.0 must be"),
    (dict(betas=(0.5, 1.0)), "must lie between 0 and 1"), (dict(norm="layer"), "unknown norm"),
    (dict(width=0), "width=0 must be 1 or more")])
def test_settings_that_cannot_work_are_refused(fields, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        GANConfig(**fields)


def test_constants_are_the_published_ones():
    assert (adversarial.EPS, adversarial.MOST, GANConfig().betas, GANConfig().adaptive) == (1e-4, 1e4, (0.5, 0.9), True)
