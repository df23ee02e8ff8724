"""README.md of a model's folder in the Hugging Face format: what it is, what was measured, how to load it.

No number is in it that was not counted in the folder's files, or stands in compress.json or evals.jsonl.
"""

import re
from math import prod
from pathlib import Path
from typing import Any

from megakd.models.hub import Checkpoint
from megakd.models.quantized import is_quantized
from megakd.system.files import read_json
from megakd.system.text import cell
from megakd.system.version import version_line

CARD = "README.md"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # a folder of the teacher is nobody else's


def write_card(
    folder: Path,
    name: str,
    report: dict[str, Any] | None,
    evals: list[dict[str, Any]] | None = None,
    measured: str | None = None,
    license_from: tuple[Path, ...] = (),
) -> None:
    """Write the card of a finished folder; the license is that of the first of `license_from` whose card states one."""
    license = next((found for place in license_from if (found := license_of(place))), {})
    (folder / CARD).write_text(model_card(folder, name, report, evals or [], measured, license), encoding="utf-8")


def model_card(
    folder: Path,
    name: str,
    report: dict[str, Any] | None,
    evals: list[dict[str, Any]],
    measured: str | None = None,
    license: dict[str, str] | None = None,
) -> str:
    """The card of a folder with config.json and weights.

    report: compress.json's content, if the experts were compressed; evals: lines of evals.jsonl, in which `measured` is
    this model's name; of the others the teacher and the untrained student are shown next to it.
    """
    config = read_json(folder / "config.json")
    teacher = (report or {}).get("teacher", {}).get("id") or ""
    teacher = teacher if HUB_ID.fullmatch(teacher) else None
    parts = [
        _header(config, teacher, license or {}, (report or {}).get("method") in FEWER),
        f"# {name}",
        _summary(config, teacher, report),
        "## Size",
        _sizes(folder, config, report),
        "## Quality",
        _quality(evals, measured, _measured_before(config, report)),
    ]
    if report is not None:
        parts += ["## Error of compressing", _errors(report)]
    parts += ["## Loading", _loading(config)]
    return "\n\n".join(parts) + "\n"


def _expanded(config: dict[str, Any], report: dict[str, Any] | None) -> bool:
    """Whether shared cores were multiplied out again."""
    return report is not None and report.get("method", "shared_core") == "shared_core" and "shared_core" not in config


def license_of(folder: Path) -> dict[str, str]:
    """license, license_name and license_link as the card of a folder states them."""
    if not (folder / CARD).exists():
        return {}
    text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    header = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    found = re.findall(
        r"^(license|license_name|license_link):[ \t]*([^\s#][^\r\n]*?)[ \t]*\r?$", header[1] if header else "", re.M
    )
    return {key: value.strip("'\"") for key, value in found}


def _header(config: dict[str, Any], teacher: str | None, license: dict[str, str], fewer: bool) -> str:
    lines = [f"{key}: {value}" for key, value in license.items()]
    lines.append("library_name: transformers")
    if teacher:
        lines.append(f"base_model: {teacher}")
    lines += ["pipeline_tag: text-generation", "tags:", "- mixture-of-experts", "- distillation", "- megakd"]
    if "shared_core" in config:
        lines += ["- compression", "- custom_code"]
    elif fewer:
        lines += ["- compression"]
    return "\n".join(["---", *lines, "---"])


def _summary(config: dict[str, Any], teacher: str | None, report: dict[str, Any] | None) -> str:
    made = f"Made with {version_line('MegaKD')}."
    kind = f"`{config['architectures'][0]}`" if config.get("architectures") else "A causal language model"
    origin = f" [{teacher}](https://huggingface.co/{teacher})" if teacher else " a Mixture-of-Experts teacher"
    if "shared_core" in config:
        layers = config["shared_core"]["layers"]
        text = (
            f"{kind}: a compressed student of{origin}. In {len(layers)} of {config['num_hidden_layers']} layers the "
            f"experts share one matrix a projection and store small factors each: {_forms(layers)}."
        )
        kept = sum(map(len, config["shared_core"].get("dense_experts", {}).values()))
        return text + (f" {kept} experts are kept as they were." if kept else "") + f" {made}"
    if report is not None and report.get("method", "shared_core") == "shared_core":
        return f"{kind}: a student of{origin} whose compressed experts were multiplied out again. {made}"
    if report is not None:
        return f"{kind}: a student of{origin}. {FEWER[report['method']].format(**report)} {made}"
    return f"{kind}: a student of{origin}. {made}"


FEWER = {
    "prune": "In each layer {experts} of its {teacher_experts} experts were kept.",
    "merge": "In each layer its {teacher_experts} experts were merged into {experts}.",
}


