"""Classifier guidance: a small classifier of noisy latents steers a model without a caption towards a subject.

    python train.py --preset tiny                            once; then, in a few minutes on two CPU cores:
    python examples/classifier_guidance.py                   with the run that finished last under runs/
    python examples/classifier_guidance.py --model runs/tiny --scale 30 --out steered.png

The classifier learns log p(subject | x_t) from the run's own cached latents, at every noise level. The model draws from
the empty caption, without and with that classifier's gradient (arXiv:2105.05233, Alg. 2; see guidance.classifier_guidance).
The recogniser, which was trained independently of both, counts in how many pictures its best guess is the wanted subject,
and how often it is sure of it. The picture that is written shows twelve subjects, one per column. Its first row is drawn
without the classifier, its second with it, from the same noise.

For an exact classifier and an exact model, Bayes' rule demands scale 1. This model has seen few pictures without a caption,
and without one it draws shapes that are no subject. So it needs a scale of 10 or more (as in arXiv:2105.05233, Table 4,
without classes), a stochastic sampler, which corrects the errors of a wrong gradient, and a classifier with a smooth
gradient. Captions steer far better (README); classifier guidance is for models that have none.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import trange

from tinyldm.cli import Parser, guard
from tinyldm.data.cache import Cache
from tinyldm.data.toyworld import SUBJECTS
from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.guidance import Denoiser, classifier_guidance, denoiser
from tinyldm.diffusion.noise import initial_noise, make_generators
from tinyldm.diffusion.process import Level, Process, input_scale
from tinyldm.diffusion.samplers import final, find_sampler
from tinyldm.evaluation.recogniser import Recogniser, get_recogniser, split, wilson
from tinyldm.folders.load import load_model
from tinyldm.model import Model
from tinyldm.models.convolutions import Downsample, ResBlock
from tinyldm.models.layers import TimeEmbedding
from tinyldm.pictures.pixels import to_bytes, to_pixels
from tinyldm.pictures.sheet import tile
from tinyldm.pipeline import DrawSettings, PromptFeatures, decode, draw_settings
from tinyldm.training.run_folder import find_model

NAMES = tuple(SUBJECTS)
HELD_OUT = 1000                         # number of latents that the classifier is tested on (of few, a fifth)


class Classifier(nn.Module):
    """x_t [b, c, h, w] and its level -> log p(subject | x_t) [b, 12]."""

    def __init__(self, channels: int, width: int = 64):
        super().__init__()
        self.time = TimeEmbedding(width, width)
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.fine = ResBlock(width, width, 8, 1e-5, width)
        self.down = Downsample(width)
        self.coarse = ResBlock(width, 2 * width, 8, 1e-5, width)
        self.head = nn.Linear(2 * width, len(NAMES))

    def forward(self, x: Tensor, level: Level) -> Tensor:
        emb = self.time(torch.as_tensor(level.t, dtype=x.dtype, device=x.device).expand(len(x)))
        h = self.down(self.fine(self.stem(x / input_scale(level)), emb))
        return self.head(F.silu(self.coarse(h, emb)).mean((2, 3))).log_softmax(1)   # max pooling's gradient is not smooth


def subject(caption: str) -> int:
    """The index in NAMES of the subject that a caption of toyworld names."""
    named = [i for i, name in enumerate(NAMES) if re.search(rf"\b{name}\b", caption)]
    if not named:
        raise ValueError(f"'{caption}' names no subject of toyworld: pass a run that was trained on it")
    return named[0]


def noised(x0: Tensor, t: Tensor, process: Process, generator: torch.Generator) -> tuple[Tensor, Level]:
    level = process(t)
    return level.alpha * x0 + level.sigma * torch.randn(x0.shape, generator=generator), level


def read_latents(cache: Cache, chosen: Tensor) -> Tensor:
    """float32 [b, c, h, w]."""
    return torch.from_numpy(cache.latents(chosen.numpy())[:, 0]).float()


def train(cache: Cache, process: Process, steps: int) -> Classifier:
    """Train a classifier on the run's latents and captions, and print its accuracy on held-out ones, by noise level.
    Label smoothing and weight decay serve to make its gradient smooth."""
    labels = torch.tensor([subject(caption) for caption in cache.all_captions()])
    count, generator = len(cache) - min(HELD_OUT, len(cache) // 5), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = Classifier(cache.shape[2])
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in trange(steps, desc="classifier", disable=None):
        chosen = torch.randint(count, (128,), generator=generator)
        t = torch.rand(128, generator=generator) ** 0.7                      # more noisy levels, which decide the shapes
        x0 = read_latents(cache, chosen)
        loss = F.cross_entropy(net(*noised(x0, t, process, generator)), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval().requires_grad_(False)
    held = torch.arange(count, len(cache))
    for t in (0.1, 0.3, 0.5, 0.7, 0.9):
        right = net(*noised(read_latents(cache, held), torch.full((len(held),), t), process, generator)).argmax(1) == labels[held]
        print(f"classifier at t = {t}: {100 * right.float().mean():.1f} % right")
    return net


@torch.no_grad()
def draw(model: Model, denoise: Denoiser, seeds: range, settings: DrawSettings) -> np.ndarray:
    """Pictures drawn with the denoiser, one per seed: uint8 [b, h, w, 3]."""
    how = settings.sampling
    levels = grid(model.process, settings.steps, how.schedule, **how.grid)
    generators = make_generators(seeds)
    noise = initial_noise((model.net.config.in_channels, *[model.net.config.sample_size] * 2), generators)
    steps = find_sampler(how.sampler)(denoise, input_scale(levels[0]) * noise, levels, generators=generators, **how.options)
    return to_bytes(decode(model.vae, final(steps)))


def judge(images: np.ndarray, wanted: Tensor, recogniser: Recogniser) -> str:
    """How many of the pictures show the wanted subject, as a line to print."""
    best = split(recogniser(to_pixels(images)))[0].argmax(1)
    right, sure = int((best == wanted).sum()), sum(NAMES[i] == reading.subject for i, reading in zip(wanted, recogniser.read(images)))
    low, high = wilson(right, len(wanted))
    return (f"{right} of {len(wanted)} subjects right, {100 * right / len(wanted):.1f} % ({100 * low:.1f} to {100 * high:.1f}); "
            f"of {sure} the recogniser is sure")


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", metavar="RUN", help="a run of train.py on toyworld (default: the last finished under runs/)")
    parser.add_argument("--scale", type=float, default=16.0, help="of the classifier's gradient")
    parser.add_argument("--count", type=int, default=10, help="pictures per subject")
    parser.add_argument("--steps", type=int, default=1200, help="training steps of the classifier")
    parser.add_argument("--out", default="classifier_guidance.png")
    args = parser.parse_args()
    path = Path(find_model(args.model))
    if len(path.parents) < 3 or not (folder := path.parents[2] / "latents").exists():
        raise ValueError(f"{path} lies in no run with cached latents: name a run folder of train.py")
    model = load_model(path)
    settings = draw_settings(model, sampler="euler_a", steps=40)
    classifier = train(Cache(folder), model.process, args.steps)

    wanted = torch.arange(len(NAMES)).repeat(args.count)                     # all subjects in order, `count` times
    plain = denoiser(model.net, PromptFeatures(model)([""] * len(wanted)), model.prediction)
    log_p = lambda x, level: classifier(x, level).gather(1, wanted[:, None]).squeeze(1)
    recogniser, rows = get_recogniser(), []
    for name, denoise in (("without", plain), ("with", classifier_guidance(plain, log_p, args.scale))):
        images = draw(model, denoise, range(len(wanted)), settings)
        print(f"{name} the classifier: {judge(images, wanted, recogniser)}")
        rows.append(images[: len(NAMES)])
    Image.fromarray(tile(np.concatenate(rows), columns=len(NAMES))).save(args.out)
    print(f"{args.out}: {', '.join(NAMES)}")


if __name__ == "__main__":
    guard(main)
