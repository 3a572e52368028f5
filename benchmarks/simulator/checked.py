"""Scenes: those measured on the wall clock and predicted, and GLM-5.2 on machines that nobody here has."""

from dataclasses import replace

from benchmarks.simulator.scenes import Scene

CHECKED = (
    Scene("alone"),
    Scene("alone, no guesses", looks_ahead=False),
    Scene("alone, nearness", follows_nearness=True, looks_ahead=False),
    Scene("16 slots", slots=16, looks_ahead=False),
    Scene("32 slots", slots=32),
    Scene("96 slots", slots=96),
    Scene("160 slots", slots=160, looks_ahead=False),
    Scene("slow disk", read_s=0.011, answer=16),
    Scene("fast disk", read_s=0.0027),
    Scene("fast device", layer_s=0.006, looks_ahead=False),
    Scene("2 agents", agents=2),
    Scene("4 agents", agents=4, answer=16),
    Scene("4 agents, no guesses", agents=4, answer=16, looks_ahead=False),
    Scene("8 agents", agents=8, answer=12),
    Scene("8 agents, two at a time", agents=8, answer=8, width=2),
    Scene("8 agents, 160 slots", agents=8, answer=12, slots=160),
    Scene("a prompt of 512", prompt=512, answer=2),
    Scene("a prompt of 2048", prompt=2048, answer=2),
    Scene("a prompt of 2048 in 4 parts", prompt=2048, answer=2, pass_rows=512, read_s=0.0027),
    Scene("a prompt of 1024, 128 slots, large ring", prompt=1024, answer=2, slots=128, ring=64),
    Scene("4 prompts of 512 at once", agents=4, prompt=512, answer=8),
    Scene("4 agents with 448 in common", agents=4, prompt=512, shared=448, answer=8),
    Scene("2 turns, 2 agents", agents=2, prompt=384, shared=256, answer=10, turns=2, result=64),
    Scene("2 turns, 4 agents", agents=4, prompt=320, shared=256, answer=8, turns=2, result=48),
    Scene("3 turns, 3 agents, fast disk", agents=3, prompt=320, answer=6, turns=3, result=64, read_s=0.0027),
)

# GLM-5.2's sparse layers are alike: fifteen of its 75 are played, and a token takes five times as long.
PLAYED, OF = 15, 75


def target_scenes(layer_s: float, read_s: float) -> tuple[Scene, ...]:
    """What `config.forecast` is checked against: one machine with other slots, disks and agents."""
    one = Scene("64 slots", layer_s=layer_s, read_s=read_s, sparse=PLAYED, answer=40, ring=16)
    scenes = [replace(one, name=f"{n} slots", slots=n) for n in (32, 64, 96, 128, 192)]
    scenes += [replace(one, name=f"{n} slots, no guesses", slots=n, looks_ahead=False) for n in (32, 64, 128)]
    scenes += [replace(one, name=f"disk times {f}", read_s=read_s / f) for f in (0.3, 0.5, 2.0, 4.0)]
    scenes += [replace(one, name=f"{n} agents", agents=n, answer=12) for n in (2, 4, 8, 16)]
    scenes += [replace(one, name=f"{n} agents, 128 slots", agents=n, slots=128, answer=12) for n in (4, 16)]
    scenes += [replace(one, name=f"prompt of {n}", prompt=n, answer=2) for n in (64, 512, 2048)]
    return tuple(scenes)
