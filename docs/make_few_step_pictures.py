"""Make the page's picture of students beside their teacher: one row each, the same captions and noises, drawn in few steps.

    python docs/make_few_step_pictures.py runs/tiny runs/lcm runs/reflow ...          writes docs/few_steps_toyworld.png

The first run is the teacher.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tinyldm.device import pick_device
from tinyldm.folders.load import load_model
from tinyldm.pictures.sheet import INK, captioned
from tinyldm.pipeline import draw, draw_settings
from tinyldm.training.run_folder import find_model

PROMPTS = ["a red fox in the snow", "a yellow star under the stars", "an orange boat at sea", "a blue house on the grass"]
STEPS = (1, 4)


def main() -> None:
    images, captions = [], []
    for run in sys.argv[1:]:
        model = load_model(find_model(run), pick_device())
        for steps in STEPS:
            images += [*draw(model, PROMPTS, range(len(PROMPTS)), draw_settings(model, steps=steps))]
            captions += [[(Path(run).name, INK), (f"{steps} step{'s' * (steps > 1)}", INK)]] * len(PROMPTS)
    file = Path(__file__).parent / "few_steps_toyworld.png"
    captioned(images, captions, columns=len(STEPS) * len(PROMPTS), side=96).save(file)
    print(file)


if __name__ == "__main__":
    main()
