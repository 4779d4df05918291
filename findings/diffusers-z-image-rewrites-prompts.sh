#!/bin/sh
# Guess: A pipeline reads the list of prompts that it is given.
# Found: Z-Image's writes its chat template into the caller's own list, so that the second call with
# the same list encodes a template within a template: another picture, and no word.
# Versions: torch 2.13.0, diffusers 0.42.1, transformers 5.23.0.
# Output:
#   after one call: ['<user> a cat <assistant>']
#   the same list again gives the same embeddings: False
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/pip" install -q --no-compile diffusers==0.42.1 transformers==5.23.0
"$dir/bin/python" - <<'EOF'
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

words = {word: place for place, word in enumerate(["[PAD]", "a", "cat", "<", ">", "user", "assistant"])}
bare = Tokenizer(WordLevel(words, unk_token="[PAD]"))
bare.pre_tokenizer = Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="[PAD]")
tokenizer.chat_template = "<user> {{ messages[0].content }} <assistant>"
torch.manual_seed(0)
encoder = Qwen3Model(
    Qwen3Config(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
).eval()
pipe = ZImagePipeline(
    scheduler=FlowMatchEulerDiscreteScheduler(),
    vae=None,
    text_encoder=encoder,
    tokenizer=tokenizer,
    transformer=None,
)
prompts = ["a cat"]
with torch.no_grad():
    first, _ = pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    print(f"after one call: {prompts}")
    assert prompts == ["<user> a cat <assistant>"]
    second, _ = pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
same = first[0].shape == second[0].shape and torch.equal(first[0], second[0])
print(f"the same list again gives the same embeddings: {same}")
assert not same
EOF
