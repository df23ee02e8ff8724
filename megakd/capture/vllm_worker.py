"""The process in vLLM's environment that answers token ids with hidden states; run by that environment's Python.

    python -P vllm_worker.py '{"model": FOLDER, "dtype": "float32", …options of vllm.LLM}'

Imports nothing of MegaKD, whose requirements that environment lacks. The protocol, over
stdin and stdout, little-endian:

    request    uint32 count of documents, uint32 length of each, int32 token ids of all
    answer     uint8 0, uint32 rows N, uint32 D, N·D numbers in `dtype`: hidden states after the final norm, in order
               uint8 1, uint32 bytes, an error message; the worker ends

The first answer, to no request, has no rows: the model is loaded. The end of stdin ends the worker.
"""

import json
import os
import struct
import sys
from typing import Any, BinaryIO


def main(options: str) -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what vLLM prints is no answer
    requests = sys.stdin.buffer
    try:
        model, dtype = load(json.loads(options))
        answers.write(struct.pack("<BII", 0, 0, 0))
        answers.flush()
        while (documents := read(requests)) is not None:
            rows_ND = hidden_states(model, documents, dtype)
            answers.write(struct.pack("<BII", 0, *rows_ND.shape))
            answers.write(bytes_of(rows_ND))
            answers.flush()
    except BrokenPipeError:
        pass  # who asked is gone
    except Exception as error:
        lines = f"{type(error).__name__}: {error}".splitlines()
        message = " ".join(line.strip() for line in lines if line.strip())[:2000].encode()
        answers.write(struct.pack("<BI", 1, len(message)) + message)
        answers.flush()
        raise


def load(options: dict[str, Any]) -> tuple[Any, Any]:
    """A vLLM whose answers are hidden states as they leave the final norm: no pooling, no scaling; its dtype."""
    import torch
    from vllm import LLM  # pyright: ignore[reportMissingImports]
    from vllm.config import PoolerConfig  # pyright: ignore[reportMissingImports]

    pooler = PoolerConfig(task="token_embed", pooling_type="ALL", use_activation=False)
    return LLM(runner="pooling", convert="embed", pooler_config=pooler, **options), getattr(torch, options["dtype"])


def read(requests: BinaryIO) -> list[list[int]] | None:
    """The documents of the next request; None: there is none."""
    head = requests.read(4)
    if len(head) < 4:
        return None
    (count,) = struct.unpack("<I", head)
    lengths = struct.unpack(f"<{count}I", requests.read(4 * count))
    ids = struct.unpack(f"<{sum(lengths)}i", requests.read(4 * sum(lengths)))
    ends = [sum(lengths[: i + 1]) for i in range(count)]
    return [list(ids[end - length : end]) for end, length in zip(ends, lengths, strict=True)]


def hidden_states(model: Any, documents: list[list[int]], dtype: Any) -> Any:
    """[N, D] of all documents, in order. vLLM gives them in float32, which holds every 16-bit number."""
    import torch
    from vllm import PoolingParams  # pyright: ignore[reportMissingImports]

    asked = [{"prompt_token_ids": ids} for ids in documents]
    params = PoolingParams(task="token_embed", use_activation=False)
    found = model.encode(asked, params, pooling_task="token_embed", use_tqdm=False)
    rows = [each.outputs.data for each in found]
    wrong = [(len(ids), tuple(r.shape)) for ids, r in zip(documents, rows, strict=True) if len(r) != len(ids)]
    assert not wrong, f"tokens and hidden states differ in number: {wrong[:3]}"
    return torch.cat(rows).to(dtype)


def bytes_of(rows_ND: Any) -> memoryview:
    import torch

    return memoryview(rows_ND.contiguous().cpu().flatten().view(torch.uint8).numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