def _forms(layers: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Each shape with the range of its ranks."""
    ranks: dict[str, list[tuple[int, int]]] = {}
    for forms in layers.values():
        for form in forms.values():
            ranks.setdefault(form["shape"], []).append((form["input_rank"], form["output_rank"]))
    texts = []
    for shape, pairs in sorted(ranks.items()):
        if shape == "wrappers":
            inputs, outputs = zip(*pairs, strict=True)
            texts.append(f"`wrappers` of ranks {_span(inputs)} (input) and {_span(outputs)} (output)")
        else:
            texts.append(f"`{shape}` of rank {_span([max(pair) for pair in pairs])}")
    return ", ".join(texts)


def _span(values: Any) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} – {max(values)}"


def _sizes(folder: Path, config: dict[str, Any], report: dict[str, Any] | None) -> str:
    files = sorted(folder.glob("*.safetensors"))
    parameters = sum(prod(tensor.shape) for tensor in Checkpoint(folder).stored.values())
    rows = [
        ["parameters in the files", f"{parameters:,}"],
        ["bytes", f"{sum(path.stat().st_size for path in files):,}"],
        ["type", str(config.get("dtype") or config.get("torch_dtype"))],
    ]
    if is_quantized(config):
        rows.append(["stored in few bits", _precision(config)])
    if report is not None and "expert_parameters" in report and not _expanded(config, report):
        rows.append(["of the parameters, the compressed experts'", f"{report['expert_parameters']:,}"])
        if "expert_share" in report:
            rows.append(["of the teacher's experts", f"{report['expert_share']:.1%}"])
    return _table(["", ""], rows)


def _precision(config: dict[str, Any]) -> str:
    """Which parts have which precision, or the method of a stock model."""
    said = (config.get("shared_core") or {}).get("precision", {})
    return ", ".join(f"{part} {name}" for part, name in said.items()) or config["quantization_config"]["quant_method"]


COMPARED = {"kl": ".4f", "top1": ".1%", "topk": ".1%"}  # with the teacher; missing without its targets


def _measured_before(config: dict[str, Any], report: dict[str, Any] | None) -> str:
    """What was done to the weights after they were evaluated, as a sentence; empty where nothing was."""
    done = ["the experts were multiplied out"] if _expanded(config, report) else []
    done += ["weights were rounded to few bits"] if is_quantized(config) else []
    return f" Measured before {' and '.join(done)}." if done else ""


def _quality(evals: list[dict[str, Any]], measured: str | None, before: str) -> str:
    last = {row["model"]: row for row in evals}
    if measured not in last:
        return "This model was not evaluated."
    names = [name for name in ("teacher", "student-0") if name in last and name != measured] + [measured]
    compared = COMPARED | ({"attention": ".4f"} if any("attention" in last[name] for name in names) else {})
    shown = ("perplexity", "bits_per_byte", *compared)
    titles = {"student-0": "student before training", measured: "**this model**"}
    rows = [
        [
            titles.get(name, name),
            cell(row, "tokens", ","),
            cell(row, "perplexity", ".3f"),
            cell(row, "bits_per_byte", ".4f"),
            *(cell(row, key, form) for key, form in compared.items()),
        ]
        for name in names
        for row in [last[name]]
    ]
    headers = ["", "tokens trained on", "perplexity", "bits/byte", "KL to teacher", "top-1", "top-k"]
    headers += ["attention"] if "attention" in compared else []
    note = (
        f"On {cell(last[measured], 'positions', ',')} held-out tokens. KL in nats over the teacher's stored tokens; "
        "top-1 and top-k: agreement with the teacher's first token, and with those stored."
        + (" Attention: overlap of its rows with the teacher's." if "attention" in compared else "")
        + (
            " -: not measured, or not finite."
            if any(last[name].get(key) is None for name in names for key in shown)
            else ""
        )
    ) + before
    return f"{_table(headers, rows)}\n\n{note}"


def _errors(report: dict[str, Any]) -> str:
    """Of each layer's output, and for fitted matrices means over experts and layers, and the worst."""
    texts = []
    measured = {layer["layer"]: layer["output_error"] for layer in report.get("layers", []) if "output_error" in layer}
    if measured:
        worst = max(measured, key=lambda layer: measured[layer])
        texts.append(
            "The sum of a layer's routed experts on held-out tokens has a relative error of "
            f"{sum(measured.values()) / len(measured):.4f} (mean over layers; worst: {measured[worst]:.4f} in layer "
            f"{worst}), measured against the teacher's before training, with the student's own router."
        )
    if parts := report.get("parts"):
        texts.append(_matrix_errors(parts))
    return "\n\n".join(texts) or "Not measured."


def _matrix_errors(parts: list[dict[str, Any]]) -> str:
    rows = []
    weighted = all("weighted_errors" in part for part in parts)
    kinds = [("errors", "weights")] + ([("weighted_errors", "outputs on held-out tokens")] if weighted else [])
    for projection in dict.fromkeys(part["projection"] for part in parts):
        row = [f"{projection}_proj"]
        for key, _ in kinds:
            errors = {(p["layer"], e): x for p in parts if p["projection"] == projection for e, x in enumerate(p[key])}
            (layer, expert), worst = max(errors.items(), key=lambda item: item[1])
            row += [f"{sum(errors.values()) / len(errors):.4f}", f"{worst:.4f} (layer {layer}, expert {expert})"]
        rows.append(row)
    headers = ["", *(text for _, title in kinds for text in (f"{title}: mean", "worst"))]
    note = "Relative Frobenius errors of the experts' matrices before training."
    return f"{_table(headers, rows)}\n\n{note}"


def _loading(config: dict[str, Any]) -> str:
    plain = _code(
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
    )
    if "shared_core" not in config:
        return f"A stock architecture of transformers:\n\n{plain}"
    return (
        f"With MegaKD installed, `import megakd` makes the architecture known:\n\n"
        f"{plain.replace('from transformers', 'import megakd' + chr(10) + 'from transformers', 1)}\n\n"
        "Without it, with the code in this folder, which needs torch and transformers alone:\n\n"
        + _code(
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)',
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder", trust_remote_code=False)',
        )
        + "\n\nFor software that knows stock models alone, `megakd export RUN --dense` multiplies the experts out."
    )


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _table(headers: list[str], rows: list[list[str]]) -> str:
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
