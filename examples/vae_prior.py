"""What a variational autoencoder draws by itself: noise from its prior N(0, 1), decoded (arXiv:1312.6114).

    python train.py --only vae --preset tiny --autoencoder kl --vae-loss mse=1 l1=0 kl=1 --vae-latents noise=0 --out runs/elbo
    python examples/vae_prior.py --vae runs/elbo             seconds; writes prior.png

The loss of that run is the ELBO of a decoder whose pixels, in [-1, 1], have the variance 1/2, negative and divided by their number, up to
a constant: the squared error and the KL then count alike. So posteriors together are near the prior, and noise decodes to something
like the data, as blurred as that variance allows. The autoencoders of latent diffusion have a KL of a millionth of that: their
prior decodes to nothing, and a diffusion model learns to draw the latents instead.
"""

from __future__ import annotations

import torch
from PIL import Image

from tinyldm.cli import Parser, guard
from tinyldm.diffusion.noise import initial_noise, make_generators
from tinyldm.folders.load import load_vae
from tinyldm.pictures.pixels import to_bytes
from tinyldm.pictures.sheet import tile


@torch.no_grad()
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--vae", default="runs/elbo", metavar="RUN", help="what train.py takes as --vae-weights")
    parser.add_argument("--size", type=int, default=64, help="width and height of a picture in pixels")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--out", default="prior.png")
    args = parser.parse_args()
    vae = load_vae(args.vae, "cpu")
    side = args.size // vae.config.downscale
    z = initial_noise((vae.config.latent_channels, side, side), make_generators(range(args.count)))     # as the encoder's, not standardised
    Image.fromarray(tile(to_bytes(vae.decode(z)), columns=8)).save(args.out)
    print(f"{args.out}: {args.count} pictures from the prior")


if __name__ == "__main__":
    guard(main)
