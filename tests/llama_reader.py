"""Run alone by test_export_gguf: log probabilities of the next token after each prompt, by llama.cpp (xllamacpp).

Arguments: the GGUF file, a JSON list of prompts, the number of tokens. The last line of stdout is a JSON list with
{tokens, logprobs} per prompt: how many tokens llama.cpp made of it, and one number per entry of the vocabulary.
"""

import json
import sys

import xllamacpp


def main(path, prompts, vocabulary):
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.cpuparams.n_threads = 512, 1, 0, 1
    params.warmup, params.verbosity = False, -1
    server = xllamacpp.Server(params)
    results = []
    for prompt in prompts:
        answer = server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": 1,
                "n_probs": vocabulary,
                "cache_prompt": False,
                # No probabilities come with an end of text or with half a character: have token 40 drawn. Those that
                # are reported are the ones from before this.
                "logit_bias": [[40, 1000.0]],
            }
        )
        logprobs = [None] * vocabulary
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            logprobs[entry["id"]] = entry["logprob"]
        results.append({"tokens": answer["usage"]["prompt_tokens"], "logprobs": logprobs})
    print("\n" + json.dumps(results), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))
