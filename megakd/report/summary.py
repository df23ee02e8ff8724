"""The head of a run's page: what came out in a few numbers, and what the run was made of."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from megakd.report.series import Recorded, trained
from megakd.system.machine import why_shared
from megakd.system.text import cell, clock, finite, short


class Tile(NamedTuple):
    """One number: what it is, the number, and how it came about."""

    label: str
    value: str
    detail: str


def percent(share: float) -> str:
    """As every share of 1 is written on the page and in tables."""
    return f"{share:.1%}"


def tiles(run: Recorded) -> list[Tile]:
    """What is known of: KL closed, perplexity, size, tokens, time, speed."""
    rows = {row["model"]: row for row in run.evals}
    teacher, before = rows.get("teacher", {}), rows.get("student-0", {})
    after = next(reversed(trained(run)), {})
    after = {} if after.get("model") == "student-0" else after
    found = [
        _closed(teacher, before, after),
        _perplexity(teacher, before, after),
        *(_ratio(name, title, teacher, after or before) for name, title in SIZES),
        _tokens(run),
        _time(run.metrics),
        _speed(run),
    ]
    return [tile for tile in found if tile]


SIZES = (("parameters", "parameters"), ("bytes", "bytes"))


def _closed(teacher: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> Tile | None:
    """(KL before - KL after) / (KL before - KL of the teacher to its own cached logits)."""
    aim, start, end = (finite(row.get("kl")) for row in (teacher, before, after))
    if start is None or end is None:
        return None
    opened = start - (aim or 0.0)
    detail = f"KL {start:.4f} before, {end:.4f} after" + ("" if aim is None else f"; the teacher's own {aim:.4f}")
    return Tile("of the KL closed by KD", percent((start - end) / opened), detail) if opened > 0 else None


def _perplexity(teacher: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> Tile | None:
    shown = [(name, cell(row, "perplexity", ".2f")) for name, row in (("teacher", teacher), ("before KD", before))]
    last = after or before or teacher
    if finite(last.get("perplexity")) is None:
        return None
    label = "perplexity after KD" if after else "perplexity before KD" if before else "the teacher's perplexity"
    detail = ", ".join(f"{name} {value}" for name, value in shown if value != "-" and name not in label)
    return Tile(label, cell(last, "perplexity", ".2f"), detail)


def _ratio(name: str, title: str, teacher: dict[str, Any], student: dict[str, Any]) -> Tile | None:
    of, value = finite(teacher.get(name)), finite(student.get(name))
    if value is None:
        return None
    unit = "B" if name == "bytes" else ""
    if not of:
        return Tile(title, short(value) + unit, "of the student")
    return Tile(f"of the teacher's {title}", percent(value / of), f"{short(value)}{unit} of {short(of)}{unit}")


def _tokens(run: Recorded) -> Tile | None:
    if not run.metrics:
        return None
    last = run.metrics[-1]
    steps: dict[str, int] = {}
    for row in run.metrics:
        steps[row["stage"]] = steps.get(row["stage"], 0) + 1
    tokens = finite(last.get("tokens"))
    detail = ", ".join(f"{stage} {count:,}" for stage, count in steps.items())
    if tokens is None:
        return Tile("steps", f"{last['step']:,}", detail)
    return Tile("tokens trained on", short(tokens), f"{last['step']:,} steps: {detail}")


def seconds_of(metrics: Iterable[dict[str, Any]]) -> float:
    """Time of the steps: their tokens over their tokens/s; nothing between steps, such as saving."""
    total, before = 0.0, 0.0
    for row in metrics:
        tokens, speed = finite(row.get("tokens")), finite(row.get("tokens_per_second"))
        if tokens is not None:
            total += (tokens - before) / speed if speed else 0.0
            before = tokens
    return total


def _time(metrics: list[dict[str, Any]]) -> Tile | None:
    seconds = seconds_of(metrics)
    return Tile("training time", clock(seconds), "of the steps, without saving (h:mm:ss)") if seconds else None


def _speed(run: Recorded) -> Tile | None:
    seconds = seconds_of(run.metrics)
    tokens = finite(run.metrics[-1].get("tokens")) if run.metrics else None
    if not seconds or not tokens:
        return None
    return Tile("tokens/s in training", short(tokens / seconds), shared_words(run) or "mean over all steps")


def shared_words(run: Recorded) -> str:
    """Whether others used the machine during the training, as its checkpoints recorded; "" where none says so."""
    saved = [event for event in run.history if event["event"] == "checkpoint" and "machine_load" in event]
    reasons = [reason for event in saved if (reason := why_shared(event["machine_load"]))]
    ranks = next((e.get("ranks") for e in reversed(run.history) if e["event"] == "train" and "machine" in e), None)
    machines = [event["machine"] for event in run.history if isinstance(event.get("machine"), dict)]
    per_host = machines[-1].get("devices") if machines else None
    own = f"{ranks} ranks on {per_host} device; " if per_host == 1 and (ranks or 1) > 1 else ""
    if not reasons:
        return own.removesuffix("; ")
    return f"{own}machine shared at {len(reasons)} of {len(saved)} checkpoints: {reasons[-1]}"


def facts(run: Recorded) -> list[tuple[str, str]]:
    """(name, value) of what the run was made of; only what is recorded."""
    config, model = run.config, run.config["model"]
    found = [("run folder", run.folder.name), ("teacher", _model(model["teacher"], model.get("revision")))]
    made = run.compress
    if model.get("student"):
        found.append(("student", _model(model["student"], model.get("student_revision"))))
    elif made is not None:
        rank = f", rank {made['rank']}" if made.get("rank") else ""
        layers = len({part["layer"] for part in made.get("layers", made.get("parts", []))})
        method = made.get("method", "shared_core")
        left = ""
        if made.get("experts", 0) < made.get("teacher_experts", 0):
            left = f", {made['experts']} of {made['teacher_experts']} experts in each"
        found.append(("student", f"compressed from the teacher ({method}): {layers} MoE layers{left}{rank}"))
    objective = config["objective"]
    named = [f"{key} {objective[key]}" for key in ("alpha", "temperature", "divergence") if key in objective]
    found.append(("objective", ", ".join([objective["kind"], *named])))
    found.append(("data", ", ".join(_sources(run))))
    trainings = [event for event in run.history if event["event"] == "train"]
    hardware = [_machine(event) for event in trainings if isinstance(event.get("machine"), dict)]
    found += [("hardware", text) for text in dict.fromkeys(hardware)]
    if shared := shared_words(run):
        found.append(("throughput", shared))
    versions = [_version(event["megakd"]) for event in run.history if isinstance(event.get("megakd"), dict)]
    found.append(("MegaKD", ", ".join(dict.fromkeys(versions)))) if versions else None
    libraries = [", ".join(e["machine"].get("libraries", [])) for e in trainings if isinstance(e.get("machine"), dict)]
    found += [("libraries", text) for text in dict.fromkeys(libraries)]
    times = [event["time"] for event in run.history if event.get("time")]
    if times:
        found.append(("first to last event", f"{_time_text(times[0])} to {_time_text(times[-1])}"))
    return found


def _sources(run: Recorded) -> list[str]:
    """What the text is; of several sources also the share that was asked for, and the one that tokenize reached."""
    data = run.config["data"]
    sources = data.get("sources") or [data]
    names = [" / ".join(part for part in (each["source"], each.get("subset")) if part) for each in sources]
    if len(sources) == 1:
        return names
    whole = sum(each["weight"] for each in sources)
    asked = [f"{each['weight'] / whole:.2%}" for each in sources]
    if len(run.shares) != len(sources):
        return [f"{name} (share asked for: {share})" for name, share in zip(names, asked, strict=True)]
    return [
        f"{name} ({share:.2%} of the tokens, asked for: {wanted})"
        for name, share, wanted in zip(names, run.shares, asked, strict=True)
    ]


def _model(name: str, revision: str | None) -> str:
    return name + (f" at {revision}" if revision else "")


def _machine(event: dict[str, Any]) -> str:
    machine, ranks = event["machine"], event.get("ranks")
    parts = [f"{machine.get('device')}, {machine.get('memory_gb')} GiB", f"{machine.get('cpus')} CPU cores"]
    if (machine.get("devices") or 1) > 1:
        parts.insert(1, f"{machine['devices']} of them per host")
    return ", ".join([*parts, f"{ranks} rank{'s' if ranks != 1 else ''}"])


def _version(made: dict[str, Any]) -> str:
    return f"{made.get('version')}" + (f" ({made['commit']})" if made.get("commit") else "")


def _time_text(time: str) -> str:
    return str(time).replace("T", " ").removesuffix("Z") + " UTC"
