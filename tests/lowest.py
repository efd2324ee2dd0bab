"""Run a short road with exactly the lowest versions that setup.cfg promises, in an environment of its own.

    python3.10 tests/lowest.py ENV                          make the environment in folder ENV, and run train, sample, evaluate, ...
    python3.11 tests/lowest.py ENV --with torch==2.13.0     another version of one package, such as a CPU build that is at hand
    python3.11 tests/lowest.py ENV --extra test --tests tests/models      tests, with the extra's lowest versions, and of the library's
                                                            requirements the newest that go with them (or what --with says)
    python3.11 tests/lowest.py ENV --keep                   the environment as it is
    python3.11 tests/lowest.py --constraints > lowest.txt   only what pip reads to do the README's commands with these versions, in an
                                                            environment of that Python (3.10 or 3.11: later ones have no wheels of some):
        pip install -c lowest.txt -e . && python train.py --preset tiny
        pip install -c lowest-test.txt -e ".[test]" torch==2.6.0 && pytest  (lowest-test.txt: the same with --extra test. Without
                                                            a named torch pip tries all its versions, for minutes)

It needs the package index, and minutes: nothing of it runs in the tests. Run it after a change of setup.cfg, or of what is imported.

Measured with Python 3.11 and torch 2.13, all other packages at their lowest: the whole road. With Python 3.10 and torch 2.6, all at their
lowest: the README's first command whole, and its second with the extra's lowest versions: what needs a later package (sharding torch 2.8,
adapters in diffusers peft 0.21, turned pictures Pillow 13) is skipped and says so.
tokenizers 0.19 fails where merges are read, Pillow below 11.3 reads no orientation from XMP. Of the tests, those of T5's tokenizer need
transformers 5.5 (5.2 fails), those of turned pictures Pillow 13.
"""

from __future__ import annotations

import argparse
import configparser
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--scenes 24 --resolution 16 --vae-crop 8 --vae-batch-size 4 --batch-size 4 --vae-steps 2 --max-steps 2 --sample-steps 2 "
         "--autoencoder kl --vae latent_channels=8 widths=8,16 groups=4 depth=1 middle_attention=false "
         "--unet widths=16,32 attention=False,True heads=1,2 groups=4 --text width=16 layers=1 heads=2 mlp_width=32").split()
ROAD = [                                                        # RUN and HERE are folders that are made for it
    ["train.py", "--out", "RUN", *SMALL],
    ["train.py", "--out", "RUN", "--resume", "yes", "--max-steps", "3"],
    ["sample.py", "a red fox", "--model", "RUN", "-n", "2", "--out", "HERE/drawn"],
    ["sample.py", "a red fox", "a blue boat", "--interpolate", "7", "--frames", "2", "--model", "RUN", "--out", "HERE/film.webp"],
    ["prepare.py", "--data", "HERE/pictures", "--vae-weights", "RUN/vae", "--resolution", "16", "--out", "HERE/cache"],
    ["evaluate.py", "--vae", "RUN/vae", "--data", "HERE/pictures", "--resolution", "16"],
    ["evaluate.py", "RUN", "--count", "2", "--steps", "2"],
    ["train.py", "--finetune", "lora", "--model", "RUN", "--data", "HERE/pictures", "--max-steps", "2", "--out", "HERE/lora"],
    ["-m", "tinyldm.adapters", "show", "HERE/lora"],
    ["-m", "tinyldm.export", "RUN", "HERE/exported", "--dtype", "fp16"],
]
PICTURES = ("from PIL import Image; import sys, os; os.makedirs(sys.argv[1])\n"
            "for i in range(8): Image.linear_gradient('L').resize((24, 20)).convert('RGB').save(f'{sys.argv[1]}/{i}.png'); "
            "open(f'{sys.argv[1]}/{i}.txt', 'w').write(f'picture {i}')")


def requirements(extra: str = "") -> dict[str, str]:
    """Package -> the lowest version that setup.cfg allows on this Python, of the library's requirements or of those of an extra."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = (config["options.extras_require"][extra] if extra else config["options"]["install_requires"]).strip().splitlines()
    rows = [re.fullmatch(r'([\w-]+)>=([\w.]+)(?:; python_version >= "3\.(\d+)")?', line).groups() for line in lines]
    return {name: version for name, version, python in rows if int(python or 0) <= sys.version_info.minor}


def run(python: Path, words: list[str]) -> None:
    """Run one command, and stop at the first that fails. Packages that warn of what they will drop do not count."""
    print(f"$ {' '.join(map(str, words))}", flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([python, *words], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        print(done.stdout[-4000:])
        sys.exit(f"error: exit code {done.returncode} with these versions, above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", type=Path, nargs="?")
    parser.add_argument("--constraints", action="store_true", help="print the versions as pip's constraints, and stop")
    parser.add_argument("--with", dest="others", nargs="+", default=[], metavar="NAME==VERSION", help="in place of the lowest version")
    parser.add_argument("--extra", default="", help="an extra of setup.cfg, with its lowest versions: test")
    parser.add_argument("--tests", nargs="+", default=[], metavar="FILE", help="tests to run in place of the road")
    parser.add_argument("--keep", action="store_true", help="install nothing")
    args = parser.parse_args()
    exact = requirements(args.extra) | dict(word.split("==") for word in args.others)
    if args.constraints:
        return print(*(f"{name}=={version}" for name, version in exact.items()), sep="\n")
    if args.env is None:
        parser.error("name a folder for the environment, or ask for --constraints")
    python = args.env.resolve() / "bin" / "python"
    if not python.exists():
        venv.create(args.env, with_pip=True)
    if not args.keep:
        open_ = {name: version for name, version in requirements().items() if args.extra and name not in exact}
        run(python, ["-m", "pip", "install", "--quiet", *(f"{name}=={version}" for name, version in exact.items()),
                     *(f"{name}>={version}" for name, version in open_.items())])
    if args.tests:
        return run(python, ["-m", "pytest", "-n", "0", *args.tests])
    with tempfile.TemporaryDirectory() as here:
        run(python, ["-c", PICTURES, f"{here}/pictures"])
        for words in ROAD:
            run(python, [word.replace("RUN", f"{here}/run").replace("HERE", here) for word in words])
    print("the whole road works with these versions")


if __name__ == "__main__":
    main()
