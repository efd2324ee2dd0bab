"""What a checkpoint costs the training loop: the copy to the host, and steps that go on while it is written.

    python benchmarks/checkpoints.py [--width 384] [--layers 12] [--rounds 5]

A DiT with Muon and an EMA is trained on random latents. Per round: steps alone, then a save and steps beside the writing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from tinyldm.training.setup import at_stage

from tinyldm.config import parse
from tinyldm.device import autocast, pick_device
from tinyldm.folders.save import save_vae
from tinyldm.model import Model
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.layers import Cond
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.text.tokenizer import Tokenizer
from tinyldm.training import checkpoint
from tinyldm.training.distributed import World
from tinyldm.training.learner import Learner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device, config = pick_device(), parse(["--text-weights", "none", "--network", "dit"], "")[0]
    net = DiT(DiTConfig(width=args.width, layers=args.layers, heads=args.width // 64, mlp_width=4 * args.width, context_dim=64)).to(device)
    tokenizer = Tokenizer.train(["a red fox"], 600, 16)
    text = CLIPText(CLIPTextConfig(vocab_size=len(tokenizer), width=64, layers=1, heads=1, mlp_width=64, context_length=16)).to(device)
    learner = Learner(config, net, text, World(), device)
    vae = AutoencoderKL(VAEConfig(widths=(8, 8), depth=1, groups=4))
    x, cond = torch.randn(args.batch, 4, 32, 32, device=device), Cond(torch.randn(args.batch, 16, 64, device=device))

    def step(n: int) -> None:
        with autocast(device):
            loss = (net(x, torch.full((len(x),), 500.0, device=device), cond).float() - x).square().flatten(1).mean(1)
        (loss.sum() / len(x)).backward()
        learner.meter.add(loss, 1 / len(x))
        learner.step(n, 1e-3, measure=False)

    alone, beside, copies, writes = [], [], [], []
    with tempfile.TemporaryDirectory() as place:
        run, n = Path(place), 0
        save_vae(run / "vae", vae)
        model = at_stage(Model(net, vae, text, tokenizer, None, "flow", {}, {}), config)
        writer = checkpoint.Writer(run, keep=2)
        for round_ in range(args.rounds + 1):                    # the first warms up
            for times, saving in ((alone, False), (beside, True)):
                begun = time.perf_counter()
                if saving:
                    learner.save(writer, model, n, {"finished": False})
                    copies.append(time.perf_counter() - begun)
                for _ in range(3):
                    n, mark = n + 1, time.perf_counter()
                    step(n)
                    times.append(time.perf_counter() - mark)
                if saving:
                    writer.wait()
                    writes.append(time.perf_counter() - begun)
        size = sum(file.stat().st_size for file in checkpoint.names(run)[-1].rglob("*.safetensors")) / 1e6
        writer.close()
    count = sum(p.numel() for p in net.parameters())
    base = median(alone[3:])
    print(f"{count / 1e6:.0f}M parameters, checkpoints of {size:.0f} MB; medians of {args.rounds} rounds")
    print(f"a step alone {base:.3f} s, beside the writing {median(beside[3:]):.3f} s ({median(beside[3:]) / base:.2f}x)")
    print(f"the loop waits {median(copies[1:]):.3f} s for the copy ({median(copies[1:]) / base:.2f} steps); until all is on the disk "
          f"{median(writes[1:]):.2f} s, three steps included")


if __name__ == "__main__":
    main()
