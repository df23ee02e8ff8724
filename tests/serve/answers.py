"""What vLLM answers to prompts of token ids: run by vLLM's Python, not by pytest.

    python tests/serve/answers.py REQUEST.json ANSWERS.json

REQUEST: {"prompts": [[id, …], …], "tokens": how many to generate, "options": of vllm.LLM}.
ANSWERS: for each prompt {"tokens", "logprobs": of these, "prompt_logprobs": of the prompt's but the first}.
A REQUEST {"refused": [options, …]} asks for the exceptions instead: [class, message] for each options; null for none.
"""

import json
import sys
from pathlib import Path


def main(request: str, answers: str) -> None:
    from vllm import LLM, SamplingParams

    asked = json.loads(Path(request).read_text())
    if "refused" in asked:
        Path(answers).write_text(json.dumps([refusal(LLM, options) for options in asked["refused"]]))
        return
    model = LLM(**asked["options"])
    sampling = SamplingParams(
        temperature=0.0, max_tokens=asked["tokens"], logprobs=0, prompt_logprobs=0, ignore_eos=True
    )
    rows = []
    for output in model.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], sampling, use_tqdm=False):
        made, prompt = output.outputs[0], output.prompt_token_ids
        rows.append(
            {
                "tokens": list(made.token_ids),
                "logprobs": [each[t].logprob for each, t in zip(made.logprobs, made.token_ids, strict=True)],
                "prompt_logprobs": [
                    each[t].logprob for each, t in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
                ],
            }
        )
    Path(answers).write_text(json.dumps(rows))


def refusal(make, options: dict) -> list[str] | None:
    try:
        make(**options)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
