"""Checks of plain `glmserve doctor` that look at the checkpoint, its plan, its dialect and its disk."""

from collections.abc import Iterator
from pathlib import Path

from config.errors import UsageError
from config.settings import Settings
from config.sizes import format_size
from server.commands.checkpoint import POCKET, choose_checkpoint
from server.commands.doctor.finding import Finding, Verdict

# Slower disks make a token of GLM-5.2 take more than a second and a half.
SLOW_BYTES_PER_S = 2 * 10**9
SPEED_S = 5.0
CALL = "<tool_call>add<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>"


def directory_of(settings: Settings) -> Path:
    """The folder that would be served. Raises UsageError."""
    return choose_checkpoint(settings.model, needs_glm=settings.stream_experts).directory


def check_checkpoint(settings: Settings) -> Iterator[Finding]:
    """Whether the checkpoint that would be served is complete, and what its config says."""
    from models.loading.loading import open_checkpoint

    found = choose_checkpoint(settings.model, needs_glm=settings.stream_experts)
    checkpoint = open_checkpoint(found.directory)
    name = settings.served_model_name or found.model_id
    num_layers, num_experts = checkpoint.args.num_hidden_layers, checkpoint.args.n_routed_experts
    text = f"complete, served as {name}: {num_layers} layers, {num_experts} experts"
    is_toy = found.directory.resolve() == POCKET.resolve() and settings.model is None
    yield Finding(Verdict.GOOD, text + (" (the small model in the box: glmserve pull)" if is_toy else ""))


def check_plan(settings: Settings) -> Iterator[Finding]:
    """Whether the budget is enough, and for how many experts."""
    from models.arithmetic import choose_arithmetic
    from server.commands.serve import make_engine_config
    from server.engine.backend import open_first_part, plan_memory

    directory = directory_of(settings)
    config = make_engine_config(settings, directory)
    plan = plan_memory(open_first_part(config), choose_arithmetic(), config)
    low = min(plan.slots_per_layer, default=0)
    text = f"{low} of {plan.num_experts} experts of each layer fit into {format_size(plan.budget_bytes)}"
    is_tight = low < plan.num_experts / 8
    yield Finding(
        Verdict.NOTE if is_tight else Verdict.GOOD, text + (": more would be faster" if is_tight else "")
    )


def check_alignment(settings: Settings) -> Iterator[Finding]:
    """Whether an expert is one read."""
    from models.loading.loading import open_checkpoint
    from streaming.files.layout import advise_aligning

    directory = directory_of(settings)
    advice = (
        advise_aligning(open_checkpoint(directory).experts, directory) if settings.stream_experts else None
    )
    yield Finding(Verdict.NOTE, advice) if advice else Finding(Verdict.GOOD, "nothing to gain")


def check_dialect(settings: Settings) -> Iterator[Finding]:
    """Whether tokenizer and chat template work, and whether the template is the checkpoint's own."""
    from server.commands.serve import load_dialect
    from server.glm.templates.template_files import DEFAULT, find_templates

    directory = directory_of(settings)
    dialect = load_dialect(directory)
    text = dialect.template.render([{"role": "user", "content": "Grüße, 世界"}], None, {})
    if "世界" not in dialect.tokenizer.decode(dialect.tokenizer.encode(text)):
        yield Finding(
            Verdict.FAULT, "the tokenizer does not give back what it was given: pull the model again"
        )
    elif DEFAULT not in find_templates(directory):
        yield Finding(Verdict.NOTE, "the checkpoint has no chat template: that of GLM-5.2 is used")
    else:
        yield Finding(Verdict.GOOD, "tokenizer and chat template of the checkpoint work")


def check_parser(settings: Settings) -> Iterator[Finding]:
    """Whether a tool call of this checkpoint's tokens is found, however it comes in pieces."""
    from server.glm.answer_parser import AnswerParser
    from server.glm.tokenizer import load_tokenizer
    from server.glm.tools import ToolSet

    tokenizer = load_tokenizer(directory_of(settings))
    parser = AnswerParser(tokenizer, [], ToolSet(({"name": "add"},)))
    for token_id in tokenizer.encode(CALL):
        parser.push(token_id)
    parser.flush(True)
    if parser.num_calls != 1 or parser.num_rejected_calls:
        yield Finding(Verdict.FAULT, "a tool call was not recognised: the tokenizer lacks GLM's markup")
    else:
        yield Finding(Verdict.GOOD, "a tool call is recognised")


def check_speed(settings: Settings) -> Iterator[Finding]:
    """Five seconds of reading experts, and what they promise."""
    from models.arithmetic import choose_arithmetic
    from server.commands.serve import make_engine_config
    from server.engine.backend import forecaster, open_first_part, plan_memory
    from streaming.disk.disk import DirectDisk
    from streaming.disk.probe import probe_disk

    config = make_engine_config(settings, directory_of(settings))
    checkpoint, arithmetic = open_first_part(config), choose_arithmetic()
    plan = plan_memory(checkpoint, arithmetic, config)
    if plan.is_resident and not settings.stream_experts:
        yield Finding(Verdict.GOOD, "every expert stays in memory: the disk does not matter")
        return
    probe = probe_disk(DirectDisk(), checkpoint.experts, plan.reader_threads, limit_s=SPEED_S)
    expected = forecaster(checkpoint, arithmetic, plan, probe.bytes_per_s)()
    text = f"the disk reads experts at {format_size(probe.bytes_per_s)}/s"
    text += f": {expected.describe()}" if config.cluster is None else ""
    is_slow = probe.bytes_per_s < SLOW_BYTES_PER_S and not plan.is_resident
    figures = {"bytes_per_s": probe.bytes_per_s, "tokens_per_s": expected.tokens_per_s}
    hint = "; keep the model on an internal NVMe SSD" if is_slow else ""
    yield Finding(Verdict.NOTE if is_slow else Verdict.GOOD, text + hint, figures)


def check_mirrors(settings: Settings) -> Iterator[Finding]:
    """Whether each --mirror is a folder with the checkpoint's files."""
    names = {path.name for path in directory_of(settings).glob("*.safetensors")}
    for mirror in settings.mirror:
        absent = [name for name in names if not (mirror.expanduser() / name).exists()]
        if absent:
            raise UsageError(f"--mirror {mirror} lacks {len(absent)} files of the checkpoint: copy it again")
        yield Finding(Verdict.GOOD, f"a mirror has all {len(names)} files")
