"""How long a checkpoint holds up training: the copy to the host, and slower steps while it is written.

    python benchmarks/checkpoints.py [--width 384] [--layers 12] [--rounds 5]

A DiT with Muon and an EMA is trained on random latents. In each round three steps run alone, and three during a save.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from tinyldm.config import parse
from tinyldm.device import autocast, pick_device
from tinyldm.folders.save import save_texts, save_part
from tinyldm.model import Model
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.layers import Cond
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.objectives.denoising import Denoising
from tinyldm.text.encoders import TextEncoder, TextEncoders
from tinyldm.text.tokenizer import Tokenizer
from tinyldm.training import checkpoint
from tinyldm.training.distributed import World, clip
from tinyldm.training.frozen import Frozen
from tinyldm.training.learner import Learner
from tinyldm.training.second_stage import at_phase
from tinyldm.training.trained import TrainedModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device, config = pick_device(), parse(["--text-weights", "none", "--network", "dit"], "")[0]
    shape = DiTConfig(width=args.width, layers=args.layers, heads=args.width // 64, mlp_width=4 * args.width, context_dim=64)
    net = DiT(shape).to(device)
    tokenizer = Tokenizer.train(["a red fox"], 600, 16)
    text = CLIPText(CLIPTextConfig(vocab_size=len(tokenizer), width=64, layers=1, heads=1, mlp_width=64, context_length=16)).to(device)
    vae = AutoencoderKL(VAEConfig(widths=(8, 8), depth=1, groups=4))
    model = at_phase(Model(net, vae, TextEncoders([TextEncoder(text, tokenizer)]), None, "flow", {}, {}), config)
    x, cond = torch.randn(args.batch, 4, 32, 32, device=device), Cond(torch.randn(args.batch, 16, 64, device=device))

    def step(learner: Learner, n: int) -> None:
        with autocast(device):
            loss = (net(x, torch.full((len(x),), 500.0, device=device), cond).float() - x).square().flatten(1).mean(1)
        (loss.sum() / len(x)).backward()
        learner.meter.add(loss, 1 / len(x))
        turn = learner.objective.turns[0]
        learner.update(turn, clip(learner.weights(turn), config.optimisation.grad_clip), 1e-3)
        learner.average(n)

    alone, beside, copies, writes = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        run, n = Path(folder), 0
        save_part(run / "vae", vae), save_texts(run / "text", model.text)
        parts = ("net",) if config.text.weights else ("net", *model.text.modules)
        trained, objective = TrainedModel(lambda: model, parts, Frozen(run)), Denoising(config, model, parts)
        learner = Learner(trained, objective, config.optimisation, World(), device)
        writer = checkpoint.Writer(run, keep=2)
        for _ in range(args.rounds + 1):                        # the first round is a warm-up
            for times, saving in ((alone, False), (beside, True)):
                begun = time.perf_counter()
                if saving:
                    learner.save(writer, "step", n, {"finished": False})
                    copies.append(time.perf_counter() - begun)
                for _ in range(3):
                    n, mark = n + 1, time.perf_counter()
                    step(learner, n)
                    times.append(time.perf_counter() - mark)
                if saving:
                    writer.wait()
                    writes.append(time.perf_counter() - begun)
        size = sum(file.stat().st_size for file in checkpoint.names(run)[-1].rglob("*.safetensors")) / 1e6
        writer.close()
    count = sum(p.numel() for p in net.parameters())
    base = median(alone[3:])
    print(f"{count / 1e6:.0f}M parameters, checkpoints of {size:.0f} MB; medians of {args.rounds} rounds")
    print(f"a step alone {base:.3f} s, during a save {median(beside[3:]):.3f} s ({median(beside[3:]) / base:.2f}x)")
    print(f"the loop waits {median(copies[1:]):.3f} s for the copy ({median(copies[1:]) / base:.2f} steps); the checkpoint is on the "
          f"disk after {median(writes[1:]):.2f} s, three steps included")


if __name__ == "__main__":
    main()
