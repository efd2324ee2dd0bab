"""Make the README's picture from a finished run.

    python docs/make_pictures.py runs/tiny            writes docs/tiny.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from tinyldm.data.toyworld import HELD_OUT
from tinyldm.device import pick_device
from tinyldm.folders.load import load_model
from tinyldm.pictures.sheet import captioned, two_lines
from tinyldm.pipeline import draw, draw_settings
from tinyldm.training.run_folder import find_model

TRAINED = ["a red fox", "a small white cat in the snow", "a large orange boat at sea", "a yellow star under the stars",
           "a green car on the sand, on the right", "a blue house on the grass", "a pink flower on grass",
           "a purple fish on the left, at sea", "a red heart under the stars", "an orange cat on sand",
           "a big blue bird in the snow", "a little red mushroom on grass"]


def main() -> None:
    run = sys.argv[1] if len(sys.argv) > 1 else "runs/tiny"
    model = load_model(find_model(run), pick_device())
    unseen = [f"{'an' if colour == 'orange' else 'a'} {colour} {subject}" for colour, subject in sorted(HELD_OUT)[:6]]
    prompts = TRAINED + unseen
    images = draw(model, prompts, range(len(prompts)), draw_settings(model))
    sheet = captioned(images, [two_lines(prompt, 128) for prompt in prompts], side=128)
    file = Path(__file__).parent / "tiny.png"
    sheet.save(file)
    print(file)


if __name__ == "__main__":
    main()
