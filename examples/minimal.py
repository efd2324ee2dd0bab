"""Latent diffusion in about sixty lines: data, autoencoder, captions, network, loss, training, sampler, pictures.

    python examples/minimal.py                               about a minute on two CPU cores; writes minimal.png

All parts are the library's, except two that are as small as they can be: the autoencoder is a linear map, and the text
encoder is a table with one vector per word. train.py does the same with networks in their place, and adds what a long run needs.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tinyldm.data import toyworld
from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.guidance import cfg, denoiser
from tinyldm.diffusion.loss import sample_losses, sample_t
from tinyldm.diffusion.noise import initial_noise, make_generators
from tinyldm.diffusion.process import make_process
from tinyldm.diffusion.samplers import dpmpp_2m, final
from tinyldm.models.layers import Cond
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.pictures.pixels import to_bytes, to_pixels, write_picture
from tinyldm.pictures.sheet import tile

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
parser.add_argument("--out", type=Path, default=Path("minimal.png"), help="the picture to write")
args = parser.parse_args()
random = torch.Generator().manual_seed(0)
torch.manual_seed(0)                                                    # for the initial weights

# The data: four subjects in eight colours in front of five backgrounds, drawn by the library. One colour of each subject is left
# out of its training set: there is no purple fox, no blue star, no red boat and no orange house.
SHOWN = {"fox": "grass", "star": "sand", "boat": "sea", "house": "snow"}
scenes = [replace(scene, size="large", position="middle") for scene in map(toyworld.scene, range(6000)) if scene.subject in SHOWN]
pixels = to_pixels(np.stack([toyworld.draw(scene, 32) for scene in scenes]))            # [n, 3, 32, 32] in [-1, 1]

# The autoencoder: diffusion is cheaper on fewer numbers. Each patch of 4 x 4 pixels, 48 numbers, is reduced to its first 8
# principal components. Encoding is a convolution with them, decoding is the transposed convolution. The scaling factor gives
# latents unit variance, which is what the noise has.
mean = pixels.mean((0, 2, 3), keepdim=True)
patches = F.unfold(pixels - mean, 4, stride=4).transpose(0, 1).flatten(1)               # [48, all patches]
kernel = torch.linalg.eigh(patches @ patches.T).eigenvectors[:, -8:].T.reshape(8, 3, 4, 4)
latents = F.conv2d(pixels - mean, kernel, stride=4)                                     # [n, 8, 8, 8]
scaling_factor = 1 / latents.std()
latents = latents * scaling_factor
decode = lambda x: F.conv_transpose2d(x / scaling_factor, kernel, stride=4) + mean

# The captions: three words each. Every word has a vector, which is trained together with the network. The empty caption is word 0,
# three times.
vocabulary = ["", *toyworld.COLOURS, *SHOWN, *toyworld.BACKGROUNDS]
spell = lambda colour, subject, background: [vocabulary.index(word) for word in (colour, subject, background)]
captions = torch.tensor([spell(scene.colour, scene.subject, scene.background) for scene in scenes])     # [n, 3]
words = nn.Embedding(len(vocabulary), 64)

# The network is given a noisy latent, the noise level and the words. The process says what noisy means: alpha * x0 + sigma * eps,
# here on the straight line from data to noise. The network predicts x0, because after so little training the errors in x0 look
# like blur; those of the prediction "flow", eps - x0, look like grain.
process, prediction = make_process("flow"), "x0"
net = UNet(UNetConfig(in_channels=8, out_channels=8, widths=(48, 96), depth=1, attention=(True, True), heads=(4, 4),
                      context_dim=64, groups=8, sample_size=8))

# Training: mix each latent with noise at a random level, let the network guess x0, and take a step that makes the squared error
# smaller. One caption in ten is replaced by the empty one, so that the network also learns to guess without a caption.
parameters = [*net.parameters(), *words.parameters()]
optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=args.steps, pct_start=0.1)
for step in range(args.steps):
    chosen = torch.randint(len(scenes), (64,), generator=random)
    x0, eps, t = latents[chosen], torch.randn(64, 8, 8, 8, generator=random), sample_t("logit_normal", 64, random)
    dropped = torch.rand(64, 1, generator=random) < 0.1
    cond = Cond(words(captions[chosen].masked_fill(dropped, 0)))                        # [64, 3, 64]
    loss = sample_losses(net, x0, eps, t, cond, process, prediction=prediction).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step(), optimizer.zero_grad(), schedule.step()
    if step % 20 == 0 or step == args.steps - 1:
        print(f"step {step + 1:3}: loss {loss.item():.3f}", flush=True)

# Sampling: start from pure noise and step down the noise levels, each time towards the network's guess of x0. Guidance moves the
# guess for the caption further away from the guess for the empty caption.
wanted = torch.tensor([spell(colour, *pair) for pair in SHOWN.items() for colour in toyworld.COLOURS])  # [32, 3]
with torch.no_grad():
    both = Cond(words(torch.cat([wanted, torch.zeros_like(wanted)])))                   # [64, 3, 64]
    denoise = cfg(denoiser(net, both, prediction), 3.0)
    noise = initial_noise((8, 8, 8), make_generators(range(len(wanted))))               # picture i is a function of seed i
    x = final(dpmpp_2m(denoise, noise, grid(process, steps=20)))
drawn = to_bytes(decode(x))                                                             # uint8 [32, 32, 32, 3]

# One row per subject, one column per colour. Each row holds one pair that was not in the training set.
write_picture(args.out.absolute(), tile(drawn, columns=len(toyworld.COLOURS)).repeat(4, axis=0).repeat(4, axis=1))
print(args.out)
