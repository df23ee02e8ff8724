"""Perplexity of a model that a server answers for: log-probabilities of prompts under OpenAI's /v1/completions."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from itertools import pairwise
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from megakd.data.records import Sample
from megakd.data.shards import ShardSet
from megakd.errors import UserError, listed, reason, shorten
from megakd.losses.per_token import perplexity
from megakd.system.logging import Progress

SECONDS = 600  # for an answer to a batch of prompts
PROBE_TOKENS = 200  # of text, read in both tokenizers
SAME = 0.1  # nats per token by which a server's two answers to one text may differ: rounding in 16 bits, and no more
WANTED = "log-probabilities of prompts (echo, logprobs), as vLLM gives them: megakd serve RUN --engine vllm"


class Endpoint(NamedTuple):
    """A server's model. url: up to /v1; engine: what the server says of itself; context: most tokens, where it says."""

    url: str
    model: str
    engine: str
    context: int | None

    def logprobs(self, prompts: Sequence[Sequence[int] | str]) -> list[list[float]]:
        """log p(token | tokens before it in its prompt) of each token of each prompt but the first.

        UserError where the server gives none, or not one for each token.
        """
        asked = {"model": self.model, "prompt": list(prompts), "max_tokens": 1, "temperature": 0}
        answer = _request(f"{self.url}/completions", self.url, {**asked, "echo": True, "logprobs": 1})
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            found = [choice["logprobs"]["token_logprobs"][:-1] for choice in choices]  # without the one that was made
            values = [[float(value) for value in each[1:]] for each in found]
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"{self.url}: {self.model}: gives no {WANTED}") from error
        if len(values) != len(prompts):
            raise UserError(f"{self.url}: {self.model}: {len(values)} answers to {len(prompts)} prompts")
        for prompt, each in zip(prompts, values, strict=True):
            if not isinstance(prompt, str) and len(each) != len(prompt) - 1:
                raise UserError(
                    f"{self.url}: {self.model}: {len(each)} log-probabilities for the {len(prompt)} tokens of a "
                    f"prompt, not {len(prompt) - 1}; needs {WANTED}"
                )
        return values


def connect(url: str, model: str | None) -> Endpoint:
    """The model of a server, the only one where `model` does not name it; UserError that says what is wrong."""
    place = url.rstrip("/").removesuffix("/v1")
    if urlsplit(place).scheme not in ("http", "https") or not urlsplit(place).netloc:
        raise UserError(f"--endpoint: {url!r} is no address of a server; write http://HOST:PORT")
    api = f"{place}/v1"
    try:
        rows = {str(row["id"]): row for row in _request(f"{api}/models", place)["data"]}
    except (LookupError, TypeError) as error:
        raise UserError(f"{place}: /v1/models is no list of models; name a server with OpenAI's interface") from error
    if model is None and len(rows) == 1:
        model = next(iter(rows))
    if model is None:
        raise UserError(f"{place}: lists {len(rows)} models: {listed(rows) or 'none'}; give --endpoint-model NAME")
    if rows and model not in rows:
        raise UserError(f"{place}: has no model {model!r}; --endpoint-model may be {listed(rows)}")
    row = rows.get(model, {})
    engine = str(row.get("owned_by", "unknown"))
    if engine == "vllm":
        engine = f"vLLM {_request(f'{place}/version', place).get('version', '')}".strip()
    return Endpoint(api, model, engine, row.get("max_model_len"))


def check_tokens(endpoint: Endpoint, tokenizer: Any, vocab_size: int, tokens: Sequence[int]) -> None:
    """UserError where the server reads a text in other tokens than the validation set has, or has fewer.

    The text of some tokens is sent as text, and as ids; the answers must be alike, token by token.
    """
    text = tokenizer.decode(list(tokens[:PROBE_TOKENS]), skip_special_tokens=True)
    ids = tokenizer(text)["input_ids"]
    last = [*ids[:1], vocab_size - 1]
    by_text = endpoint.logprobs([text])[0]
    by_ids, _ = (endpoint.logprobs([prompt])[0] for prompt in (ids, last))
    other = f"{endpoint.url}: {endpoint.model} has another tokenizer than the run's student: "
    if len(by_text) != len(by_ids):
        raise UserError(
            f"{other}a text is {len(by_text) + 1} tokens there, {len(ids)} here; serve an export of this run"
        )
    gap = sum(abs(a - b) for a, b in zip(by_text, by_ids, strict=True)) / max(len(by_ids), 1)
    if not gap <= SAME:
        raise UserError(
            f"{other}log-probabilities of a text and of its ids differ by {gap:.2f} nats per token; serve an export of "
            "this run"
        )


def quality(endpoint: Endpoint, holdout: ShardSet, tokens_per_byte: float, batch_size: int) -> dict[str, Any]:
    """perplexity, bits_per_byte and nll over the labels of a validation set, and their number `positions`.

    Documents of one sequence do not see each other, so each is a prompt.
    """
    facts = holdout.facts
    length = (facts["tokens"] if holdout.layout is not None else facts)["sequence_length"]
    progress = Progress(f"evaluate {endpoint.model}", len(holdout), "windows")
    total, positions = 0.0, 0
    for start in range(0, len(holdout), batch_size):
        samples = [holdout[i] for i in range(start, min(start + batch_size, len(holdout)))]
        parts = [part for sample in samples for part in documents(sample, length)]
        for first in range(0, len(parts), batch_size):
            prompts = parts[first : first + batch_size]
            answers = endpoint.logprobs([tokens for tokens, _ in prompts])
            for values, (_, counted) in zip(answers, prompts, strict=True):
                total -= math.fsum(value for value, counts in zip(values, counted, strict=True) if counts)
                positions += sum(counted)
        progress.update(len(samples))
    progress.close()
    if not positions:
        raise UserError(f"{holdout.folder}: no position of the validation set has a label; raise data.holdout_tokens")
    nll = total / positions
    return {
        "perplexity": perplexity(nll),
        "bits_per_byte": nll / math.log(2) * tokens_per_byte,
        "nll": nll,
        "positions": positions,
    }


def documents(sample: Sample, length: int) -> Iterator[tuple[list[int], list[bool]]]:
    """(tokens, whether each but the first counts as a label) of each document of a sequence that has labels.

    length: T, the most positions that a model reads.
    """
    tokens = sample.tokens[: length + 1].tolist()
    bounds = [int(start) for start in sample.starts if start < len(tokens)]
    for first, end in pairwise([*bounds, len(tokens)]):
        mask = [True] * (end - 1 - first) if sample.mask is None else sample.mask[first : end - 1].tolist()
        if any(mask):
            yield tokens[first:end], mask


def _request(url: str, place: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON that a server answers; UserError with its own words where it refuses."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        with urlopen(Request(url, data, headers), timeout=SECONDS) as response:
            return json.load(response)
    except HTTPError as error:
        said = shorten(" ".join(error.read().decode(errors="replace").split()), 300)
        remedy = f"; needs {WANTED}" if body else ""
        raise UserError(f"{url}: the server refuses ({error.code}): {said or error.reason}{remedy}") from error
    except ValueError as error:
        raise UserError(f"{url}: the answer is no JSON; name a server with OpenAI's interface") from error
    except (OSError, HTTPException) as error:
        why = reason(getattr(error, "reason", error)) if isinstance(getattr(error, "reason", None), OSError) else error
        raise UserError(f"{place}: no server answers ({why}); start one with: megakd serve RUN") from error
