"""The first steps of a large preset on any machine: both of its picture sizes, on a few pictures, with a small batch.

    python benchmarks/first_steps.py --data photos.tar --tokenizer CLIP_FOLDER [--preset 5090_week] [train.py's flags]

The VAE and the text encoder have the published ones' shapes and random weights (diffusers and transformers write them). This
shows that the preset runs, resumes and draws, not what it learns.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tinyldm.cli import need

REDUCED = ("--batch-size 4 --grad-accum 2 --max-steps 6 --warmup-steps 2 --val-samples 2 --val-every 3 --log-every 1 --save-every 5 "
           "--sample-every 0 --sample-steps 2 --encode-batch-size 4 --max-skip 1").split()


def write_untrained(folder: Path, tokenizer: Path) -> None:
    """Write stabilityai/sd-vae-ft-mse (folder/vae) and laion/CLIP-ViT-L-14-laion2B-s32B-b82K (folder/clip) with random weights."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=256,
                  down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4).save_pretrained(folder / "vae")
    CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                                 projection_dim=768, hidden_act="gelu", bos_token_id=49406, eos_token_id=49407)
                  ).save_pretrained(folder / "clip")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer / name, folder / "clip" / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a few captioned pictures: a tar or a folder")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with CLIP's vocab.json and merges.txt")
    parser.add_argument("--preset", default="5090_week")
    parser.add_argument("--out", type=Path, default=Path("runs/first_steps"))
    args, rest = parser.parse_known_args()
    need("diffusers", "transformers")
    shutil.rmtree(args.out, ignore_errors=True)
    models = args.out.with_name(args.out.name + "-models")
    if not models.exists():
        write_untrained(models, args.tokenizer)
    run = ["train.py", "--out", str(args.out)]
    start = [*run, "--preset", args.preset, "--data", args.data, "--vae-weights", str(models / "vae"), "--text-weights",
             str(models / "clip"), *REDUCED, "--sample-prompts", "a red fox", *rest]
    draw = ["sample.py", "a red fox", "--model", str(args.out), "--steps", "2", "--out", str(args.out / "fox.png")]
    for what, words in (("train", start), ("resume", [*run, "--resume", "auto"]), ("draw", draw)):
        begun = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True)
        print(f"{what}: {time.perf_counter() - begun:.0f} s", flush=True)
        if what == "train":                                    # as if it had been killed before its last checkpoint
            newest = max((args.out / "checkpoints").glob("step-*"))
            shutil.rmtree(newest)


if __name__ == "__main__":
    main()
