"""Plays scenes and prints what each took as JSON lines: `python -m benchmarks.simulator [--wall] [NAME ...]`.

Without `--wall` on the simulated clock, where a second lasts as long as the product's bookkeeping. With
`--target` the scenes are GLM-5.2's on an M5 Max, and reads count no alignment.
"""

import argparse
import json
from dataclasses import asdict

from benchmarks.simulator.clock import Clock, install_reader

# What the host takes for a layer that waits: found on one scene, "alone, no guesses", on two cores.
WAKE_S = 0.0016
LAYER_S, READ_S = 0.118 / 75, 16.5e6 / 13.5e9  # an M5 Max, 3.5 bpw: see config.forecast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="of scenes; none: all")
    parser.add_argument("--wall", action="store_true", help="on the wall clock, with threads and sleeps")
    parser.add_argument("--target", action="store_true", help="GLM-5.2 on an M5 Max")
    given = parser.parse_args()
    if not given.wall:
        clock = Clock()
        clock.install()
        install_reader(clock, not given.target, 0.0 if given.target else WAKE_S)
    # imported here because the product keeps references to the clock that is there when it is imported
    from benchmarks.simulator.checked import CHECKED, PLAYED, target_scenes
    from benchmarks.simulator.scenes import SPARSE, checkpoint_of, play

    scenes = target_scenes(LAYER_S, READ_S) if given.target else CHECKED
    with checkpoint_of(PLAYED if given.target else SPARSE) as checkpoint:
        for scene in scenes:
            if not given.names or scene.name in given.names:
                print(json.dumps({"scene": scene.name, **asdict(play(scene, checkpoint))}), flush=True)


if __name__ == "__main__":
    main()
