"""Diffusion over symbols instead of numbers: D3PM (arXiv:2107.03006), the one family that x_t = alpha x0 + sigma eps does not cover.

    python examples/d3pm.py                                  some minutes on two CPU cores (120 of its 600 steps: 2.5 of CPU time)
    python examples/d3pm.py --transitions absorbing          the other kinds: absorbing, gaussian

Here a pixel is no number to which noise is added. It is one of K symbols (8 shades of each colour), and noise replaces it by another
one: step t turns symbol i into j with probability Q_t[i, j], independently for each pixel. "Half fox, half noise" does not exist, so
neither do alpha, sigma, or any sampler of this library. What remains of diffusion is Bayes' rule: where the network's guess of x0 is
a distribution over symbols, that of the symbol one step earlier follows from it exactly, as a sum over the K possible x0.

Index t = 0 .. T-1 stands for the paper's step t + 1: Q[t] goes from x_t to x_(t+1), and `upto[t]` from x_0 to x_t.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tinyldm.data import toyworld
from tinyldm.models.layers import Cond
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.pictures.pixels import write_picture
from tinyldm.pictures.sheet import tile

Network = Callable[[Tensor, Tensor], Tensor]        # (x_t [b, n] of symbols, t [b]) -> logits of x0 [b, n, K]


# ---------------------------------------------------------------- transitions: Q [T, K, K] float64, rows sum to 1


def uniform(steps: int, symbols: int) -> Tensor:
    """With probability beta a symbol is drawn anew from all (Appendix A.2.1). Fewer than that change: it may be drawn again. beta
    follows a cosine (Sec. 5 and the published code, where it is not squared)."""
    kept = torch.cos((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2)
    beta = (1 - kept[1:] / kept[:-1]).clamp(max=0.999).view(-1, 1, 1)
    return (1 - beta) * torch.eye(symbols, dtype=torch.float64) + beta / symbols


def absorbing(steps: int, symbols: int) -> Tensor:
    """A symbol turns into the grey one with probability 1 / (T - t), and stays that (Appendix A.2.2): after step t a fraction t / T is
    grey, and in the end everything."""
    beta = 1 / (steps - torch.arange(steps, dtype=torch.float64)).view(-1, 1, 1)
    grey = F.one_hot(torch.full((symbols,), symbols // 2), symbols).double()
    return (1 - beta) * torch.eye(symbols, dtype=torch.float64) + beta * grey


def gaussian(steps: int, symbols: int, first: float = 0.05, last: float = 1.0) -> Tensor:
    """Symbols are shades, and near ones are likelier (Appendix A.2.3, Eq. 8). The paper's beta, 1e-4 to 0.02, is for 256 shades
    and 1000 steps; this one is for 8 shades and 100."""
    shades = torch.arange(symbols, dtype=torch.float64)
    beta = torch.linspace(first, last, steps, dtype=torch.float64).view(-1, 1, 1)
    fall = lambda distance: torch.exp(-4 * distance**2 / (symbols - 1) ** 2 / beta)
    total = fall(torch.arange(1 - symbols, symbols, dtype=torch.float64)).sum(-1, keepdim=True)
    away = fall(shades[:, None] - shades) / total * (1 - torch.eye(symbols, dtype=torch.float64))
    return away + torch.diag_embed(1 - away.sum(-1))


TRANSITIONS = {"uniform": uniform, "absorbing": absorbing, "gaussian": gaussian}


# ---------------------------------------------------------------- the chain


class D3PM:
    """A chain of transitions Q [T, K, K]. Symbols are int64 [b, n]: b pictures of n pixels; t is [b]."""

    def __init__(self, transitions: Tensor):
        self.steps, self.symbols = len(transitions), transitions.shape[-1]
        upto = [torch.eye(self.symbols, dtype=torch.float64)]
        for one in transitions:
            upto.append(upto[-1] @ one)
        self.one, self.upto = transitions.float(), torch.stack(upto).float()        # [T, K, K], [T + 1, K, K]
        self.prior = upto[-1].mean(0).float()                                       # [K], where the last step arrives from anywhere

    def noisy(self, x0: Tensor, t: Tensor, generator: Generator) -> Tensor:
        """Draw x_t given x0 (Eq. 3). t in 0..T."""
        return draw(self.upto[t[:, None], x0].log(), generator)

    def posterior(self, x0: Tensor, x_next: Tensor, t: Tensor) -> Tensor:
        """log of sum over x0 of q(x_t, x_(t+1) | x0) p(x0), normalised (Eqs. 3 and 4): [b, n, K]. x0: probabilities [b, n, K], one-hot for
        the true posterior q(x_t | x_(t+1), x0). At t = 0 that is x0 itself, and for p the paper takes p(x0) too, as here.

        The sum has q(x_t, x_(t+1) | x0), not the posterior, so what a pixel itself has become is weighed here: the best p(x0) at t > 0
        is what the *other* pixels say of it."""
        arrived = self.one.mT[t[:, None], x_next]                                   # [b, n, K]: Q_t[i, x_next] over i
        before = torch.einsum("bnk,bkj->bnj", x0, self.upto[t])
        joint = torch.where(t.view(-1, 1, 1) > 0, arrived * before, x0)
        return joint.clamp(min=1e-30).log().log_softmax(-1)

    def bound(self, net: Network, x0: Tensor, x_next: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """-> (L_t, cross entropy of the guess of x0), nats per pixel, [b]. L_t is KL(q(x_t | x_(t+1), x0) || p(x_t | x_(t+1))), at t = 0
        -log p(x0 | x_1) (Eq. 1). Their sum over t = 0 .. T-1, and `prior_gap`, bounds -log p(x0)."""
        logits = net(x_next, t)
        true = self.posterior(F.one_hot(x0, self.symbols).float(), x_next, t)
        guess = self.posterior(logits.softmax(-1), x_next, t)
        kl = (true.exp() * (true - guess)).sum(-1).mean(1)
        cross = -logits.log_softmax(-1).gather(-1, x0[..., None]).squeeze(-1).mean(1)
        return kl, cross

    def prior_gap(self, x0: Tensor) -> Tensor:
        """KL(q(x_T | x0) || p(x_T)), nats per pixel, [b]."""
        end = self.upto[-1][x0]                                                     # [b, n, K]
        return (end * (end.clamp(min=1e-30) / self.prior.clamp(min=1e-30)).log()).sum(-1).mean(1)

    def losses(self, net: Network, x0: Tensor, generator: Generator, auxiliary: float = 0.001) -> Tensor:
        """The hybrid loss at a random step, L_vb + auxiliary * cross entropy (Eq. 5), [b]."""
        t = torch.randint(self.steps, (len(x0),), generator=generator)
        kl, cross = self.bound(net, x0, self.noisy(x0, t + 1, generator), t)
        return kl + auxiliary * cross

    @torch.no_grad()
    def bits_per_dim(self, net: Network, x0: Tensor, generator: Generator) -> float:
        """An estimate of the bound on -log2 p(x0) / n: the mean over the pictures, one x_(t+1) for each and each step."""
        total = self.prior_gap(x0)
        for step in range(self.steps):
            t = torch.full((len(x0),), step)
            total = total + self.bound(net, x0, self.noisy(x0, t + 1, generator), t)[0]
        return total.mean().item() / math.log(2)

    @torch.no_grad()
    def sample(self, net: Network, shape: tuple[int, int], generator: Generator) -> Tensor:
        """Symbols [b, n]: from the prior, one step of Bayes after the other. The last takes the likeliest symbol."""
        x = draw(self.prior.clamp(min=1e-30).log().expand(*shape, -1), generator)
        for step in reversed(range(self.steps)):
            t = torch.full((shape[0],), step)
            log_p = self.posterior(net(x, t).softmax(-1), x, t)
            x = draw(log_p, generator) if step else log_p.argmax(-1)
        return x


def draw(log_p: Tensor, generator: Generator) -> Tensor:
    """One symbol from each distribution, log_p [..., K], by Gumbel-max."""
    u = torch.rand(log_p.shape, generator=generator).clamp(min=1e-20)
    return (log_p - (-u.log()).log()).argmax(-1)


# ---------------------------------------------------------------- pictures


class PixelNetwork(nn.Module):
    """A U-Net over symbols. Their values, in [-1, 1], go in; for every channel K logits come out, around that of its own symbol, since
    most steps change little."""

    def __init__(self, symbols: int, side: int, words: int):
        super().__init__()
        self.symbols, self.side, self.words = symbols, side, nn.Embedding(words, 64)
        self.net = UNet(UNetConfig(in_channels=3, out_channels=3 * symbols, widths=(64, 96), depth=1, attention=(False, True),
                                   heads=(4, 4), context_dim=64, groups=8, sample_size=side))

    def forward(self, x: Tensor, t: Tensor, caption: Tensor) -> Tensor:
        pixels = (2 * x / (self.symbols - 1) - 1).view(-1, 3, self.side, self.side)
        out = self.net(pixels, t.float(), Cond(self.words(caption)))                # [b, 3 K, side, side]
        logits = out.view(len(x), 3, self.symbols, -1).transpose(2, 3).flatten(1, 2)
        return logits + F.one_hot(x, self.symbols)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transitions", choices=TRANSITIONS, default="uniform")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps")
    parser.add_argument("--length", type=int, default=100, help="steps of the chain, T")
    parser.add_argument("--symbols", type=int, default=8, help="shades of each colour, K")
    parser.add_argument("--side", type=int, default=16, help="width and height of the pictures")
    parser.add_argument("--out", type=Path, default=Path("d3pm.png"), help="the picture to write")
    args = parser.parse_args()
    random = torch.Generator().manual_seed(0)
    torch.manual_seed(0)

    subjects = ("fox", "star", "boat", "house")
    scenes = [replace(scene, size="large", position="middle") for scene in map(toyworld.scene, range(6000)) if scene.subject in subjects]
    pictures = np.stack([toyworld.draw(scene, args.side) for scene in scenes])                          # uint8 [n, side, side, 3]
    symbols = torch.from_numpy(pictures).permute(0, 3, 1, 2).flatten(1).long() * args.symbols // 256    # [n, 3 side^2]
    vocabulary = [*toyworld.COLOURS, *subjects, *toyworld.BACKGROUNDS]
    spell = lambda scene: [vocabulary.index(word) for word in (scene.colour, scene.subject, scene.background)]
    captions = torch.tensor([spell(scene) for scene in scenes])                                         # [n, 3]

    chain = D3PM(TRANSITIONS[args.transitions](args.length, args.symbols))
    net = PixelNetwork(args.symbols, args.side, len(vocabulary))
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=args.steps, pct_start=0.1)
    held_out, trained = slice(0, 64), len(scenes) - 64
    for step in range(args.steps):
        chosen = 64 + torch.randint(trained, (32,), generator=random)
        loss = chain.losses(lambda x, t: net(x, t, captions[chosen]), symbols[chosen], random).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad(), schedule.step()
        if step % 50 == 0 or step == args.steps - 1:
            print(f"step {step + 1:4}: loss {loss.item():.4f}", flush=True)

    bits = chain.bits_per_dim(lambda x, t: net(x, t, captions[held_out]), symbols[held_out], random)
    print(f"at most {bits:.3f} bits per dimension, of {math.log2(args.symbols):.3f}, on {len(captions[held_out])} scenes that it has not "
          "seen")
    wanted = torch.tensor([[vocabulary.index(word) for word in (colour, subject, background)] for subject, background in
                           zip(subjects, ("grass", "sand", "sea", "snow")) for colour in toyworld.COLOURS])
    drawn = chain.sample(lambda x, t: net(x, t, wanted), (len(wanted), symbols.shape[1]), random)
    values = (drawn.view(-1, 3, args.side, args.side).permute(0, 2, 3, 1) * 255 // (args.symbols - 1)).to(torch.uint8).numpy()
    write_picture(args.out.absolute(), tile(values, columns=len(toyworld.COLOURS)).repeat(4, axis=0).repeat(4, axis=1))
    print(args.out)


if __name__ == "__main__":
    main()
