"""RUN/measured.json: rates per verb and device, written by real runs, read by `megakd plan`."""

import pytest

from megakd.errors import UserError
from megakd.measured import NAME, Stopwatch, read_rates, record_rate
from megakd.system.files import read_json
from tests.conftest import in_process


def test_a_rate_is_per_gpu_and_replaces_that_of_the_same_verb_and_device(tmp_path):
    record_rate(tmp_path, "train", "H100", 8000, 2.0, ranks=4, micro_batch=2)
    record_rate(tmp_path, "generate-logits", "H100", 500, 1.0, ranks=1)
    record_rate(tmp_path, "train", "A100", 600, 2.0, ranks=1)
    record_rate(tmp_path, "train", "H100", 16000, 2.0, ranks=4)
    found = {(rate["verb"], rate["device"]): rate for rate in read_rates(tmp_path / NAME)}
    assert {key: rate["tokens_per_second"] for key, rate in found.items()} == {
        ("generate-logits", "H100"): 500, ("train", "A100"): 300, ("train", "H100"): 2000,
    }  # fmt: skip
    assert found["train", "H100"]["ranks"] == 4 and "micro_batch" not in found["train", "H100"]


def test_nothing_is_written_where_nothing_was_measured(tmp_path):
    record_rate(tmp_path, "train", "CPU", 0, 0.0, ranks=1)
    assert not list(tmp_path.iterdir())


def test_the_first_addition_warms_up():
    watch = Stopwatch()
    watch.add(100, 50.0)
    watch.add(10, 1.0)
    watch.add(20, 2.0)
    assert (watch.tokens, watch.seconds) == (30, 3.0)
    counted = Stopwatch()
    counted.count(5)
    counted.count(7)
    assert counted.tokens == 7 and counted.seconds > 0


@pytest.mark.parametrize("text", ['{"version": 2, "rates": []}', "[]", '{"version": 1, "rates": [{"verb": "train"}]}'])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / NAME).write_text(text)
    with pytest.raises(UserError, match=NAME):
        read_rates(tmp_path / NAME)


def test_verbs_record_what_they_measured(prepared, sibling):
    """prepared: after compress, tokenize and generate-logits."""
    rates = {rate["verb"]: rate for rate in read_rates(prepared / NAME)}
    capture, tokenized = rates["generate-logits"], rates["tokenize"]
    assert tokenized["tokens"] > 1000 and tokenized["tokens_per_second"] > 0
    assert capture["verb"] == "generate-logits" and capture["tokens"] > 1000 and capture["tokens_per_second"] > 0
    run = sibling("log.every_steps=100")
    in_process("train", run.folder)
    in_process("evaluate", run.folder)
    rates = {rate["verb"]: rate for rate in read_json(run.path(NAME))["rates"]}
    assert rates["evaluate"]["flops_per_token"] > 1000 and rates["evaluate"]["tokens_per_second"] > 0
    rate = rates["train"]
    tokens, seconds = rate["tokens"], rate["seconds"]
    assert rate["flops_per_token"] > capture["flops_per_token"] > 1000
    assert rate["verb"] == "train" and rate["engine"] == "local" and rate["micro_batch"] == 4
    assert 0.9 * 5 * 512 < tokens <= 5 * 512 and rate["tokens_per_second"] == pytest.approx(tokens / seconds, rel=0.01)
