"""The acts of the rehearsal, in order. Each uses the product from outside and says what it saw.

An act returns facts for the report; what must hold is asserted with the numbers found, so that a broken
promise ends the act and not the rehearsal.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.ceiling import charged
from benchmarks.rehearsal.checkpoint import on_disk_bytes, read_header
from benchmarks.rehearsal.stage import Stage, glmserve
from config.sizes import format_size, parse_size
from models.loading.checkpoint_names import is_unused
from models.loading.loading import open_checkpoint

Facts = dict[str, Any]
Act = Callable[[Stage], Facts]
TOOLS = [{"type": "function", "function": {
    "name": "look", "description": "Looks at the sky.",
    "parameters": {"type": "object", "properties": {"where": {"enum": ["up", "down"]}}, "required": ["where"],
                   "additionalProperties": False}}}]  # fmt: skip
SCHEMA = {"type": "object", "properties": {"clear": {"type": "boolean"}}, "required": ["clear"],
          "additionalProperties": False}  # fmt: skip
PROMPT, SAVED_PROMPT = 2100, 80  # past index_topk; past a block of saved tokens
HOG = """
import sys, time
held = []
for _ in range(int(sys.argv[1])):
    held.append(bytearray(b"x") * 2**25)
    time.sleep(0.5)
time.sleep(float(sys.argv[2]))
"""


class Skipped(Exception):
    """Why an act is not played here."""


def check(is_so: bool, words: str) -> None:
    """AssertionError with the words, also where Python is told to leave assertions out."""
    if not is_so:
        raise AssertionError(words)


def tensors(stage: Stage) -> Facts:
    """Every tensor of every file is the trunk's, an expert's, or named as not used."""
    checkpoint = open_checkpoint(stage.folder)
    names: dict[str, int] = {}
    for path in stage.folder.glob("*.safetensors"):
        for name, entry in read_header(path)[1].items():
            check(name not in names, f"{name} stands in two files")
            names[name] = entry["data_offsets"][1] - entry["data_offsets"][0]
    experts = {name for name in names if ".switch_mlp." in name}
    index = checkpoint.experts
    counted = sum(index.num_experts * index.expert_bytes(layer) for layer in index.layers)
    check(counted == sum(names[name] for name in experts), "experts' bytes and the index do not agree")
    trunk = {entry.name for entry in checkpoint.trunk.values()}
    left = names.keys() - trunk - experts
    check(all(is_unused(name, checkpoint.args) for name in left), f"nobody's: {sorted(left)[:3]}")
    return {
        "tensors": len(names), "of the trunk": len(trunk), "of experts": len(experts), "not used": len(left),
        "bytes": sum(names.values()), "experts": len(index.layers) * index.num_experts,
        "on disk": format_size(on_disk_bytes(stage.folder)),
    }  # fmt: skip


def plan(stage: Stage) -> Facts:
    """`glmserve plan`: the lines add up, and the smallest budget that it names is one that works."""
    done = glmserve("plan", *stage.flags, "--json")
    check(done.returncode == 0, done.stderr)
    said = json.loads(done.stdout)
    total = sum(said["lines"].values()) + said["unassigned_bytes"]
    check(total == said["budget_bytes"], f"the lines are {total}, the budget {said['budget_bytes']}")
    least = str(said["minimum_budget_bytes"])
    for budget, code in ((least, 0), (str(int(least) - 10**6), 2)):
        again = glmserve("plan", *stage.flags, "--ram-budget", budget, "--json")
        check(again.returncode == code, f"a budget of {budget}: {again.returncode} {again.stderr}")
    return {
        "budget": said["budget_bytes"], "smallest": said["minimum_budget_bytes"],
        "slots a layer": min(said["slots_per_layer"]), **said["lines"],
    }  # fmt: skip


def doctor(stage: Stage) -> Facts:
    """`glmserve doctor`: no fault."""
    done = glmserve("doctor", *stage.flags, "--prefix-cache-dir", str(stage.prefixes), "--json")
    findings = json.loads(done.stdout)
    faults = [found["text"] for found in findings if found["verdict"] == "fault"]
    check(not faults and done.returncode == 0, f"{done.returncode} {faults} {done.stderr}")
    return {"checks": len(findings), "notes": [f["text"] for f in findings if f["verdict"] != "good"]}


def start(stage: Stage) -> Facts:
    """`glmserve serve` under the hard limit: time, and memory by line against the ledger."""
    stage.open()
    planned, used = stage.ledger("planned"), stage.ledger("used")
    over = {name: nbytes for name, nbytes in used.items() if nbytes > planned[name]}
    check(not over, f"more than promised: {over} of {planned}")
    return {"ready after s": round(stage.ready_s, 1), **_memory(stage),
            **{f"{name} used": int(nbytes) for name, nbytes in used.items()}}  # fmt: skip


def token(stage: Stage) -> Facts:
    """A prompt of one token and two of answer, through all layers."""
    stage.open()
    before = stage.metrics()
    facts: Facts = {}
    times = []
    for second, event in stage.events("completions", {"prompt": [1000], "max_tokens": 3, "temperature": 0}):
        if event.get("usage"):
            check(event["usage"]["completion_tokens"] == 3, f"not three tokens: {event['usage']}")
        if event["choices"]:
            times.append(second)
    after = stage.metrics()
    asked = sum(_grown(before, after, name) for name in ("expert_hits", "expert_misses", "lookahead_used"))
    index = open_checkpoint(stage.folder).experts
    expected = 3 * len(index.layers) * 8
    check(asked == expected, f"{asked} experts were asked for in three steps, not {expected}")
    facts |= {"first token s": round(times[0], 2), "second s": round(times[1] - times[0], 2),
              "third s": round(times[2] - times[1], 2), "experts asked for": int(asked),
              "experts' bytes": int(after["expert_bytes_total"] - before["expert_bytes_total"])}  # fmt: skip
    return facts | _memory(stage)


def _grown(before: dict[str, float], after: dict[str, float], name: str) -> float:
    key = f"{name}_total"
    return after.get(key, 0) - before.get(key, 0)


def prompt(stage: Stage) -> Facts:
    """A prompt of 2,100 tokens: past index_topk, each absent expert read once at most."""
    if stage.context < PROMPT + 8:
        raise Skipped(f"--max-context {stage.context} is shorter than {PROMPT} tokens")
    stage.open()
    before = stage.metrics()
    ids = [(17 + 7919 * i) % 4000 for i in range(PROMPT)]
    said = stage.events("completions", {"prompt": ids, "max_tokens": 2, "temperature": 0})
    seconds = [second for second, event in said if event["choices"]]
    after = stage.metrics()
    nbytes = after["expert_bytes_total"] - before["expert_bytes_total"]
    index = open_checkpoint(stage.folder).experts
    whole = sum(index.num_experts * index.expert_bytes(layer) for layer in index.layers)
    decoded = 8 * sum(index.expert_bytes(layer) for layer in index.layers)
    check(nbytes <= whole + decoded, f"{nbytes} bytes came for a prompt, all experts are {whole}")
    return {"first token s": round(seconds[0], 1), "next s": round(seconds[1] - seconds[0], 2),
            "experts' bytes": int(nbytes), "of all": round(nbytes / whole, 3), **_memory(stage)}  # fmt: skip


def conversation(stage: Stage) -> Facts:
    """A tool is called under a grammar, its result comes back, the answer obeys a schema."""
    stage.open()
    talk: list[dict[str, Any]] = [{"role": "user", "content": "Is it clear?"}]
    common = {"reasoning": {"enabled": False}, "max_tokens": 60, "temperature": 0, "tools": TOOLS}
    began = time.monotonic()
    first = stage.ask("chat/completions", {"messages": talk, "tool_choice": "required", **common})
    [choice] = first["choices"]
    [call] = choice["message"]["tool_calls"][:1] or [None]
    check(choice["finish_reason"] == "tool_calls" and call is not None, f"no call: {choice}")
    where = json.loads(call["function"]["arguments"])["where"]
    check(where in ("up", "down"), f"the grammar let {where!r} through")
    middle = time.monotonic()
    talk += [choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": "blue"}]
    form = {"type": "json_schema", "json_schema": {"name": "sky", "schema": SCHEMA, "strict": True}}
    asked = {"messages": talk, "response_format": form, **common, "tool_choice": "none"}
    second = stage.ask("chat/completions", asked)
    answer = json.loads(second["choices"][0]["message"]["content"])
    check(type(answer["clear"]) is bool, f"the schema let {answer} through")
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    check(cached > 0, f"nothing of the first turn was found: {second['usage']}")
    return {"call": call["function"]["arguments"], "answer": answer,
            "first turn s": round(middle - began, 1), "second turn s": round(time.monotonic() - middle, 1),
            "prompt tokens": [said["usage"]["prompt_tokens"] for said in (first, second)],
            "cached": cached, **_memory(stage)}  # fmt: skip


def kill(stage: Stage) -> Facts:
    """A prompt is saved, the server killed with SIGKILL; the next one restores it and writes the same."""
    stage.open()
    body = {"prompt": [(5 + 31 * i) % 4000 for i in range(SAVED_PROMPT)], "max_tokens": 2, "temperature": 0}
    first, cold_s = _timed(stage, body)
    deadline = time.monotonic() + 60
    while stage.metrics().get("prefix_written_bytes_total", 0) == 0:
        check(time.monotonic() < deadline, "nothing was written within a minute")
        time.sleep(0.2)
    time.sleep(2)
    engine = stage.processes()
    stage.close(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in engine):
        check(time.monotonic() < deadline, "the engine outlives the HTTP process by ten seconds")
        time.sleep(0.1)
    stage.open()
    second, warm_s = _timed(stage, body)
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    check(cached >= 64, f"of {SAVED_PROMPT} tokens {cached} were found")
    texts = [said["choices"][0]["text"] for said in (first, second)]
    check(texts[0] == texts[1], f"{texts[0]!r} before, {texts[1]!r} after")
    return {"cold s": round(cold_s, 1), "ready again after s": round(stage.ready_s, 1),
            "restored s": round(warm_s, 2), "cached": cached}  # fmt: skip


def _timed(stage: Stage, body: Facts) -> tuple[Facts, float]:
    began = time.monotonic()
    return stage.ask("completions", body), time.monotonic() - began


def pressure(stage: Stage) -> Facts:
    """A neighbour in the same cage takes memory: the banks give it, nobody is killed, answers go on."""
    if not stage.is_caged:
        raise Skipped("no memory cgroup of version 1 can be made here")
    stage.open()
    assert stage.group is not None
    before, limit = stage.metrics()["expert_slots"], parse_size(stage.budget)
    room = limit - charged(stage.group)["rss"]
    pieces = int((room + limit / 32) / 2**25)
    enter = f'echo $$ > {stage.group}/cgroup.procs; exec "$@"'
    neighbour = subprocess.Popen(["sh", "-c", enter, "sh", sys.executable, "-c", HOG, str(pieces), "5"])
    while neighbour.poll() is None:
        time.sleep(0.5)
    after = stage.metrics()
    check(neighbour.returncode == 0, f"the neighbour ended with {neighbour.returncode}")
    check(after["expert_slots"] < before, f"the banks kept their {before} slots")
    check(not stage.kernel()["oom_kills"], f"the kernel killed: {stage.kernel()}")
    deadline = time.monotonic() + 600
    while (now := stage.metrics()["expert_slots"]) < before:
        check(time.monotonic() < deadline, f"{now} of {before} slots came back in ten minutes")
        time.sleep(1)
    return {"taken": format_size(pieces * 2**25), "slots before": int(before),
            "slots then": int(after["expert_slots"]), "shrinks": int(after["bank_shrinks_total"]),
            "all back after s": round(time.monotonic() - deadline + 600), **_memory(stage)}  # fmt: skip


def shutdown(stage: Stage) -> Facts:
    """SIGTERM: the server ends by itself, leaves no process and its hot set."""
    stage.open()
    pids, began = stage.processes(), time.monotonic()
    code = stage.close()
    left = [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
    check(code == 0 and not left, f"exit code {code}, left {left}")
    saved = list(stage.prefixes.glob("experts-*.json"))
    check(bool(saved), "no hot set was saved")
    return {"ended after s": round(time.monotonic() - began, 1), "hot set bytes": saved[0].stat().st_size}


def _memory(stage: Stage) -> Facts:
    """The peak so far, of the tree and by the kernel; AssertionError where it was above the budget."""
    kernel, limit = stage.kernel(), parse_size(stage.budget)
    peak = stage.peak.tree_bytes
    check(peak <= limit, f"the tree held {peak} bytes of {limit}")
    check(not kernel.get("oom_kills"), f"the kernel killed: {kernel}")
    return {"peak": peak, "peak of budget": round(peak / limit, 3),
            **{f"kernel {name}": value for name, value in kernel.items()}}  # fmt: skip


ACTS: dict[str, Act] = {act.__name__: act for act in (
    tensors, plan, doctor, start, token, prompt, conversation, kill, pressure, shutdown
)}  # fmt: skip
