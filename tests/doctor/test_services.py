"""Slurm's controller and nodes, the hub's cache, W&B's login."""

import pytest

from megakd.doctor import services
from megakd.doctor.services import check_hub, check_slurm, check_wandb, judge_nodes, judge_sizes

UP = "Slurmctld(primary) at head is UP\n"


@pytest.mark.parametrize(
    "ping, nodes, mark, words",
    [
        ((0, UP, ""), (0, "n1 main* idle 8 9000\nn2 main* mix 8 9000\n", ""), "ok", "2 nodes in main"),
        (
            (0, UP, ""),
            (0, "n1 main* idle 8 9000\nn2 main* down* 8 9000\nn2 big drain 8 9000\n", ""),
            "warn",
            "down: n2",
        ),
        ((0, UP, ""), (0, "n1 main* down* 8 9000\n", ""), "fault", "none can be used: n1 (down*)"),
        ((0, "Slurmctld(primary) at head is DOWN\n", ""), None, "warn", "is DOWN"),
        ((1, "", "Unable to contact slurm controller"), None, "warn", "Unable to contact"),
        (None, None, "warn", "no answer"),
    ],
)
def test_slurm(monkeypatch, ping, nodes, mark, words):
    monkeypatch.setattr(services.shutil, "which", lambda _: "/usr/bin/sinfo")
    monkeypatch.setattr(services, "output_of", lambda command: ping if command[0] == "scontrol" else nodes)
    (found,) = check_slurm()
    assert found.mark == mark and words in found.found


def test_no_slurm(monkeypatch):
    monkeypatch.setattr(services.shutil, "which", lambda _: None)
    assert [found.mark for found in check_slurm()] == ["ok"]


def test_a_node_of_several_partitions_is_counted_once():
    assert judge_nodes("n1 a idle 8 9000\nn1 b idle 8 9000\n").found == "1 nodes in a, b"


@pytest.mark.parametrize(
    "nodes, words",
    [
        ("n1 main* idle 8 9000\nn2 main* idle 2 100\n", None),
        ("n1 main* idle 4 9000\n", "the largest has 4 CPUs: generate_logits.sbatch (8 CPUs), job.sbatch (8 CPUs)"),
        ("n1 main* idle 16 4000\n", "compress.sbatch (4 CPUs, 6000 MB)"),
    ],
)
def test_nodes_that_are_smaller_than_what_job_files_ask_for(nodes, words):
    """Every job waited for ever, PENDING (PartitionConfig)."""
    found = list(judge_sizes(nodes))
    assert [each.mark for each in found] == ["warn"] * (words is not None)
    assert words is None or words in found[0].found, found


def test_the_hubs_cache(monkeypatch, tmp_path):
    for name in ("HF_HUB_CACHE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (found,) = check_hub()
    assert found.mark == "ok" and f"{tmp_path}/hf/hub (not made yet)" in found.found
    assert "HF_HUB_OFFLINE set: nothing is downloaded" in found.found
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(services.os, "access", lambda *_: False)
    (found,) = check_hub()
    assert found.mark == "fault" and "cannot be written" in found.found


@pytest.mark.parametrize(
    "wanted, installed, login, mark",
    [
        ("disabled", False, None, "ok"),
        ("online", False, None, "fault"),
        ("online", True, None, "fault"),
        ("offline", True, None, "ok"),
        ("online", True, "variable", "ok"),
        ("online", True, "netrc", "ok"),
    ],
)
def test_wandb(monkeypatch, tmp_path, wanted, installed, login, mark):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(services, "find_spec", lambda _: "found" if installed else None)
    if login == "variable":
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    elif login == "netrc":
        (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0000\n")
        (tmp_path / "netrc").chmod(0o600)
    assert [found.mark for found in check_wandb(wanted)] == [mark]
