"""Makes random_bf16.safetensors: logits of transformers for the seeded random checkpoint "odd" in bf16.

Run by hand, once; the tests compare with the stored file and never install torch. An independent reading of
the same checkpoint: Hugging Face's DeepseekV3ForCausalLM, weights widened to fp32, fp32 arithmetic, eager
attention. The checkpoint itself is not stored: `tessera make-random` writes the same bytes everywhere
(random_checkpoint_test.cc holds their hash).

    pip install torch transformers safetensors
    python3 tests/golden/make_bf16_golden.py build/release/tessera
"""

import pathlib
import random
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import save_file
from transformers import DeepseekV3ForCausalLM

# Of the seeds 1 to 12 (all with a median cosine of 0.99999) this one has no two leading logits so close that
# rounding to bf16 swaps them; most others swap 1 to 5 of 167.
OPTIONS = ["--preset", "odd", "--format", "bf16", "--seed", "11"]
VOCAB = 331
# Below, around and far above YaRN's trained length of 32.
LENGTHS = [7, 40, 120]
TARGET = pathlib.Path(__file__).with_name("random_bf16.safetensors")


def sequences():
    draw = random.Random(5)
    return [[draw.randrange(VOCAB) for _ in range(length)] for length in LENGTHS]


def main():
    tensors = {}
    with tempfile.TemporaryDirectory() as parent:
        folder = f"{parent}/odd"
        subprocess.run([sys.argv[1], "make-random", folder, *OPTIONS], check=True)
        model, loading = DeepseekV3ForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not loading["missing_keys"], loading
        assert all(".layers.3." in key for key in loading["unexpected_keys"]), loading
        model.eval()
        for index, ids in enumerate(sequences()):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0]
            tensors[f"{index}.ids"] = torch.tensor(ids, dtype=torch.int32)
            tensors[f"{index}.bf16.logits"] = logits.float().contiguous()
            print(f"sequence {index}: {len(ids)} tokens, logits {logits.min():.3f} to {logits.max():.3f}")
    about = f"transformers, fp32 arithmetic; tessera make-random DIR {' '.join(OPTIONS)}"
    save_file(tensors, TARGET, metadata={"about": about})


if __name__ == "__main__":
    main()
