"""Writes a model of random weights in the shape of a real one, to time it without a download.

::

    python -m benchmarks.gpu.random_model llama-1b DIR

How fast a model runs depends on its shape, not on its weights; its perplexity means nothing.
"""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.harness.random_models import write_random_mixture, write_random_model
from sparseserve.testing import save_tiny_model

# As in the config.json of Llama-3.2-1B and Llama-3-8B; and of OLMoE-1B-7B, four of its 16 layers.
SHAPES: dict[str, dict[str, object]] = {
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
        "max_position_embeddings": 8192,
    },
}
MIXTURES: dict[str, dict[str, object]] = {
    "olmoe-4-layers": {
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "vocab_size": 50304,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
    },
}
TINY = "tiny"


@click.command()
@click.argument("shape", type=click.Choice([TINY, *SHAPES, *MIXTURES]))
@click.argument("folder", type=click.Path(path_type=Path))
def main(shape: str, folder: Path) -> None:
    """Write a model of SHAPE with random bfloat16 weights to FOLDER; a mixture's are 2:4."""
    if shape == TINY:
        save_tiny_model("llama", folder)
        return
    click.echo(f"{shape}: drawing weights", err=True)
    if shape in MIXTURES:
        write_random_mixture(folder, **MIXTURES[shape])
    else:
        write_random_model(folder, **SHAPES[shape])


if __name__ == "__main__":
    main()
