"""Proof that a change left the numbers alone: short trainings of nine recipes, as digests.

    python -m tests.same_numbers before.json                       # on the commit before the change
    python -m tests.same_numbers after.json --against before.json  # on the commit after it

Each recipe trains the tests' tiny model for ten updates in one process, with the transformers
engines. A digest covers every weight of the trained student to the last bit; the loss of every
update is kept as well, so that a difference can be located. Digests are comparable on one machine
only, because another processor rounds differently.

The script reaches the program through its command line and reads the run folder's files itself, so
that one copy of it runs on commits whose modules have moved.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import xxhash

from tests.tiny import make_world, tiny_overrides

RECIPES: dict[str, list[str]] = {
    "sft": [],
    "fkl": [],
    "gkd": [],
    "minillm": [],
    "distillm": [],
    "ammd": ["critic.positions_per_step=24"],
    "ammd_paper": [],
    "ammd_blackbox": ["proxy.num_updates=2"],
    "oracle_tv": [],
}
"""Between them they use both texts, learned and fixed witnesses, credit, replayed text, and a proxy."""
SETTINGS = [
    "cluster.backend=in_process",
    "rollout.engine=transformers",
    "scoring.engine=transformers",
    "learner.num_updates=10",
    "evaluation.every=5",
    "checkpoint.every=5",
    # One thread each: with two, a busy machine changes the last bits of a product now and then.
    "learner.num_threads=1",
    "rollout.num_threads=1",
    "scoring.num_threads=1",
]


def train(world: Path, recipe: str) -> dict[str, object]:
    """Train one recipe; returns the digest of its student and the loss after every update."""
    run = world / "runs" / recipe
    command = [sys.executable, "-m", "deploy.cli.main", "train", str(world / "tiny.yaml")]
    settings = [*tiny_overrides(world), f"run_dir={run}", f"recipe={recipe}", *SETTINGS, *RECIPES[recipe]]
    environment = os.environ | {"DISTILL_CACHE": str(world / "cache"), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *settings], check=True, env=environment, stdout=subprocess.DEVNULL)
    weights = xxhash.xxh3_128()
    for path in sorted((run / "student").glob("*.safetensors")):
        weights.update(path.read_bytes())
    losses = pq.read_table(run / "metrics.parquet")["policy/loss"].to_pylist()
    return {"student": weights.hexdigest(), "losses": losses}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--against", type=Path)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        make_world(world)
        found = {recipe: train(world, recipe) for recipe in RECIPES}
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    if options.against is None:
        return 0
    before = json.loads(options.against.read_text())
    for recipe in RECIPES:
        print(f"{recipe}: {'equal' if found[recipe] == before[recipe] else 'DIFFERENT'}")
    return int(found != before)


if __name__ == "__main__":
    sys.exit(main())
